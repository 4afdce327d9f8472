"""The `gradsift` command: a thin skin over `less` and `datastore`."""

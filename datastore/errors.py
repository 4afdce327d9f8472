"""The project's errors, one tree for all four packages.

    GradsiftError                 something the user can mend; shown as one line, exit code 2
    ├── SettingError              a setting is out of range or does not fit another (also ValueError)
    ├── DataError                 the data as a whole cannot be used: absent, empty, unreadable
    │   └── RowError              one row cannot be used and `strict` was asked for
    ├── ModelError                no such model, no chat template, no fast tokenizer
    │   └── UnsupportedError      refused by name, because the numbers would be wrong
    ├── CheckpointError           a checkpoint is absent, incomplete or does not fit the model
    │   └── OptimizerStateError   its Adam moments are missing, broken or do not fit
    └── StoreError                a datastore is absent or cannot be used
        ├── ProvenanceError       it was built with other settings, or from other data
        ├── DamagedStoreError     a file of it is missing, altered or malformed
        ├── FormatVersionError    it was written by a newer version
        ├── StoreLockedError      another process is writing to it
        └── DiskFullError         there is not enough room for it

Every message says what was wrong, what was found, what was expected and the way out, in that order.
A mistake of ours is not in this tree: it keeps its traceback.
"""

__all__ = [
    "CheckpointError",
    "DamagedStoreError",
    "DataError",
    "DiskFullError",
    "FormatVersionError",
    "GradsiftError",
    "ModelError",
    "OptimizerStateError",
    "ProvenanceError",
    "RowError",
    "SettingError",
    "StoreError",
    "StoreLockedError",
    "UnsupportedError",
]


class GradsiftError(Exception):
    """Base of every error that a user can mend."""


class SettingError(GradsiftError, ValueError):
    """A setting is out of range, or two settings do not fit each other."""


class DataError(GradsiftError):
    """A data file or data set cannot be used as a whole: absent, empty or unreadable."""


class RowError(DataError):
    """A single row cannot be used, and the caller asked for `strict`."""


class ModelError(GradsiftError):
    """The model or its tokenizer cannot be found or used."""


class UnsupportedError(ModelError):
    """A kind of model or adapter that is refused by name, since its numbers would be wrong."""


class CheckpointError(GradsiftError):
    """A checkpoint folder is absent, incomplete or does not fit the model."""


class OptimizerStateError(CheckpointError):
    """A checkpoint's Adam moments are missing, broken or do not fit the adapter's parameters."""


class StoreError(GradsiftError):
    """A datastore is absent or cannot be used."""


class ProvenanceError(StoreError):
    """A datastore was built with other settings, by another model or from other data."""


class DamagedStoreError(StoreError):
    """A file of a datastore is missing, altered or malformed."""


class FormatVersionError(StoreError):
    """A datastore was written by a newer version of gradsift."""


class StoreLockedError(StoreError):
    """Another process is writing to the datastore."""


class DiskFullError(StoreError, OSError):
    """There is not enough room on the disk."""

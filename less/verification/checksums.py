"""Every file of a store against the checksums of its manifest, with a bar: a large store takes a while."""

from datastore import Datastore
from datastore.files import damaged
from less.progress import Progress

__all__ = ["verify_files"]


def verify_files(store: Datastore, *, progress: bool) -> None:
    """Read all of a store's files and check them.

    Raises:
        DamagedStoreError: names every file that is not as it was sealed.
    """
    problems = {}
    with Progress(total=len(store.manifest.files), description="verify", unit="files", enabled=progress) as bar:
        for path, _, problem in store.iter_verify():
            bar.advance()
            if problem:
                problems[store.path / path] = problem
    if problems:
        raise damaged(problems)

"""What an experiment has done so far, as files in its folder, shared by the processes that work on it.

    trials/<key>.json    what a trial measured, by the hash of the held-out rows
    scores/<key>.npz     a method's scores of a store for some targets

A file is there whole or not at all, and is made by the process that holds the lock of its name, so that the same
command started several times shares the work.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from datastore import Datastore
from less.data.writing import write_lines
from less.evaluation.held_out import HeldOut
from less.evaluation.plan import Trial
from less.evaluation.trial import Measured
from less.influence import InfluenceScores

__all__ = ["Ledger"]


class Ledger:
    """The folder of an experiment, and the held-out rows that its trials are measured on.

    Args:
        folder: made if it is not there.
        held_out: by the name of the target set.
    """

    def __init__(self, folder: Path, held_out: Mapping[str, HeldOut]) -> None:
        self._trials, self._scores, self._held_out = folder / "trials", folder / "scores", held_out
        for own in (self._trials, self._scores):
            own.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> dict[str, Measured]:
        """What a trial has measured on these held-out rows, by target set."""
        file = self._trials / f"{key}.json"
        if not file.exists():
            return {}
        known = json.loads(file.read_text(encoding="utf-8"))
        return {name: Measured(**known[own.sha256]) for name, own in self._held_out.items() if own.sha256 in known}

    def write(self, key: str, measured: Mapping[str, Measured]) -> None:
        """Add to what a trial has measured; its lock must be held."""
        file = self._trials / f"{key}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        found = {self._held_out[name].sha256: asdict(own) for name, own in measured.items()}
        write_lines(file, [json.dumps(known | found)])

    def missing(self, trial: Trial) -> list[HeldOut]:
        """The held-out rows that a trial is still to be measured on."""
        known = self.read(trial.key)
        return [self._held_out[name] for name in trial.targets if name not in known]

    def one_by_one(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Each trial while its lock is held; those that other processes hold are waited for at the end."""
        for wait in (False, True):
            left = []
            for trial in trials:
                with _lock(self._trials / f"{trial.key}.lock", wait=wait) as is_ours:
                    if is_ours:
                        yield trial
                    else:
                        left.append(trial)
            trials = left

    def measured(self, key: str, measure: Callable[[HeldOut], Measured]) -> dict[str, Measured]:
        """What `measure` gives on every set of held-out rows, kept under a key."""
        with _lock(self._trials / f"{key}.lock", wait=True):
            known = self.read(key)
            found = {name: measure(own) for name, own in self._held_out.items() if name not in known}
            if found:
                self.write(key, found)
        return known | found

    def scores(
        self, made_of: Sequence[object], store: Datastore, score: Callable[[], InfluenceScores]
    ) -> InfluenceScores:
        """The scores that were kept for what they are made of, or those that `score` gives, kept for the next time.

        Args:
            made_of: all that decides them, as JSON.
            store: whose rows they are of.
            score: computes them.
        """
        key = hashlib.sha256(json.dumps([store.manifest.settings_hash, *made_of]).encode()).hexdigest()[:24]
        file = self._scores / f"{key}.npz"
        with _lock(self._scores / "scores.lock", wait=True):  # of all methods: two may build the same embeddings
            if file.exists():
                with np.load(file) as kept:
                    return InfluenceScores(
                        rows=store.rows(verify=False),
                        scores_NJ=kept["scores_NJ"],
                        subtasks=tuple(kept["subtasks"].tolist()),
                        target_sets=tuple(kept["target_sets"].tolist()),
                    )
            found = score()
            part = file.with_suffix(f".{os.getpid()}.tmp")
            with open(part, "wb") as stream:
                np.savez(
                    stream,
                    scores_NJ=found.scores_NJ,
                    subtasks=np.array(found.subtasks),
                    target_sets=np.array(found.target_sets),
                )
            part.replace(file)
        return found


@contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Within it, whether this process alone holds the lock of this name."""
    while True:
        with open(path, "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not os.fstat(file.fileno()).st_nlink:  # who held it has removed it: another may hold a new one
                continue
            yield True
            path.unlink(missing_ok=True)
            return

"""The command, called as the console script calls it, in this process."""

import json
import os
from dataclasses import dataclass

import pytest


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a problem of the whole command gives, beside what progress printed."""
        assert self.code == 2, self
        assert "Traceback" not in self.out + self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.splitlines()[-1] == line, self.err
        return line


@pytest.fixture
def gradsift(capsys, monkeypatch):
    from cli.main import main

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def run(*args: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Done(stopped.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture
def write_rows():
    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write

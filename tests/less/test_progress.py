import io
import sys

from less.progress import Progress


def run(monkeypatch, *, enabled=True, rows=3, fail=False, seconds=0.0) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    clock = iter(seconds * n for n in range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    try:
        with Progress(total=rows, description="work", enabled=enabled) as bar:
            for _ in range(rows):
                bar.advance(1, tokens=10)
            if fail:
                raise ValueError
    except ValueError:
        pass
    return stream.getvalue()


def test_a_log_gets_a_plain_last_line(monkeypatch):
    (line,) = run(monkeypatch, seconds=1.0).splitlines()
    assert line.startswith("work: 3 of 3 rows, ")
    assert "rows/s" in line
    assert "tokens/s" in line


def test_no_count_is_printed_twice(monkeypatch):
    lines = run(monkeypatch, seconds=20.0).splitlines()
    counts = [line.split(" of ")[0] for line in lines]
    assert counts == ["work: 1", "work: 2", "work: 3"]
    assert "left" in lines[0]


def test_nothing_is_printed_when_not_enabled_or_after_an_error(monkeypatch):
    assert run(monkeypatch, enabled=False) == ""
    assert run(monkeypatch, fail=True) == ""

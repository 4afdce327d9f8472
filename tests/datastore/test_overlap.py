"""Reading ahead and writing behind: order, results and errors of a plain loop."""

import threading
import time

import pytest

from datastore.overlap import WriteBehind, read_ahead


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_items(threads):
    assert list(read_ahead(lambda n: n * n, range(20), threads=threads)) == [n * n for n in range(20)]
    assert list(read_ahead(str, [], threads=threads)) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_the_next_items_are_read_while_one_is_used_and_no_further_one(threads):
    reading = [threading.Event() for _ in range(6)]

    def read(n):
        reading[n].set()
        return n

    for n in read_ahead(read, range(6), threads=threads):
        for ahead in reading[n + 1 : n + 1 + threads]:
            assert ahead.wait(timeout=30)
        assert not any(event.is_set() for event in reading[n + 1 + threads :])


def test_an_error_of_reading_comes_after_the_items_before_it():
    found = read_ahead(lambda n: 1 // (2 - n), range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_writes_happen_in_order_and_are_done_at_the_end():
    written = []
    with WriteBehind() as write_behind:
        for n in range(20):
            write_behind(written.append, n)
    assert written == list(range(20))


def test_an_error_of_writing_is_raised_at_the_next_write():
    done = []
    with WriteBehind() as write_behind:
        write_behind(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            write_behind(done.append, 1)
    assert done == []


def test_an_error_of_the_last_write_is_raised_at_the_end():
    write_behind = WriteBehind().__enter__()
    write_behind(divmod, 1, 0)
    with pytest.raises(ZeroDivisionError):
        write_behind.__exit__(None)


def fail_while_writing(write):
    with WriteBehind() as write_behind:
        write_behind(write)
        raise KeyError


def test_what_is_being_written_when_the_work_fails_is_written_whole():
    written = []

    def write():
        time.sleep(0.2)
        written.append(1)

    with pytest.raises(KeyError):
        fail_while_writing(write)
    assert written == [1]

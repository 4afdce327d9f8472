"""Reading ahead and writing behind: order, results and errors of a plain loop."""

import threading
import time

import pytest

from datastore.overlap import WriteBehind, read_ahead


def test_items_come_in_order_each_with_what_was_read_of_it():
    assert list(read_ahead(range(20), lambda n: n * n)) == [(n, n * n) for n in range(20)]
    assert list(read_ahead([], str)) == []


def test_the_next_item_is_read_while_the_caller_is_busy_and_no_further_one():
    reading = [threading.Event() for _ in range(4)]

    def read(n):
        reading[n].set()

    for n, _ in read_ahead(range(4), read):
        if n < 3:
            assert reading[n + 1].wait(timeout=30)
        assert not any(event.is_set() for event in reading[n + 2 :])


def test_an_error_of_reading_comes_after_the_items_before_it():
    def read(n):
        return 1 // (2 - n)

    found = read_ahead(range(5), read)
    assert [next(found), next(found)] == [(0, 0), (1, 1)]
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

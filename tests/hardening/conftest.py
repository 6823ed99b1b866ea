"""What the hardening tests share: the judgement of what a reader made of a file, and its count."""

import tracemalloc
from collections import Counter

import pytest

MODEST = 80e6  # bytes


class Judge:
    """Reads, and counts the outcomes; anything but a value or an error that names the file is a failure."""

    def __init__(self, record):
        self.counts, self.record = Counter(), record

    def __call__(self, path, read, *, named=None):
        try:
            result = read()
        except (ValueError, OSError) as error:
            message = str(error)
            assert (named or path.name) in message, f"{type(error).__name__} without the name of the file: {message}"
            self.counts["refused"] += 1
            return None
        self.counts["read"] += 1
        return result


@pytest.fixture
def judge(record_property):
    """`Judge` whose counts go into the table of docs/hardening.md."""
    judge = Judge(record_property)
    yield judge
    record_property("hardening_counts", dict(judge.counts))


@pytest.fixture
def modest():
    """Fail a test whose Python and NumPy memory grew large, even for a moment."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MODEST

"""Damage to bytes, at random and reproducibly, and what a refusal is."""

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# More, and other, examples for whoever has the time: MEDROBUST_FUZZ_EXAMPLES=5000 python -m pytest tests/hardening
EXAMPLES = os.environ.get("MEDROBUST_FUZZ_EXAMPLES")

settings.register_profile(
    "hardening",
    derandomize=EXAMPLES is None,
    max_examples=int(EXAMPLES or 60),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def damages(draw):
    """One to three changes of a file: bits flipped, bytes cut off, put in, zeroed, repeated or replaced."""
    kind = st.sampled_from(["flip", "truncate", "insert", "zero", "repeat", "replace"])
    place = st.floats(0, 1, exclude_max=True)
    change = st.tuples(kind, place, st.binary(min_size=1, max_size=12))
    return draw(st.lists(change, min_size=1, max_size=3))


def damaged(content: bytes, changes) -> bytes:
    for kind, place, some in changes:
        at, length = int(place * len(content)), len(some)
        before, here, after = content[:at], content[at : at + length], content[at + length :]
        if kind == "flip":
            here = bytes(byte ^ (1 << mask % 8) for byte, mask in zip(here, some, strict=False))
        elif kind == "truncate":
            here, after = b"", b""
        elif kind == "insert":
            here = some + here
        elif kind == "zero":
            here = bytes(len(here))
        elif kind == "repeat":
            here = here * 3
        else:
            here = some
        content = before + here + after
    return content


fuzz = settings(settings.get_profile("hardening"))


def refused(path, read, message="."):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read()
    assert path.name in str(caught.value)

"""What is not needed is not loaded: a command line that answers at once."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "open_clip", "timm", "peft", "matplotlib"}


def loaded(code):
    """Top-level modules that a fresh interpreter holds after the code."""
    code = f"import sys\n{code}\nprint('LOADED', *sorted({{name.partition('.')[0] for name in sys.modules}}))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(finished.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import medrobust_lib", HEAVY | {"numpy", "pandas"}),
        ("from medrobust_lib import cli", HEAVY | {"numpy", "pandas"}),
        ("import medrobust_lib as mr; mr.list_models(); mr.list_vlms()", HEAVY),
        ("import medrobust_lib as mr; mr.list_datasets()", HEAVY),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code, unwanted):
    assert not loaded(code) & unwanted


def test_the_heavy_ones_would_be_seen():
    assert "torch" in loaded("from medrobust_lib import DualEncoder")

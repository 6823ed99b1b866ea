"""What editors and merges leave behind is not committed."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LITTER = ("*.orig", "*.rej", "*.bak", "*.swp", "*~")


def test_no_litter_is_tracked():
    try:
        listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", *LITTER], capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: nothing says which files are published")
    assert listed.decode().split("\0")[:-1] == []

"""What is not needed is not loaded: a command line that answers at once."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "open_clip", "timm", "peft", "matplotlib", "dask", "distributed"}
# In this order in one interpreter, which each step makes heavier.
STEPS = {
    "import medrobust_lib": HEAVY | {"numpy", "pandas", "joblib"},
    "from medrobust_lib import cli": HEAVY | {"numpy", "pandas", "joblib", "papermill"},
    "import medrobust_lib.experiments": HEAVY | {"joblib", "cloudpickle", "tqdm"},
    "import medrobust_lib as mr; mr.list_models(); mr.list_vlms()": HEAVY,
    "import medrobust_lib as mr; mr.list_datasets()": HEAVY,
    "from medrobust_lib.explore import noise_view, methods_view": {"transformers", "open_clip", "timm", "peft"},
}
LAST = "from medrobust_lib import DualEncoder"


@pytest.fixture(scope="module")
def loaded():
    """Step -> top-level modules that a fresh interpreter holds after it."""
    code = """
import json, sys
for step in json.loads(sys.argv[1]):
    exec(step)
    print("LOADED", json.dumps([step, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    command = [sys.executable, "-c", code, json.dumps([*STEPS, LAST])]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [json.loads(line.removeprefix("LOADED ")) for line in told if line.startswith("LOADED ")]
    return {step: set(modules) for step, modules in found}


@pytest.mark.parametrize(("step", "unwanted"), STEPS.items(), ids=list(STEPS))
def test_nothing_heavy_is_loaded_before_it_is_needed(loaded, step, unwanted):
    assert not loaded[step] & unwanted


def test_the_heavy_ones_would_be_seen(loaded):
    assert "torch" in loaded[LAST]

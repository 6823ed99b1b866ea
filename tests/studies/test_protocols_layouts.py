"""Every protocol runs on the layouts of the public weights and data, with random weights and drawn images."""

import functools
import json

import pandas as pd
import public_layouts
import pytest
import yaml
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib import parameters as notebook_parameters
from medrobust_lib.studies.adapt_step import AdaptCell
from medrobust_lib.studies.execute import run_study
from medrobust_lib.studies.protocols import list_protocols, protocols_folder, read_protocol
from medrobust_lib.studies.reproduction import KEYS, LAYOUTS, write_reproduction

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [protocol.name for protocol in list_protocols()]
# n reaches the radius .75 at sigma 1 and alpha .001; shots and epochs are those of the fastest learning.
SMALL = {
    "n_images": 2, "n": 40, "n0": 5, "sigmas": [1.0], "shots": 1, "epochs": 1, "severities": [3], "rank": 2,
    "batch_size": 64, "n_val": 1, "max_new_tokens": 1,
}  # fmt: skip
OF_A_PROTOCOL = {"oracle-smoothing-draws": {"n": [10, 20]}}


def shrunken(given, small):
    """What was read, with other settings wherever they stand."""
    if isinstance(given, dict):
        return {key: small.get(key, shrunken(value, small)) for key, value in given.items()}
    return [shrunken(value, small) for value in given] if isinstance(given, list) else given


def write_shrunken(folder, name, **more):
    """A protocol with small settings in a folder of its own."""
    given = notebook_parameters.read_yaml(protocols_folder() / f"{name}.yaml")
    small = SMALL | OF_A_PROTOCOL.get(name, {}) | more
    study = shrunken({key: value for key, value in given.items() if key != "reproduces"}, small)
    study |= {"reproduces": given["reproduces"], "n_images": small["n_images"]}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study))
    return folder


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Someone with the weights and the data of all protocols in folders of their own."""
    root = tmp_path_factory.mktemp("user")
    for name in ("weights", "data", "scratch"):
        (root / name).mkdir()
    with public_layouts.fraction_of_their_size(root / "scratch") as patched:
        public_layouts.write_all_weights(root / "weights")
        public_layouts.write_all_data(root / "data")
        patched.setenv("MEDROBUST_WEIGHTS", str(root / "weights"))
        patched.setenv("MEDROBUST_DATA", str(root / "data"))
        yield root


@pytest.fixture(scope="module")
def ran(user):
    """Function that runs a protocol once: what was read, what is finished, and the comparison as it was written."""

    @functools.cache
    def run(name):
        protocol = read_protocol(name, folder=write_shrunken(user / "protocols", name))
        protocol.check()
        finished = run_study(protocol.study, user / name, cells=protocol.cells(), announce=lambda line: None)
        write_reproduction(protocol, finished.folder, finished.failures)
        kept = {"column": str, "method": str, "remark": str, "verdict": str}
        table = pd.read_csv(finished.folder / "comparison.csv", dtype=kept, keep_default_na=False, na_values={
            key: [""] for key in ("ours", "reported", "low", "high", "n", "difference")
        })  # fmt: skip
        return protocol, finished, table

    return run


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_of_a_protocol_fails(ran, name):
    protocol, finished, _ = ran(name)
    assert finished.failures == {}
    assert finished.done == finished.cells == len(protocol.cells())
    for page in ("comparison.csv", "table.csv", "reproduction.html"):
        assert (finished.folder / page).stat().st_size > 0

"""pyproject.toml, constraints.txt and environment.yml describe one environment."""

import re
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from medrobust_lib import doctor
from medrobust_lib.models import int8

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
REQUIREMENTS = [Requirement(line) for group in (PROJECT["dependencies"], *EXTRAS) for line in group]
NOT_INSTALLED = ("onnx", "docs")  # extras that `make install` leaves out
OPTIONAL = [Requirement(line) for extra in NOT_INSTALLED for line in PROJECT["optional-dependencies"][extra]]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_dependency_has_a_pin_inside_its_range_which_is_installed(requirement):
    name = canonicalize_name(requirement.name)
    assert name in PINS, f"add {name} to constraints.txt"
    assert PINS[name] in requirement.specifier
    if requirement in OPTIONAL and find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"{name} belongs to an extra that is not installed")
    assert Version(metadata.version(name)).public == PINS[name].public


def test_doctor_misses_no_package_of_an_extra_that_make_install_leaves_out():
    assert {*int8.PACKAGES, *doctor._SITE_PACKAGES} == {requirement.name for requirement in OPTIONAL}


def test_every_dependency_stands_in_environment_yml_with_a_spec_that_admits_the_pin():
    pip = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    assert pip[:2] == ["-c constraints.txt", "-e ."]
    listed = {canonicalize_name(Requirement(line).name): Requirement(line) for line in pip[2:]}
    wanted = [requirement for requirement in REQUIREMENTS if requirement not in OPTIONAL]
    assert set(listed) == {canonicalize_name(requirement.name) for requirement in wanted}
    for name, requirement in listed.items():
        assert PINS[name] in requirement.specifier


def test_every_package_in_environment_yml_has_its_reason_as_a_comment():
    lines = re.findall(r"^      - (\w.*)$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    assert len(lines) == len(REQUIREMENTS) - len(OPTIONAL)
    for line in lines:
        assert re.search(r"# \w{3,}", line), line


def test_python_versions_agree():
    python = next(line for line in CONDA["dependencies"] if str(line).startswith("python="))
    assert Version(python.removeprefix("python=")) in Requirement(f"x{PROJECT['requires-python']}").specifier


def test_every_package_that_is_named_is_used():
    """A dependency nobody imports or calls is a lie to the reader."""
    modules = {
        "open-clip-torch": "open_clip", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml",
        "pytest-cov": "--cov", "jupyterlab": "jupyter lab", "ipykernel": "-m ipykernel", "nbclient": "jupyter execute",
        "nbval": "--nbval-lax", "pytest-xdist": "--dist loadfile", "playwright": "playwright.sync_api",
        "pylibjpeg": "decoders.pylibjpeg", "pyjpegls": "decoders.pyjpegls",
        "onnxscript": '"onnxscript"', "myst-nb": '"myst_nb"', "numpydoc": '"numpydoc"',
        "pydata-sphinx-theme": '"pydata_sphinx_theme"',
        "pylibjpeg-libjpeg": '"pylibjpeg-libjpeg"', "pylibjpeg-openjpeg": '"pylibjpeg-openjpeg"',
    }  # fmt: skip
    sources = [*ROOT.glob("medrobust_lib/**/*.py"), *ROOT.glob("data_scripts/**/*.py"), *ROOT.glob("tests/**/*.py")]
    sources = [path for path in sources if path != Path(__file__)] + [ROOT / "Makefile", ROOT / "docs" / "conf.py"]
    text = "\n".join(path.read_text() for path in sources)
    for requirement in REQUIREMENTS:
        name = canonicalize_name(requirement.name)
        word = modules.get(name, name.replace("-", "_"))
        pattern = rf"^\s*(from|import) {word}\b" if word.isidentifier() else re.escape(word)
        assert re.search(pattern, text, re.MULTILINE) or f"/{name}" in text.lower(), f"{name} is never used"

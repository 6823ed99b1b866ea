"""What README promises exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medrobust_lib import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {
    language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("bash", "python")
}  # fmt: skip
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS["bash"] for line in block.splitlines() if line.strip()]


def test_relative_links_exist():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert len(targets) >= 4
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist():
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert {"run", "test", "lab"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("medrobust ")])
def test_medrobust_commands_have_the_options_that_are_shown(command):
    words = shlex.split(command)[1:]
    help_text = CliRunner().invoke(cli.app, [words[0], "--help"], env={"COLUMNS": "200"}).output
    assert "Usage" in help_text
    for option in [word for word in words if word.startswith("-")]:
        assert option in help_text, option


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_scripts_exist(command):
    assert (ROOT / shlex.split(command)[1]).exists()


@pytest.mark.parametrize("code", BLOCKS["python"])
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert "data" not in scope or len(scope["answers"]) == len(scope["data"])


def test_says_what_it_is_not():
    assert "**Not for clinical use.**" in README
    assert "synthetic phantoms" in README

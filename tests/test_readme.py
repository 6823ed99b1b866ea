"""Every command and every Python example of README.md, CONTRIBUTING.md and docs/*.md runs, or fails here.

A command belongs to one of the classes of `CLASSES`; one of no known class fails. Commands run for real where that
takes seconds and needs no network, in a folder of their own. The others go through the real command line up to the
point where work would begin: options, parameters, ids and files are checked, with the stand-ins below for weights and
data that are not on this computer.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from medrobust_lib import cli, runner
from medrobust_lib.data import questions
from medrobust_lib.data.registry import DATASETS
from medrobust_lib.experiments import Metric, Run, start_run
from medrobust_lib.experiments.cards import RUN_DIR_VARIABLE
from medrobust_lib.models import loading
from medrobust_lib.models.loading import find_model, list_models, list_vlms
from medrobust_lib.parameters import assign_parameters, notebook_parameters, read_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TEST = {"adapters.md": "test_docs_adapters.py"}  # pages whose Python runs in a test file of their own
PROGRAMS = ("make", "medrobust", "python", "pip", "conda", "hf", "dask", "sbatch")
# Words in capitals stand for something of the reader's.
PLACEHOLDERS = {"PATH": "my-images", "FOLDER": "my-images", "DATA": "my-images", "MODEL": "demo-clip", "NOTEBOOK": "01"}
MODEL_STAND_IN, VLM_STAND_IN, DATA_STAND_IN = "demo-clip", "demo-vlm", "phantom/blood"
CLUSTER_PACKAGES = {"dask-jobqueue"}  # named to people whose cluster needs them; nothing here imports them
MACHINERY = {"cluster.md", "hardening.md", "studies.md"}  # pages about running things, which show no model's result
# Scripts that take seconds, write below the working folder only, and need no network.
REALLY = ("data_scripts/show_phantoms.py", "data_scripts/make_medimeta_c.py --dry-run")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page):
    """Lines of bash blocks, and commands that stand inside the text, without comments."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(rf"`((?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) [^`\n]+)`", prose)
    inline = [span for span in inline if "..." not in span]  # a sketch of a command, which nobody could type
    found = [part.strip() for line in (*lines, *inline) for part in _without_comment(line).split("&&")]
    return [command for command in dict.fromkeys(found) if command]


def _without_comment(line):
    return re.sub(r"(^|\s)#.*$", "", line)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors are slower on several threads, above all beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cases():
    return [pytest.param(command, id=f"{page.name}: {command}") for page in PAGES for command in commands(page)]


def python_examples():
    for page in PAGES:
        if page.name not in OWN_TEST:
            for number, code in enumerate(blocks(page.read_text(encoding="utf-8"), "python"), start=1):
                yield pytest.param(page.name, code, id=f"{page.name} {number}")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working folder with what the examples call the reader's own: images in class folders, a table, a run."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    rows = ["path,label"]
    for folder in ("lym", "mono"):
        (tmp_path / "my-images" / folder).mkdir(parents=True)
        for number in range(3):
            file = f"{folder}/{number}.png"
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "my-images" / file)
            rows.append(f"{file},{folder}")
    (tmp_path / "my-images" / "list.csv").write_text("\n".join(rows) + "\n")
    for folder in ("M", "N", "B"):
        shutil.copytree(tmp_path / "my-images" / "lym", tmp_path / "my_images" / folder)
    return tmp_path


# ---- what runs a command ----


def check_shell(words, workplace, monkeypatch):
    settings = words[0] == "export" and all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in words[1:])
    known = (["source", ".venv/bin/activate"], ["cd", "medrobust"])
    assert settings or words in known, "no other shell command is known"


def check_dask(words, workplace, monkeypatch):
    assert words[1] in ("scheduler", "worker")
    help_text = subprocess.run(
        [Path(sys.executable).with_name("dask"), words[1], "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert [word for word in words if word.startswith("--") and word.split("=")[0] not in help_text] == []


def check_sbatch(words, workplace, monkeypatch):
    assert (ROOT / words[-1]).is_file(), words[-1]


def check_papermill(words, workplace, monkeypatch):
    notebook, _, *options = words[1:]
    known = notebook_parameters(ROOT / notebook)
    assert options[::3] == ["-p"] * len(options[::3]) and [name for name in options[1::3] if name not in known] == []


def check_make(words, workplace, monkeypatch):
    (target,) = words[1:]
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE), "`make help` lists it"


def check_conda(words, workplace, monkeypatch):
    file = ROOT / "environment.yml"
    known = (
        ["conda", "env", "create", "-f", file.name],
        ["conda", "activate", yaml.safe_load(file.read_text())["name"]],
    )
    assert words in known


def check_hf(words, workplace, monkeypatch):
    assert words == ["hf", "download", "OWNER/NAME"], "nothing is downloaded in a test"
    assert shutil.which("hf", path=str(Path(sys.executable).parent)), "comes with huggingface_hub"


def check_pip(words, workplace, monkeypatch):
    assert words[:4] == ["pip", "install", "-c", "constraints.txt"]
    assert (ROOT / words[3]).is_file()
    option, package, *others = words[4:]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", package)
    assert option == "-e" and extras, package
    assert {*others} <= CLUSTER_PACKAGES
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(filter(None, (extras[1] or "").split(","))) <= project["optional-dependencies"].keys()


def check_python(words, workplace, monkeypatch):
    if words[1:3] == ["-m", "pytest"]:
        assert [word for word in words[3:] if not word.startswith("-") and not (ROOT / word).exists()] == []
        return
    path = ROOT / words[1]
    assert path.is_file() and path.suffix == ".py", words[1]
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    app = script.app if hasattr(script, "app") else single_command(script.main)
    # Without arguments a script of this project would begin its work: its help is asked for instead.
    arguments = words[2:] or ["--help"]
    allowed = [entry.split() for entry in REALLY]
    if "--help" in arguments or any(words[1] == entry[0] and {*entry[1:]} <= {*arguments} for entry in allowed):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    else:
        typer.main.get_command(app).make_context(words[1], arguments)


def single_command(function):
    app = typer.Typer()
    app.command()(function)
    return app


def check_medrobust(words, workplace, monkeypatch):
    if words[1] == "run":
        stop_at_the_kernel(monkeypatch)
    if words[1] == "leaderboard":
        if not words[2:] or words[2].startswith("-"):
            words = [*words[:2], "runs", *words[2:]]
        write_a_card(workplace / words[2] / "one", monkeypatch)
    if words[1] in STUDY_COMMANDS:
        named_only = len(words) == 2
        words = [*words, "--help"] if named_only else STUDY_COMMANDS[words[1]](words, workplace, monkeypatch)
    result = CliRunner().invoke(cli.app, words[1:], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.strip()


def stop_at_the_kernel(monkeypatch):
    """`medrobust run` goes its whole way, but for the kernels and the report of what they left."""

    def run_notebooks(chosen, parameters, out=None, **options):
        assign_parameters(chosen, {name: stand_in(name, value) for name, value in parameters.items()})
        folder = Path("runs/some") if out is None else out
        return [runner.Executed(number, folder / "notebooks" / path.name, 0.0) for number, path in chosen.items()]

    monkeypatch.setattr(runner, "run_notebooks", run_notebooks)
    monkeypatch.setattr("medrobust_lib.experiments.report.write_report", lambda folder, **_: folder / "index.html")


def stand_in(name, value):
    """What is embedded, for an id that exists and whose weights or data are not here."""
    if isinstance(value, str) and value.startswith("["):
        value = read_yaml(value)
    if isinstance(value, list):
        return [stand_in(name, item) for item in value]
    if name in ("model", "compare_with") and find_model(value):
        return value if value.startswith("local-dir:") else MODEL_STAND_IN
    if name == "vlm" and find_model(value, generative=True):
        return VLM_STAND_IN
    if name in ("dataset", "datasets") and not value.startswith(("folder:", "csv:")):
        scenario = value.startswith(questions.QUESTIONS_PREFIX)
        assert questions.parse_scenario(value) if scenario else value in DATASETS
        return DATA_STAND_IN
    return value


def write_a_card(folder, monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
    run = start_run("01", "Zero-shot inference")
    given = {"model": {"id": "demo-clip"}, "dataset": {"id": "phantom/blood"}, "prompts": {}}
    metrics = [Metric(name, 0.5, 10, 0.2, 0.8) for name in ("accuracy", "certified_accuracy", "mce")]
    run.save_card(metrics=metrics, tables={}, **given)


def check_study(words, workplace, monkeypatch):
    """A study file of the project; only a dry run goes to its end."""
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    if "--dry-run" not in words:
        from medrobust_lib.studies import execute

        def run_study(study, folder, **options):
            raise Reached(study.name)

        monkeypatch.setattr(execute, "run_study", run_study)
    return words


def check_reproduce(words, workplace, monkeypatch):
    """A protocol of the project; nothing is measured or run, and its weights and data are taken as here."""
    from medrobust_lib.studies import cells, execute, protocols

    def run_study(study, folder, **options):
        raise Reached(study.name)

    monkeypatch.setattr(execute, "run_study", run_study)
    monkeypatch.setattr(protocols.Protocol, "check", lambda self: self.cells())
    monkeypatch.setattr(cells, "encodings_per_second", lambda *words, **more: 1.0)
    monkeypatch.setattr(cells, "_seconds_to_corrupt", lambda *words: 1.0)
    return words


def check_compare(words, workplace, monkeypatch):
    folders = [word for word in words[2:] if not word.startswith("-") and not word.endswith(".csv")]
    for folder in folders:
        write_a_card(workplace / folder, monkeypatch)
    return words


def check_submit(words, workplace, monkeypatch):
    """A card or a run of this version is added."""
    write_a_card(workplace / words[2].partition("/cards/")[0], monkeypatch)
    return words


def check_certify(words, workplace, monkeypatch):
    """Everything is checked; nothing is certified, and another model's weights are taken as here."""
    from medrobust_lib.studies.certify_step import CertifyAlone

    def run(cell, folder, **options):
        raise Reached(folder)

    monkeypatch.setattr(CertifyAlone, "run", run)
    place = words.index("--model") + 1
    return [*words[:place], stand_in("model", words[place]), *words[place + 1 :]]


class Reached(Exception):
    """The command line has read and checked everything, and work would begin."""


STUDY_COMMANDS = {"study": check_study, "compare": check_compare, "reproduce": check_reproduce, "submit": check_submit}
STUDY_COMMANDS |= {"certify": check_certify, "corrupt": lambda words, *_: words}  # that one runs
CLASSES = {
    "make": check_make,
    "medrobust": check_medrobust,
    "papermill": check_papermill,
    "python": check_python,
    "pip": check_pip,
    "hf": check_hf,
    "conda": check_conda,
    "dask": check_dask,
    "sbatch": check_sbatch,
    "source": check_shell,
    "export": check_shell,
    "cd": check_shell,
}


def run_command(command, workplace, monkeypatch):
    for name, value in PLACEHOLDERS.items():
        command = re.sub(rf"(?<![\w.]){name}(?![\w.])", value, command)
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # settings for this one command
        words = words[1:]
    assert words[0] in CLASSES, f"a command of no known class: {command}; give it a rule in tests/test_readme.py"
    try:
        CLASSES[words[0]](words, workplace, monkeypatch)
    except Reached:
        assert words[1] in ("study", "reproduce", "certify")


# ---- tests ----


@pytest.mark.parametrize("command", cases())
def test_command(command, workplace, monkeypatch):
    run_command(command, workplace, monkeypatch)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("medrobust run 01 -p tempalte=x", "unknown parameter 'tempalte'"),
        ("medrobust run 03 -p model=plib", "plib"),
        ("medrobust run 03 -p sigmas=[25.5]", "10 or less"),
        ("medrobust run 06 -p dataset=mm-safetybench/99", "mm-safetybench/99"),
        ("medrobust run 99", "unknown notebook"),
        ("medrobust run 01 --outt x", "No such option"),
        ("medrobust leaderboard --metric acuracy", "unknown metric"),
        ("medrobust study examples/nothing.yaml", "nothing.yaml"),
        ("medrobust certify FOLDER --model demo-clip --radius 1.5", "it takes n="),
        ("medrobust certify FOLDER --model plib", "plib"),
        ("medrobust corrupt DATA --suite clinical-c --out worse", "--kind of"),
        ("make rnu", "rnu"),
        ("python data_scripts/no_such.py", "no_such.py"),
        ("python data_scripts/fetch_weights.py --no-such", "No such option"),
        ("python data_scripts/show_phantoms.py blod", "blod"),
        ('pip install -c constraints.txt -e ".[claster]"', "claster"),
        ("conda activate medrobus", "medrobus"),
        ("source ~/.bashrc", "no other shell command"),
        ("curl example.org", "no known class"),
    ],
)
def test_a_command_that_is_wrong_fails(command, error, workplace, monkeypatch):
    with pytest.raises(BaseException) as caught:
        run_command(command, workplace, monkeypatch)
    told = f"{caught.value} {getattr(caught.value, 'message', '')}"  # click puts its words elsewhere
    assert error in re.sub(r"\s+", " ", told), told


@pytest.mark.parametrize(("page", "code"), list(python_examples()))
def test_python_example(page, code, workplace, monkeypatch):
    monkeypatch.setattr(loading, "_REGISTERED", dict(loading._REGISTERED))  # one of them registers a model
    if "import SLURMCluster" in code:
        stand_in_for_slurm(workplace, monkeypatch)
    if "read_cards" in code:  # of a run that is there
        about = {"tables": {}, "model": {"id": "demo-clip"}, "dataset": {"id": "phantom/blood"}, "prompts": {}}
        Run("01", "Title", workplace / "runs" / "demo", {}, 0.0).save_card(
            metrics=[Metric("accuracy", 0.5, 4)], **about
        )
    scope: dict = {"__name__": "__main__"}
    exec(compile(code, page, "exec"), scope)
    assert "answers" not in scope or len(scope["answers"]) == len(scope["data"])


def stand_in_for_slurm(workplace, monkeypatch):
    """A cluster that starts no jobs; the `medrobust` command that the script gives goes the way of all others."""

    class SLURMCluster:
        scheduler_address = "tcp://127.0.0.1:8786"

        def __init__(self, *, queue, cores, processes, memory, walltime, **more):
            self.jobs = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            assert error[0] is None and self.jobs > 0

        def job_script(self):
            return "#!/usr/bin/env bash"

        def scale(self, *, jobs):
            self.jobs = jobs

    def run(words, before=subprocess.run, **options):
        if words[0] != "medrobust":
            return before(words, **options)
        return run_command(shlex.join(words), workplace, monkeypatch)

    module = types.ModuleType("dask_jobqueue")
    module.SLURMCluster = SLURMCluster
    monkeypatch.setitem(sys.modules, "dask_jobqueue", module)
    monkeypatch.setattr(subprocess, "run", run)


def test_pages_with_a_test_of_their_own_have_it():
    for page, test in OWN_TEST.items():
        assert f'"{page}"' in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(#[^)]*)?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {
                re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in headings
            }


def test_every_model_and_script_that_is_named_exists():
    known = {*list_models()["id"], *list_vlms()["id"]}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for id in re.findall(r"fetch_weights\.py ([\w.-]+)", text):
            assert id in known or id == "--help", id
        for script in re.findall(r"`((?:download|prepare|fetch|make|show|train|evaluate)_\w+\.py)", text):
            assert (ROOT / "data_scripts" / script).is_file(), script
        for name in re.findall(r"`(medrobust_lib/[\w/.-]+|tests/\w+\.py|docs/\w+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_says_what_it_is_not():
    for page in [page for page in PAGES if page.name not in MACHINERY]:
        assert re.search(r"not for clinical use", page.read_text(encoding="utf-8"), re.IGNORECASE), page.name
    assert "> **Not for clinical use.**" in PAGES[0].read_text(encoding="utf-8")
    assert "synthetic phantom" in PAGES[0].read_text(encoding="utf-8")

"""What the source never does, by its syntax trees: unpickle, evaluate, start a shell, trust an archive."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "medrobust_lib").rglob("*.py"), *(ROOT / "data_scripts").rglob("*.py")])
PACKING = "medrobust_lib/experiments/work.py"  # functions for workers that this process has started itself
ALLOWED = {
    (PACKING, "cloudpickle"),
    ("medrobust_lib/models/weights.py", "UnpicklingError"),  # to recognise torch's refusal, nothing else
}
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pd.read_pickle",
    "pandas.read_pickle", "tempfile.mktemp",
}  # fmt: skip
SERIALISERS = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "jsonpickle", "_pickle"}


def offences(source, name):
    """(line, what) of everything in a file that this project does without."""
    found, tree = [], ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    strict = {node.name for node in classes if [*map(ast.unparse, node.bases)] == ["yaml.SafeLoader"]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            modules = {module.partition(".")[0]} if module else {each.partition(".")[0] for each in names}
            if modules & SERIALISERS and (name, *names) not in ALLOWED:
                found.append((node.lineno, f"import {module or names}"))
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in FORBIDDEN and not (called == "yaml.load" and words.get("Loader") in strict):
            found.append((node.lineno, called))
        if called == "torch.load" and words.get("weights_only") != "True":
            found.append((node.lineno, "torch.load without weights_only=True"))
        if called.endswith(("np.load", "numpy.load", "lib.format.read_array")) and words.get("allow_pickle") != "False":
            found.append((node.lineno, f"{called} without allow_pickle=False"))
        if words.get("shell", "False") != "False":
            found.append((node.lineno, f"{called} with shell"))
        if called.endswith((".extractall", "shutil.unpack_archive")) or (called.endswith(".extract") and "." in called):
            found.append((node.lineno, f"{called}: extract through preparing.archives"))
        if called.endswith("read_hdf") or words.get("trust_remote_code", "False") == "True":
            found.append((node.lineno, called))
        if called == "Image.open" and "formats" not in words and name.startswith("medrobust_lib/data/"):
            found.append((node.lineno, "Image.open of any format"))
    return found


@pytest.mark.hardening(
    area="source code", tried="every syntax tree searched for pickles, eval, exec, shells, yaml, np.load, torch.load",
    outcome="none, but for cloudpickle to a process's own workers",
)  # fmt: skip
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_runs_what_it_reads(path):
    assert offences(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import cloudpickle", "eval('1')", "torch.load(p)",
        "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "yaml.load(p)",
        "subprocess.run('ls', shell=True)", "tarfile.open(p).extractall('x')", "archive.extract(member, 'x')",
        "Image.open(p)", "load(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source):
    assert offences(source, "medrobust_lib/data/some.py")


def test_packing_stays_where_it_is():
    users = [path for path in FILES if "cloudpickle" in path.read_text(encoding="utf-8")]
    assert [path.relative_to(ROOT).as_posix() for path in users] == [PACKING]

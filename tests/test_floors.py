"""The house: what each room of the library may import. The table of floors is its documentation.

A module imports from its own room and from rooms on floors below, never upwards and never in a circle, whether at the
top of the file or inside a function. The package itself, ``medrobust_lib``, is the face of the house: only those
outside import from it.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import medrobust_lib

PACKAGE = Path(medrobust_lib.__file__).parent
# From the ground up. Rooms beside each other know nothing of each other.
FLOORS = (
    ("_torchvision", "checks", "files", "places"),
    ("metrics", "phantoms"),
    ("data", "plots"),
    ("experiments",),
    ("corruptions", "models"),
    ("evaluation", "smoothing"),
    ("adaptation", "generative"),
    ("explore", "parameters"),
    ("runner",),
    ("studies",),
    ("doctor", "image_commands"),
    ("cli",),
    ("__main__",),
)


# Each kind of step of a study has a file of its own; of models, what stands around their texts, what generative ones
# write, functions that become one, and what needs an extra (int8).
MOST_MODULES, MOST_LINES, MOST_PARAMETERS = 100, 500, 10
COMMANDS = ("cli.py", "image_commands.py")  # a command has as many parameters as it has options


def rooms_by_floor():
    return {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(path, modules):
    """The modules of the library that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "medrobust_lib":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "medrobust_lib")


@pytest.fixture(scope="module")
def imports():
    """Module -> modules that it imports."""
    paths = {
        ".".join(("medrobust_lib", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: set(imports_of(path, paths)) - {name} for name, path in paths.items()}


def room_of(module):
    return module.split(".")[1]


def test_every_room_has_a_floor(imports):
    assert {room_of(name) for name in imports if name != "medrobust_lib"} == set(rooms_by_floor())


def test_nothing_is_imported_from_above_or_from_beside(imports):
    floor = rooms_by_floor()
    upwards = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if "medrobust_lib" not in (name, other)
        and room_of(name) != room_of(other)
        and floor[room_of(other)] >= floor[room_of(name)]
    ]
    assert not upwards


def test_nobody_inside_imports_the_face(imports):
    assert not [name for name, others in imports.items() if "medrobust_lib" in others]


def test_no_circle(imports):
    TopologicalSorter(imports).prepare()


# ---- a house in which one finds one's way ----


@pytest.fixture(scope="module")
def trees():
    return {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def holds_code(tree):
    """Whether a file holds more than a docstring, imports and a table of names."""
    listed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
    return not all(isinstance(statement, listed) for statement in tree.body)


def test_rooms_are_few_and_files_are_short(trees):
    assert len([path for path, tree in trees.items() if holds_code(tree)]) <= MOST_MODULES
    long = {str(path): len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in trees}
    assert not {path: lines for path, lines in long.items() if lines > MOST_LINES}


def test_no_function_takes_more_than_ten_parameters(trees):
    many = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and path.name not in COMMANDS:
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > MOST_PARAMETERS:
                    many.append(f"{path}:{node.lineno} {node.name}")
    assert not many


# ---- what is said of the house ----

ROOT = PACKAGE.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def defines(source, name):
    return re.search(rf"\b(def|class) {name}\b|^{name} = ", source, re.MULTILINE) is not None


def test_the_page_of_the_house_has_every_room_from_the_ground_up():
    table = re.search(r"\| floor \|.+?\n\n", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)[0]
    told = re.findall(r"`(\w+)`", table)
    floor = rooms_by_floor()
    assert {*told, "__main__"} == set(floor)
    assert [floor[room] for room in told] == sorted(floor[room] for room in told)


def test_what_the_page_of_the_house_names_exists():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+[\w.]*)`", text):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    sources = {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    for dotted in re.findall(r"`((?:[a-z_]+\.)+(?!py)\w+)`", text):
        module, _, name = dotted.replace(".", "/").rpartition("/")
        named = [
            source for path, source in sources.items() if f"/{path}".endswith(f"/{module}") or path.startswith(module)
        ]
        assert f"{module}/{name}" in sources or any(defines(source, name) for source in named), dotted
    for name in re.findall(r"`(\w+)`", re.sub(r"\| floor \|.+?\n\n", "", text, flags=re.DOTALL)):
        assert any(defines(source, name) for source in sources.values()), name


def test_the_package_names_the_files_that_tell_each_notebooks_story(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from generate import READING

    assert list(READING) == [path.name.split("_")[0] for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for number, names in READING.items():
        assert f"{number:<8} {', '.join(names)}" in medrobust_lib.__doc__.split("\n")
        assert all((PACKAGE / f"{name}.py").is_file() for name in names)

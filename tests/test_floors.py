"""The house: what each room of the library may import. The table of floors is its documentation.

A module imports from its own room and from rooms on floors below, never upwards and never in a circle, whether at the
top of the file or inside a function. The package itself, ``medrobust_lib``, is the face of the house: only those
outside import from it.
"""

import ast
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
    ("doctor", "studies"),
    ("cli",),
    ("__main__",),
)


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

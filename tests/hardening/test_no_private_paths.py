"""What is published says nothing about the machine that it was made on."""

import getpass
import io
import re
import socket
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
# Written in these files on purpose: examples of what must not be published, or of hostile names.
EXAMPLES = ("tests/",)
PLACES = re.compile(r"(?<![\w.])(/home/\w|/root/|/Users/\w|/work/|/private/var/|[A-Z]:\\+Users)")
COMMON = {
    "root",
    "user",
    "vm",
    "localhost",
    "runner",
    "ubuntu",
    "admin",
    "jovyan",
    "nobody",
}  # say nothing about anyone


def tracked():
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: nothing says which files are published")
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts(name):
    """Text of a file and of what is said inside of images, tensors and archives."""
    path = ROOT / name
    if path.suffix in {".png", ".jpg"}:
        with Image.open(path) as picture:
            return "\n".join(f"{key}: {value}" for key, value in picture.info.items() if isinstance(value, str))
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return str(file.metadata())
    content = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(path) as archive:
            return "\n".join(archive.namelist())
    return content.decode("utf-8", "replace")


def private_names():
    names = {getpass.getuser(), socket.gethostname(), socket.gethostname().partition(".")[0]}
    return {name for name in names if len(name) > 2 and name.casefold() not in COMMON}


@pytest.mark.hardening(
    area="private data", tried="paths, user and host name of this machine in all published texts, images and tensors",
    outcome="none found",
)  # fmt: skip
def test_nothing_published_names_this_machine(record_property):
    names = private_names()
    found, searched = [], 0
    for name in tracked():
        text = texts(name)
        searched += 1
        if str(ROOT) in text:
            found.append(f"{name}: the place of this checkout")
        found += [f"{name}: {word}" for word in names if re.search(rf"\b{re.escape(word)}\b", text)]
        if not name.startswith(EXAMPLES):
            found += [f"{name}: {match[0]}" for match in PLACES.finditer(text)]
    assert found == []
    record_property("hardening_counts", {"files searched": searched})


@pytest.mark.parametrize(
    "text",
    ['"/home/ann/data"', "in /root/.cache", "/Users/ann", "C:\\Users\\ann", '"C:\\\\Users\\\\ann"', "/work/at"],
)
def test_the_search_finds_what_it_is_for(text):
    assert PLACES.search(text)


def test_the_search_takes_no_offence_at_addresses():
    assert not PLACES.search("https://example.org/home/page /tmp/x, docs/work/x and ./work/y")

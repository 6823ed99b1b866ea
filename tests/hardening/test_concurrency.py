"""Two at once, and disks and folders that do not take what is written: a message, and nothing lost."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medrobust_lib.corruptions.writing import write_benchmark
from medrobust_lib.experiments import open_store, start_run, write_text_atomically
from medrobust_lib.files import DownloadError
from medrobust_lib.smoothing.prompts import PromptSet
from preparing.downloads import download

BODY = bytes(range(256)) * 800
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def site():
    """A server on this machine whose answers a test may hold back or falsify."""
    state = SimpleNamespace(headers={}, cut=None, gate=threading.Event(), started=threading.Event(), ranges=[])
    state.gate.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            headers = {"ETag": '"v1"', "Content-Length": str(len(BODY) - start)} | state.headers
            if asked:
                headers["Content-Range"] = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            first = BODY[start : start + 100_000]
            self.wfile.write(first if state.cut is None else first[: state.cut])
            self.wfile.flush()
            state.started.set()
            if state.cut is None and state.gate.wait(60):
                self.wfile.write(BODY[start + len(first) :])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield state
    state.gate.set()
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPTS = Path(__file__).parents[2] / "data_scripts"
BESIDE_SCRIPTS = f"import sys; sys.path.append({str(SCRIPTS)!r})\n"
DOWNLOAD = (
    f"{BESIDE_SCRIPTS}from preparing.downloads import download; download(sys.argv[1], sys.argv[2], sha256=sys.argv[3])"
)


@pytest.mark.hardening(
    area="two at once", tried="two processes that fetch the same file",
    outcome="the second is told to wait; the first ends whole, and only then the file is there",
)  # fmt: skip
def test_two_downloads(site, tmp_path):
    path = tmp_path / "file.bin"
    site.gate.clear()
    first = subprocess.Popen([sys.executable, "-c", DOWNLOAD, site.address, str(path), SHA256])
    try:
        assert site.started.wait(60)
        with pytest.raises(DownloadError, match=r"another process is fetching .*file\.bin; wait until it is done"):
            download(site.address, path, sha256=SHA256)
        assert not path.exists()
        site.gate.set()
        assert first.wait(60) == 0
    finally:
        first.kill()
        first.wait()
    assert path.read_bytes() == BODY
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]
    assert len(site.ranges) == 1


@pytest.mark.hardening(
    area="downloads", tried="Content-Length too large, too small, no number, negative; an ETag of strange bytes",
    outcome="fetched and verified, or a message that names the address; never a short file under the final name",
)  # fmt: skip
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": str(len(BODY) + 5)}, {"Content-Length": "12"}, {"Content-Length": "many"},
        {"Content-Length": "-5"}, {"Content-Length": "9" * 30}, {"ETag": '"caf\xe9"'}, {"ETag": ""},
    ],
    ids=str,
)  # fmt: skip
def test_false_headers(site, tmp_path, headers):
    site.headers = headers
    path = tmp_path / "file.bin"
    try:
        assert download(site.address, path, sha256=SHA256, attempts=2, timeout=5).read_bytes() == BODY
    except DownloadError as error:
        assert "127.0.0.1" in str(error)
        assert not path.exists()


@pytest.mark.hardening(
    area="downloads", tried="an ETag of strange bytes and a broken connection", outcome="goes on where it stopped",
)  # fmt: skip
def test_strange_etags_resume(site, tmp_path):
    site.headers, site.cut = {"ETag": '"caf\xe9"'}, 70_000
    with pytest.raises(DownloadError, match="are kept in"):
        download(site.address, tmp_path / "file.bin", attempts=1)
    site.cut = None
    assert download(site.address, tmp_path / "file.bin").read_bytes() == BODY
    assert site.ranges == [None, "bytes=65536-"]


@pytest.mark.hardening(
    area="downloads", tried="a partial file beside damaged notes of its version",
    outcome="goes on where there is a hash to check it by, else starts afresh",
)  # fmt: skip
@pytest.mark.parametrize("noted", [b"", b"a\r\nHost: evil", b"\0", b"\x85"])
@pytest.mark.parametrize("hashed", [True, False])
def test_damaged_notes(site, tmp_path, noted, hashed):
    (tmp_path / "file.bin.part").write_bytes(BODY[:1000])
    (tmp_path / "file.bin.part.etag").write_bytes(noted)
    download(site.address, tmp_path / "file.bin", sha256=SHA256 if hashed else None, attempts=1)
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert site.ranges == ["bytes=1000-" if hashed else None]


# Folders and disks


def saved_prompts():
    return PromptSet(context=torch.zeros(40, 512), classes=("cat", "dog"), model="demo-clip")


def write_store(path):
    with open_store(path, parameters={"n": 1}) as store:
        store.append("a", [{"x": 1}], seconds=0)


def write_card(path):
    run = start_run("01", "title")
    object.__setattr__(run, "folder", path)
    run.save_card(metrics=[], tables={}, model={}, dataset={}, prompts={})


WRITERS = {
    "download": lambda path: download("http://127.0.0.1:9/", path),
    "prompts": lambda path: saved_prompts().save(path),
    "store": write_store,
    "benchmark": lambda path: write_benchmark(path, ["phantom/chest"], n=2, image_size=28, corruptions=["contrast"]),
    "card": write_card,
    "text": lambda path: write_text_atomically(path, "text"),
}


@pytest.mark.hardening(
    area="disk and folders", tried="writing below something that is no folder: downloads, prompts, stores, sets, cards",
    outcome="a message that names the place; what is there stays",
)  # fmt: skip
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("below", ["a", "a/b"])
def test_places_that_cannot_be_made(tmp_path, name, below):
    (tmp_path / "place").write_text("a file")
    with pytest.raises((OSError, ValueError), match="place"):
        WRITERS[name](tmp_path / "place" / below)
    assert (tmp_path / "place").read_text() == "a file"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


# A process may not write a file larger than 20,000 bytes: what a full disk is to each writer.
FULL = (
    BESIDE_SCRIPTS
    + """
import json, resource, sys
from pathlib import Path
import numpy as np, torch
from medrobust_lib.corruptions.stored import write_npz
from preparing.downloads import download
from medrobust_lib.experiments import open_store
from medrobust_lib.smoothing.prompts import PromptSet
from preparing.archives import extract
folder, address = Path(sys.argv[1]), sys.argv[2]
prompts = lambda size: PromptSet(context=torch.zeros(size, 64), classes=("a",), model="demo-clip")
images = np.zeros((100, 28, 28, 3), np.uint8)
save = lambda n: write_npz(folder / "set.npz", [images[:n]], shape=images[:n].shape, labels=np.zeros(n, int),
                           members=("images", "labels"))
prompts(2).save(folder / "prompts.safetensors"); save(2)
store = open_store(folder / "store", parameters={})
store.append("a", [{"text": "x"}], seconds=0)
old = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
told = {}
for name, write in {
    "prompts.safetensors": lambda: prompts(400).save(folder / "prompts.safetensors"),
    "set.npz": lambda: save(100),
    "journal.jsonl": lambda: store.append("b", [{"text": "x" * 30_000}], seconds=0),
    "file.bin": lambda: download(address, folder / "file.bin", progress=False),
    "archive.zip": lambda: extract(folder.parent / "archive.zip", folder / "unpacked", progress=False),
}.items():
    try:
        write()
        told[name] = "written"
    except OSError as error:
        told[name] = str(error)
store.append("c", [{"text": "y"}], seconds=0)
store.close()
with open_store(folder / "store", parameters={}) as again:
    told["done"] = sorted(again.done)
new = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
told["changed"] = [name for name in old if new.get(name) != old[name]]
told["more"] = sorted(set(new) - set(old))
print(json.dumps(told))
"""
)


@pytest.mark.hardening(
    area="disk and folders", tried="no room while prompts, sets, journals, downloads and archives are written",
    outcome="a message that names the file; the old file is whole, the store goes on, the download can resume",
)  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="no limit for the size of files here")
def test_no_room(site, tmp_path, record_property):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.bin", np.random.default_rng(0).bytes(50_000))
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", FULL, str(tmp_path / "out"), site.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("done") == ["a", "c"]
    assert told.pop("changed") == ["journal.jsonl"]
    assert told.pop("more") == ["file.bin.part", "file.bin.part.etag"]
    assert len(told) == 5
    for name, message in told.items():
        assert name in message and "the system allows no larger file: " in message, (name, message)
    record_property("hardening_counts", {"writers": len(told)})
    assert download(site.address, tmp_path / "out" / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert site.ranges[-1].startswith("bytes=")

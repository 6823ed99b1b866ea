"""SIGINT and SIGKILL at moments that a test chooses: what is left goes on, to the result of an undisturbed run."""

import hashlib
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from medrobust_lib.corruptions.writing import write_benchmark
from preparing.corrupted_sets import check_benchmark
from preparing.downloads import CHUNK_BYTES, download

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="other signals there")
ROOT = Path(__file__).parents[2]
STUDY = ROOT / "tests" / "smoothing" / "test_table.py"
SMALL = {"n": 4, "image_size": 28, "corruptions": ["contrast", "gaussian_noise"], "severities": (1, 4)}

# The child stops itself, so that no clock decides when.
CERTIFY = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("study_tests", sys.argv[1])
module = sys.modules["study_tests"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from medrobust_lib.experiments import store
append, lines = store.RowStore.append, []
def counted(self, *arguments, **options):
    append(self, *arguments, **options)
    lines.append(1)
    if len(lines) == 5:
        os.kill(os.getpid(), signal.SIGINT)
store.RowStore.append = counted
module.killed_study(sys.argv[2])
"""


def child(code, *arguments):
    paths = f"{ROOT}{os.pathsep}{ROOT / 'data_scripts'}"
    environment = {**os.environ, "PYTHONPATH": paths, "MEDROBUST_HEADLESS": "1", "OMP_NUM_THREADS": "1"}
    # A shell's background jobs ignore SIGINT, and so would their children.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.hardening(
    area="interruption", tried="SIGINT during certify_dataset with a store",
    outcome="says what is done and that the same call goes on; the resumed table is the same, byte for byte",
)  # fmt: skip
def test_an_interrupted_certification(tmp_path):
    spec = importlib.util.spec_from_file_location("study_tests", STUDY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_tests"] = module
    spec.loader.exec_module(module)
    done = child(CERTIFY, STUDY, tmp_path / "stopped")
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    assert "stopped at 5 of 36 images" in done.stdout and "the same call goes on from here" in done.stdout
    assert (tmp_path / "stopped" / "journal.jsonl").read_bytes().count(b"\n") == 5
    resumed, whole = (module.killed_study(tmp_path / name) for name in ("stopped", "whole"))
    pd.testing.assert_frame_equal(resumed.drop(columns="seconds"), whole.drop(columns="seconds"))
    tables = [(tmp_path / name / "table.csv").read_bytes() for name in ("stopped", "whole")]
    assert tables[0] == tables[1]


WRITE = """
import json, os, signal, sys
from medrobust_lib.corruptions import stored
from medrobust_lib.corruptions.writing import write_benchmark
signals, chunks, whole = json.loads(sys.argv[3]), [], stored.np.ascontiguousarray
def counted(*arguments):
    chunks.append(1)
    if len(chunks) == signals["after"]:
        os.kill(os.getpid(), signals["signal"])
    return whole(*arguments)
class Module:
    def __getattr__(self, name):
        return counted if name == "ascontiguousarray" else getattr(np, name)
np = stored.np
stored.np = Module()
options = json.loads(sys.argv[2])
write_benchmark(sys.argv[1], ["phantom/chest"], **options)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "C"
    write_benchmark(folder, ["phantom/chest"], **SMALL)
    return folder


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "journal.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.hardening(
    area="interruption", tried="SIGKILL and SIGINT in the middle of a file of a corrupted benchmark",
    outcome="the same call writes what is missing; all files are the same, byte for byte",
)  # fmt: skip
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("after", [1, 5])
def test_a_stopped_benchmark(tmp_path, undisturbed, signal_, after):
    folder = tmp_path / "C"
    done = child(WRITE, folder, json.dumps(SMALL), json.dumps({"signal": int(signal_), "after": after}))
    assert done.returncode == (-signal.SIGKILL if signal_ == signal.SIGKILL else done.returncode) != 0, done.stderr
    assert contents(folder) != contents(undisturbed)
    write_benchmark(folder, ["phantom/chest"], **SMALL)
    assert contents(folder) == contents(undisturbed)
    assert set(check_benchmark(folder)["state"]) == {"whole"}


BODY = bytes(range(256)) * 2000
FETCH = """
import os, signal, sys
from preparing import downloads
real = downloads.bar_options
class Bar:
    count = 0
    def __init__(self, **_): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def update(self, size):
        Bar.count += 1
        if Bar.count == 3:
            os.kill(os.getpid(), int(sys.argv[3]))
downloads.tqdm = Bar
downloads.download(sys.argv[1], sys.argv[2])
"""


@pytest.mark.hardening(
    area="interruption", tried="SIGKILL and SIGINT during a download",
    outcome="the next call asks for the rest only; the file is whole and nothing else is left",
)  # fmt: skip
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_download(tmp_path, signal_):
    ranges = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
            self.send_header("ETag", '"v1"')
            self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            self.wfile.write(BODY[start:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, path = f"http://127.0.0.1:{server.server_port}/file.bin", tmp_path / "file.bin"
        done = child(FETCH, address, path, int(signal_))
        assert done.returncode != 0 and not path.exists()
        kept = (tmp_path / "file.bin.part").stat().st_size
        assert 0 < kept < len(BODY) and kept % CHUNK_BYTES == 0
        download(address, path, sha256=hashlib.sha256(BODY).hexdigest())
        server.shutdown()
    assert ranges == [None, f"bytes={kept}-"]
    assert path.read_bytes() == BODY and [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]

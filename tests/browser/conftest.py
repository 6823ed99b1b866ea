"""JupyterLab and a browser for the tests here: started once, always ended."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
_START_SECONDS = 90


def find_chromium():
    """Path of an installed Chromium or Chrome, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    return None


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab whose files are those of a folder."""

    folder: Path
    port: int
    token: str

    def url(self, name):
        """Address of a notebook, in a fresh workspace."""
        return f"http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}&reset"

    def ask(self, path, method="GET"):
        """JSON answer of the server's interface, None where it is empty."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or "null")

    def end_kernels(self):
        """Shut down every kernel, so that one notebook's memory is free for the next."""
        for session in self.ask("/api/sessions"):
            self.ask(f"/api/sessions/{session['id']}", method="DELETE")


@contextlib.contextmanager
def running_lab(folder):
    """Start JupyterLab on a free port of this computer, and end it with all its kernels."""
    private = folder / ".jupyter"
    settings = private / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Cells out of sight are drawn too; else the picture of an instrument further down would not exist.
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    news = private / "settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True})
    )
    token, port = secrets.token_hex(16), _free_port()
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(private / "config"),
        "JUPYTER_DATA_DIR": str(private / "data"),
        "JUPYTER_RUNTIME_DIR": str(private / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(private / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(private / "workspaces"),
        "IPYTHONDIR": str(private / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MEDROBUST_RUN_DIR": str(folder / "run"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True", "--allow-root",
    ]  # fmt: skip
    log = (private / "log.txt").open("w+")
    # A session of its own: the server's kernels end with it, whatever happens to them.
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    lab = Lab(folder, port, token)
    try:
        _wait_until_it_answers(lab, server, private / "log.txt")
        yield lab
    finally:
        with contextlib.suppress(OSError, ValueError):
            lab.end_kernels()
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_it_answers(lab, server, log):
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        try:
            lab.ask("/api/status")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(
        f"JupyterLab did not start within {_START_SECONDS} s; its log ends with\n{log.read_text()[-2000:]}"
    )


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; skips with the reason where it, or the library that steers it, is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    path = find_chromium()
    if path is None:
        pytest.skip("needs Chromium or Chrome: none of chromium, chromium-browser and google-chrome is installed")
    with api.sync_playwright() as steering:
        opened = steering.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        try:
            yield opened
        finally:
            opened.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """JupyterLab in an empty folder; nothing is started where there is no browser."""
    with running_lab(tmp_path_factory.mktemp("lab")) as server:
        yield server

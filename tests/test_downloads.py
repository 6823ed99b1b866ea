import hashlib
import http.server
import json
import re
import socket
import threading
from dataclasses import dataclass, field

import pytest

from medrobust_lib.files import DownloadError, check_sums, file_hash, file_sha256, read_sums
from preparing.downloads import CHUNK_BYTES, download, record_sums, zenodo_files

BODY = bytes(range(256)) * 500  # 128,000 bytes, so that a cut after 70,000 leaves one whole chunk
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


@dataclass
class Site:
    """What the local server does and what it was asked for."""

    body: bytes = BODY
    etag: str = '"v1"'
    ranges: bool = True
    cut_after: int | None = None  # close the connection of the next answer after that many bytes
    status: int = 200
    requests: list[str | None] = field(default_factory=list)  # the Range header of each request
    address: str = ""


def handler_of(site):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            site.requests.append(asked)
            if site.status != 200:
                self.send_error(site.status)
                return
            start = 0
            current = self.headers.get("If-Range") in (None, site.etag)
            if asked and site.ranges and current:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= len(site.body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(site.body)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(site.body) - 1}/{len(site.body)}")
            else:
                self.send_response(200)
            if site.etag:
                self.send_header("ETag", site.etag)
            self.send_header("Content-Length", str(len(site.body) - start))
            self.end_headers()
            answer = site.body[start:]
            if site.cut_after is not None:
                answer, site.cut_after = answer[: site.cut_after], None
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def site():
    site = Site()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(site))
    site.address = f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def closed_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/file.bin"


def test_hashes_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "abc", "md5") == "900150983cd24fb0d6963f7d28e17f72"


def test_download_verifies_and_leaves_nothing_else(site, tmp_path):
    path = download(site.address, tmp_path / "new" / "file.bin", sha256=SHA256, md5=MD5.upper())
    assert path.read_bytes() == BODY
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_a_file_that_is_there_is_not_fetched_again(site, tmp_path):
    for _ in range(2):
        download(site.address, tmp_path / "file.bin", sha256=SHA256)
    assert site.requests == [None]


@pytest.mark.hardening(
    area="downloads", tried="a connection that closes midway",
    outcome="goes on by itself where it stopped",
)  # fmt: skip
def test_an_interrupted_transfer_goes_on_by_itself(site, tmp_path):
    site.cut_after = 70_000
    assert download(site.address, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert site.requests == [None, f"bytes={CHUNK_BYTES}-"]


@pytest.mark.hardening(
    area="downloads", tried="a connection that closes midway, and another call",
    outcome="asks for the rest only",
)  # fmt: skip
def test_the_next_call_resumes(site, tmp_path):
    site.cut_after = 70_000
    with pytest.raises(DownloadError, match=r"cannot fetch http.*65536 bytes are kept in .*file\.bin\.part; run again"):
        download(site.address, tmp_path / "file.bin", attempts=1)
    assert not (tmp_path / "file.bin").exists()
    assert (tmp_path / "file.bin.part").read_bytes() == BODY[:CHUNK_BYTES]
    assert download(site.address, tmp_path / "file.bin").read_bytes() == BODY
    assert site.requests == [None, f"bytes={CHUNK_BYTES}-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.hardening(
    area="downloads", tried="a server that cannot resume",
    outcome="starts afresh",
)  # fmt: skip
def test_a_server_without_ranges_makes_it_start_afresh(site, tmp_path):
    site.ranges, site.cut_after = False, 70_000
    assert download(site.address, tmp_path / "file.bin").read_bytes() == BODY
    assert site.requests == [None, f"bytes={CHUNK_BYTES}-"]


def test_without_hash_or_version_a_partial_file_is_not_trusted(site, tmp_path):
    site.etag = ""
    (tmp_path / "file.bin.part").write_bytes(b"of another version")
    assert download(site.address, tmp_path / "file.bin").read_bytes() == BODY
    assert site.requests == [None]


@pytest.mark.hardening(
    area="downloads", tried="a remote file that changed between two calls",
    outcome="starts afresh; the two versions are never mixed",
)  # fmt: skip
def test_a_file_that_changed_meanwhile_starts_afresh(site, tmp_path):
    site.cut_after = 70_000
    with pytest.raises(DownloadError):
        download(site.address, tmp_path / "file.bin", attempts=1)
    site.body, site.etag = BODY[::-1], '"v2"'
    assert download(site.address, tmp_path / "file.bin").read_bytes() == BODY[::-1]


def test_a_part_that_was_complete_is_taken(site, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(BODY)
    assert download(site.address, tmp_path / "file.bin", md5=MD5).read_bytes() == BODY
    assert site.requests == [f"bytes={len(BODY)}-"]


@pytest.mark.hardening(
    area="downloads", tried="a partial file longer than the remote one",
    outcome="discarded, fetched afresh",
)  # fmt: skip
def test_a_part_that_is_too_long_is_discarded(site, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    assert download(site.address, tmp_path / "file.bin", md5=MD5).read_bytes() == BODY
    assert site.requests == [f"bytes={len(BODY) + 4}-", None]


@pytest.mark.hardening(
    area="downloads", tried="a file with a wrong hash, fetched or found",
    outcome="kept aside under another name, never used; both hashes named",
)  # fmt: skip
@pytest.mark.parametrize("already_there", [False, True])
def test_a_wrong_hash_is_kept_aside_and_named(site, tmp_path, already_there):
    path = tmp_path / "file.bin"
    if already_there:
        path.write_bytes(BODY)
    wanted = "0" * 64
    with pytest.raises(DownloadError, match=f"sha256 {SHA256}, expected {wanted}.*file.bin.wrong-hash"):
        download(site.address, path, sha256=wanted)
    assert not path.exists()
    assert (tmp_path / "file.bin.wrong-hash").read_bytes() == BODY
    assert not (tmp_path / "file.bin.part").exists()
    assert download(site.address, path, sha256=SHA256).read_bytes() == BODY


@pytest.mark.hardening(
    area="downloads", tried="no connection",
    outcome="a message with the address and the way by hand; nothing is left",
)  # fmt: skip
def test_no_connection_names_the_address_and_the_way_out(closed_address, tmp_path):
    with pytest.raises(
        DownloadError,
        match=r"cannot fetch http://127.0.0.1.*Check the network.*with a browser and save it as",
    ):
        download(closed_address, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_page_is_not_tried_again(site, tmp_path):
    site.status = 404
    with pytest.raises(DownloadError, match=r"file\.bin answered 404 Not Found\. Or fetch"):
        download(site.address, tmp_path / "file.bin")
    assert len(site.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_zenodo_files_reads_checksums(site, closed_address):
    entry = {
        "key": "pbc.zip",
        "size": 12,
        "checksum": f"md5:{MD5}",
        "links": {"self": "https://example.org/pbc.zip"},
    }
    site.body = json.dumps({"files": [entry]}).encode()
    files = zenodo_files(7, api=site.address)
    assert files["pbc.zip"].md5 == MD5
    assert files["pbc.zip"].url == "https://example.org/pbc.zip"
    site.body = b'{"message": "gone"}'
    with pytest.raises(DownloadError, match="did not answer with a Zenodo record"):
        zenodo_files(7, api=site.address)
    with pytest.raises(DownloadError, match=r"cannot read http://127.0.0.1.*Check the network"):
        zenodo_files(7, api=closed_address)


def test_recorded_sums_guard_later_loads(tmp_path):
    check_sums(tmp_path)  # nothing recorded yet: nothing to compare with
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "b.bin").write_bytes(b"b")
    record_sums(tmp_path, ["a.bin"])
    assert set(record_sums(tmp_path, ["b.bin"])) == {"a.bin", "b.bin"}
    assert read_sums(tmp_path)["a.bin"].startswith("ba7816bf")
    check_sums(tmp_path)
    (tmp_path / "b.bin").write_bytes(b"changed")
    check_sums(tmp_path, ["a.bin"])
    with pytest.raises(
        DownloadError, match=r"b\.bin is not the file that was fetched: SHA-256 \w{64}, recorded \w{64}"
    ):
        check_sums(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DownloadError, match=r"a\.bin is not the file that was fetched: SHA-256 no such file"):
        check_sums(tmp_path, ["a.bin"])

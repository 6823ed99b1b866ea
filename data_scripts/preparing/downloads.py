"""Fetch files so that what arrives is whole, verified and in its place, or is not there at all."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm.auto import tqdm

from medrobust_lib.files import (
    SUMS_NAME,
    DownloadError,
    file_hash,
    file_sha256,
    lock,
    named_when_full,
    read_sums,
    whole_file,
)

CHUNK_BYTES = 1 << 16  # at most this much is lost when a connection breaks
ZENODO_API = "https://zenodo.org/api/records/{record}"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Zenodo record: name, download address, size in bytes, MD5 in hexadecimal."""

    name: str
    url: str
    size: int
    md5: str


def bar_options(progress: bool) -> dict[str, bool]:
    """Options for a progress bar; an explicit `disable` would override the variable TQDM_DISABLE."""
    return {} if progress else {"disable": True}


def download(
    url: str,
    path: Path | str,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    progress: bool = True,
    attempts: int = 3,
    timeout: float = 30.0,
) -> Path:
    """Fetch `url` to `path`: resumable, verified, atomic.

    Bytes go to ``NAME.part`` and stay there when the connection breaks; the next attempt, or the next
    call, asks the server for the rest only (and starts afresh where the server cannot). The file takes
    its final name when it is complete and its hash is right, never before. One process at a time fetches it.

    Parameters
    ----------
    url : str
        http or https address.
    path : Path or str
        Final place of the file; missing folders are made.
    sha256, md5 : str, optional
        Expected digests in hexadecimal. A file that is already there is checked against them too.
    progress : bool
        Show a progress bar (the environment variable TQDM_DISABLE=1 hides it as well).
    attempts : int
        How often to connect before giving up, at least 1.
    timeout : float
        Seconds without a byte after which a connection counts as broken.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    DownloadError
        No connection, an HTTP error, a wrong hash, or another process that is fetching the file. A file with
        a wrong hash is kept aside as ``NAME.wrong-hash``; the error names both hashes.
    OSError
        The disk is full or not writable; what came is kept.
    """
    path = Path(path)
    expected = {name: digest.lower() for name, digest in (("sha256", sha256), ("md5", md5)) if digest}
    if path.exists():
        _verify(path, path, url, expected)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _claimed(part, path):
        if path.exists():  # another process has fetched it in between
            _verify(path, path, url, expected)
            return path
        for attempt in range(1, attempts + 1):
            try:
                with named_when_full(path, f"{path.name} is not complete; what came is kept in {part.name}"):
                    _transfer(url, part, hashed=bool(expected), progress=progress, timeout=timeout)
                break
            except requests.HTTPError as error:
                answer = f"{error.response.status_code} {error.response.reason}"
                raise DownloadError(f"{url} answered {answer}. {_by_hand(url, path)}") from error
            except (requests.RequestException, _IncompleteError) as error:
                if attempt == attempts:
                    size = part.stat().st_size
                    kept = f" {size} bytes are kept in {part}; run again to go on." if size else ""
                    raise DownloadError(
                        f"cannot fetch {url}: {error}.{kept} Check the network or the proxy settings and try "
                        f"again. {_by_hand(url, path)}"
                    ) from error
        _verify(part, path, url, expected)
        part.replace(path)
        _validator(part).unlink(missing_ok=True)
    return path


def zenodo_files(record: int, *, api: str = ZENODO_API, timeout: float = 30.0) -> dict[str, RemoteFile]:
    """Files of a Zenodo record by name, with the checksums that Zenodo publishes.

    Parameters
    ----------
    record : int
        Record number, for example 7884735.
    api : str
        Address pattern with ``{record}``.
    timeout : float
        Seconds to wait for an answer.

    Raises
    ------
    DownloadError
        Zenodo cannot be reached or answers something else than a record.
    """
    url = api.format(record=record)
    try:
        response = requests.get(url, timeout=timeout)
        response.raise_for_status()
        listed = response.json()["files"]
        found = [
            RemoteFile(
                entry["key"],
                entry["links"]["self"],
                int(entry["size"]),
                entry["checksum"].removeprefix("md5:"),
            )
            for entry in listed
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DownloadError(f"{url} did not answer with a Zenodo record: {error!r}") from error
    except (requests.RequestException, ValueError) as error:
        raise DownloadError(f"cannot read {url}: {error}. Check the network or the proxy settings.") from error
    return {file.name: file for file in found}


def record_sums(folder: Path | str, names: Collection[str]) -> dict[str, str]:
    """Add the SHA-256 of the named files of `folder` to its ``SHA256SUMS``; returns all of them."""
    folder = Path(folder)
    sums = read_sums(folder) | {name: file_sha256(folder / name) for name in names}
    with whole_file(folder / SUMS_NAME) as draft:
        draft.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")
    return sums


class _IncompleteError(RuntimeError):
    """The server closed the connection early."""


@contextmanager
def _claimed(part: Path, path: Path) -> Iterator[None]:
    """Keep other processes from the partial file; an empty one does not stay."""
    busy = f"another process is fetching {path}; wait until it is done, then run again"
    with part.open("ab") as stream:
        if not lock(stream.fileno()):
            raise DownloadError(busy)
        # Between opening and locking it may have got its final name, and must not be written to any more.
        if not (part.exists() and os.path.samestat(part.stat(), os.fstat(stream.fileno()))):
            raise DownloadError(busy)
        try:
            yield
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def _by_hand(url: str, path: Path) -> str:
    return f"Or fetch {url} with a browser and save it as {path}."


def _validator(part: Path) -> Path:
    """File that remembers which version of the remote file the partial download belongs to."""
    return part.with_name(part.name + ".etag")


def _verify(found: Path, path: Path, url: str, expected: dict[str, str]) -> None:
    for algorithm, digest in expected.items():
        actual = file_hash(found, algorithm)
        if actual != digest:
            aside = path.with_name(path.name + ".wrong-hash")
            found.replace(aside)
            raise DownloadError(
                f"{path.name} from {url} has {algorithm} {actual}, expected {digest}. The file is kept "
                f"aside as {aside} and is not used; run again to fetch it afresh."
            )


def _transfer(url: str, part: Path, *, hashed: bool, progress: bool, timeout: float) -> None:
    """Bring `part` to its full length, continuing it where that is safe."""
    validator = _validator(part)
    start = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    version = validator.read_text(encoding="latin-1") if validator.exists() else ""
    if start and version.isprintable() and version:
        # Without a hash, only the server can tell that the file has not changed in between.
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    elif start and hashed:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable and "Range" in headers:
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return  # the part was complete already
            os.truncate(part, 0)
            raise _IncompleteError("the partial file does not fit the remote file; it was discarded")
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            os.truncate(part, 0)
            raise _IncompleteError("the server sent another range than asked for; the partial file was discarded")
        start = start if resumed else 0
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            validator.write_text(etag, encoding="latin-1")  # as in HTTP
        elif not resumed:
            validator.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isascii() and length.isdigit() else None
        bar = tqdm(
            total=total,
            initial=start,
            desc=part.name.removesuffix(".part"),
            unit="B",
            unit_scale=True,
            **bar_options(progress),
        )
        with bar, part.open("ab" if resumed else "wb") as sink:
            for chunk in response.iter_content(CHUNK_BYTES):
                sink.write(chunk)
                bar.update(len(chunk))
    received = part.stat().st_size
    if total is not None and received != total:
        raise _IncompleteError(f"the connection closed after {received} of {total} bytes")

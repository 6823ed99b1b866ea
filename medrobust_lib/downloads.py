"""Fetch and unpack files so that what arrives is whole, verified and in its place, or is not there at all."""

import hashlib
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import requests
from tqdm.auto import tqdm

CHUNK_BYTES = 1 << 16  # at most this much is lost when a connection breaks
ZENODO_API = "https://zenodo.org/api/records/{record}"
SUMS_NAME = "SHA256SUMS"


class DownloadError(RuntimeError):
    """A file could not be fetched, verified or unpacked; the message says which, why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Zenodo record: name, download address, size in bytes, MD5 in hexadecimal."""

    name: str
    url: str
    size: int
    md5: str


def file_hash(path: Path | str, algorithm: str) -> str:
    """Hexadecimal digest of a file; `algorithm` as in `hashlib.new` ("sha256", "md5")."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def file_sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file."""
    return file_hash(path, "sha256")


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
    its final name when it is complete and its hash is right, never before.

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
        No connection, an HTTP error, or a wrong hash. A file with a wrong hash is kept aside as
        ``NAME.wrong-hash``; the error names both hashes.
    """
    path = Path(path)
    expected = {name: digest.lower() for name, digest in (("sha256", sha256), ("md5", md5)) if digest}
    if path.exists():
        _verify(path, path, url, expected)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, attempts + 1):
        try:
            _transfer(url, part, hashed=bool(expected), progress=progress, timeout=timeout)
            break
        except requests.HTTPError as error:
            answer = f"{error.response.status_code} {error.response.reason}"
            raise DownloadError(f"{url} answered {answer}. {_by_hand(url, path)}") from error
        except (requests.RequestException, _IncompleteError) as error:
            if attempt == attempts:
                kept = f" {part.stat().st_size} bytes are kept in {part}; run again to go on." if part.exists() else ""
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


def extract(
    archive: Path | str, folder: Path | str, *, members: Collection[str] | None = None, progress: bool = True
) -> list[Path]:
    """Unpack a zip or tar archive (also compressed) below `folder`, and nowhere else.

    Everything is unpacked into a hidden folder beside `folder` first. Only when all of it is there does
    it take its place: in one step if `folder` does not exist yet, else file by file, so that a file is
    never half written.

    Parameters
    ----------
    archive : Path or str
        The archive; its kind is told from its content, not from its name.
    folder : Path or str
        Where the members go, with the paths they have in the archive.
    members : collection of str, optional
        Names of the files to unpack; all files by default.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of Path
        The unpacked files, in the archive's order.

    Raises
    ------
    DownloadError
        Not an archive, a damaged one, a member asked for that is not in it, or a member that would land
        outside `folder` or is a link or a device: then nothing at all is unpacked.
    """
    archive, folder = Path(archive), Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        work = Path(scratch) / "content"
        work.mkdir()
        try:
            with _opened(archive) as entries:
                chosen = _select(archive, list(entries), members)
                names = [_safe_name(archive, entry) for entry in chosen]
                pairs = list(zip(chosen, names, strict=True))
                for entry, name in tqdm(pairs, desc=archive.name, unit="file", **_visible(progress)):
                    target = work / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with entry.open() as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's trouble (full, not writable), not the archive's
            raise DownloadError(f"{archive} is damaged: {error}. Delete it and fetch it again.") from error
        if not folder.exists():
            work.replace(folder)
        else:
            for name in dict.fromkeys(names):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).replace(folder / name)
    return [folder / name for name in names]


def read_sums(folder: Path | str) -> dict[str, str]:
    """SHA-256 by file name from ``SHA256SUMS`` of `folder` (sha256sum's format); empty where there is none."""
    path = Path(folder) / SUMS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = (line.split(maxsplit=1) for line in lines if line.strip())
    return {name.removeprefix("*"): digest for digest, name in rows}


def record_sums(folder: Path | str, names: Collection[str]) -> dict[str, str]:
    """Add the SHA-256 of the named files of `folder` to its ``SHA256SUMS``; returns all of them."""
    folder = Path(folder)
    sums = read_sums(folder) | {name: file_sha256(folder / name) for name in names}
    draft = folder / (SUMS_NAME + ".part")
    draft.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")
    draft.replace(folder / SUMS_NAME)
    return sums


def check_sums(folder: Path | str, names: Collection[str] | None = None) -> None:
    """Compare the files of `folder` with its ``SHA256SUMS``.

    Parameters
    ----------
    folder : Path or str
        A folder that `record_sums` has written to; nothing is checked where it has not.
    names : collection of str, optional
        Files to check; all recorded ones by default. A name without a record passes.

    Raises
    ------
    DownloadError
        A recorded file is missing or has changed since it was first fetched.
    """
    folder = Path(folder)
    for name, recorded in read_sums(folder).items():
        if names is not None and name not in names:
            continue
        path = folder / name
        found = file_sha256(path) if path.exists() else "no such file"
        if found != recorded:
            raise DownloadError(
                f"{path} is not the file that was fetched: SHA-256 {found}, recorded {recorded}. "
                f"Restore it, or delete it together with {folder / SUMS_NAME} and fetch it again."
            )


def _visible(progress: bool) -> dict[str, bool]:
    """Options for a progress bar; an explicit `disable` would override the variable TQDM_DISABLE."""
    return {} if progress else {"disable": True}


class _IncompleteError(RuntimeError):
    """The server closed the connection early."""


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
    if start and validator.exists():
        # Without a hash, only the server can tell that the file has not changed in between.
        headers |= {"Range": f"bytes={start}-", "If-Range": validator.read_text(encoding="utf-8")}
    elif start and hashed:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable and "Range" in headers:
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return  # the part was complete already
            part.unlink()
            raise _IncompleteError("the partial file does not fit the remote file; it was discarded")
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _IncompleteError("the server sent another range than asked for; the partial file was discarded")
        start = start if resumed else 0
        etag = response.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            validator.write_text(etag, encoding="utf-8")
        elif not resumed:
            validator.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        bar = tqdm(
            total=total,
            initial=start,
            desc=part.name.removesuffix(".part"),
            unit="B",
            unit_scale=True,
            **_visible(progress),
        )
        with bar, part.open("ab" if resumed else "wb") as sink:
            for chunk in response.iter_content(CHUNK_BYTES):
                sink.write(chunk)
                bar.update(len(chunk))
    received = part.stat().st_size
    if total is not None and received != total:
        raise _IncompleteError(f"the connection closed after {received} of {total} bytes")


@dataclass(frozen=True)
class _Entry:
    """A file in an archive, or what pretends to be one."""

    name: str
    is_plain: bool
    archive: zipfile.ZipFile | tarfile.TarFile
    info: zipfile.ZipInfo | tarfile.TarInfo

    def open(self) -> IO[bytes]:
        if isinstance(self.archive, zipfile.ZipFile):
            return self.archive.open(self.info)
        stream = self.archive.extractfile(self.info)
        if stream is None:
            raise tarfile.TarError(f"{self.name} cannot be read")
        return stream


@contextmanager
def _opened(archive: Path) -> Iterator[Iterator[_Entry]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield (
                _Entry(info.filename, not stat.S_ISLNK(info.external_attr >> 16), opened, info)
                for info in opened.infolist()
                if not info.is_dir()
            )
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            yield (_Entry(info.name, info.isfile(), opened, info) for info in opened if not info.isdir())
    else:
        raise DownloadError(f"{archive} is neither a zip nor a tar archive. Delete it and fetch it again.")


def _select(archive: Path, entries: list[_Entry], members: Collection[str] | None) -> list[_Entry]:
    if members is None:
        return entries
    names = [entry.name for entry in entries]
    for member in members:
        if member not in names:
            close = ", ".join(get_close_matches(member, names, n=3, cutoff=0.3)) or ", ".join(names[:5])
            raise DownloadError(f"{archive} has no file {member!r}; it has, for example: {close}")
    return [entry for entry in entries if entry.name in members]


def _safe_name(archive: Path, entry: _Entry) -> Path:
    """The member's relative path, or an error where unpacking it could touch anything outside the folder."""
    name = PurePosixPath(entry.name.replace("\\", "/"))
    escapes = name.is_absolute() or ".." in name.parts or PureWindowsPath(entry.name).drive != ""
    if escapes or not entry.is_plain or not name.parts:
        reason = "leads outside the folder" if escapes else "is not a plain file"
        raise DownloadError(f"{archive} is refused: its member {entry.name!r} {reason}. Nothing was unpacked.")
    return Path(*name.parts)

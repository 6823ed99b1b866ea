"""Unpack archives below one folder, and nowhere else."""

import errno
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from tqdm.auto import tqdm

from medrobust_lib.files import DownloadError, disk_full, named_when_full, size_text
from preparing.downloads import bar_options

# What the system says of a disk or of a missing archive, not what is wrong with an archive.
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}


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
                _check_space(archive, chosen, folder)
                pairs = list(zip(chosen, names, strict=True))
                for entry, name in tqdm(pairs, desc=archive.name, unit="file", **bar_options(progress)):
                    target = work / name
                    with named_when_full(folder, f"{archive} could not be unpacked, and nothing of it was"):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with entry.open() as source, target.open("wb") as sink:
                            shutil.copyfileobj(source, sink)
        except DownloadError:
            raise
        except Exception as error:  # Damaged bytes make the readers of archives raise anything.
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise  # the disk's trouble (full, not writable), not the archive's
            raise DownloadError(f"{archive} is damaged: {error}. Delete it and fetch it again.") from error
        if not folder.exists():
            work.replace(folder)
        else:
            for name in dict.fromkeys(names):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).replace(folder / name)
    return [folder / name for name in names]


@dataclass(frozen=True)
class _Entry:
    """A file in an archive, or what pretends to be one."""

    name: str
    size: int
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
                _Entry(info.filename, info.file_size, _is_plain(info), opened, info)
                for info in opened.infolist()
                if not info.is_dir()
            )
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            yield (_Entry(info.name, info.size, info.isfile(), opened, info) for info in opened if not info.isdir())
    else:
        raise DownloadError(f"{archive} is neither a zip nor a tar archive. Delete it and fetch it again.")


def _is_plain(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)
    return kind in (0, stat.S_IFREG)  # 0: made on a system without such kinds


def _check_space(archive: Path, entries: list[_Entry], folder: Path) -> None:
    """Notice before unpacking that the members are larger than the disk; more than they state never comes."""
    size = sum(entry.size for entry in entries)
    if size > shutil.disk_usage(folder.parent).free:
        raise disk_full(folder, f"{archive} unpacks to {size_text(size)}")


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

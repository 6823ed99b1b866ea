"""Files read with errors that name them, and written whole or not at all; tensor files and checksums among them."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from torch import Tensor


SUMS_NAME = "SHA256SUMS"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_SHOWN_CHARACTERS = 300  # of a parser's own message
_WORDS = tomllib.loads(files("medrobust_lib").joinpath("remedies.toml").read_text(encoding="utf-8"))
# Stands for "?" while YAML reads, which would not have it in a list or mapping. Unicode's last noncharacter is no text.
_QUESTION_MARK = "\U0010ffff"
_REMEDIES = {getattr(errno, name): words for name, words in _WORDS.items()}


class DownloadError(RuntimeError):
    """A file could not be fetched, verified or unpacked; the message says which, why and what to do."""


@contextmanager
def parsed(says: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a parser trips over in the block into a ValueError that names the file.

    Parameters
    ----------
    says : str
        Begin of the message, with the file's name: "``says``: reason. ``advice``".
    advice : str
        A sentence.

    Raises
    ------
    ValueError
        Instead of any exception, but for those of the system that name a file, such as FileNotFoundError.
    """
    try:
        yield
    except Exception as error:  # Damaged bytes raise anything: IndexError, KeyError, RecursionError, a library's own.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        short = reason if len(reason) <= _SHOWN_CHARACTERS else f"{reason[:_SHOWN_CHARACTERS]}..."
        raise ValueError(f"{says}: {short}. {advice}".rstrip()) from error


def read_json_object(path: Path, kind: str, advice: str = "") -> dict[str, Any]:
    """Read a JSON file whose value is an object.

    Parameters
    ----------
    path : Path
    kind : str
        What the file should be, for the message.
    advice : str
        As in `parsed`.

    Raises
    ------
    OSError
        As from the system, for example FileNotFoundError.
    ValueError
        Not UTF-8, not JSON, nested too deep, or another value than an object.
    """
    with parsed(f"{path} is not {kind}", advice):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not an object")
    return content


def inside(folder: Path, name: str, *, source: Path) -> Path:
    """Path of a file that a table or a manifest names, which must lie below the folder.

    Parameters
    ----------
    folder : Path
    name : str
        Relative, with forward or backward slashes.
    source : Path
        Where the name was read, for the message.

    Raises
    ------
    ValueError
        The name is absolute, leads out of the folder (also through a link) or is no path at all.
    """
    try:
        path = folder / name
        within = ".." not in name.replace("\\", "/").split("/") and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: {name!r} is no path: {error}") from error
    if not within or not name.strip():
        raise ValueError(f"{source}: {name!r} does not name a file inside {folder}")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a hidden name to write to; it becomes `path` when the block ends well and is removed when not.

    What is no file, such as a pipe or ``/dev/stdout``, is given itself: it cannot be replaced.

    Raises
    ------
    OSError
        The disk is full (`errno.ENOSPC`), or what else the system says; the file that was there stays.
    """
    replaced = not path.exists() or path.is_file() or path.is_dir()
    part = path.with_name(f".{path.name}.{os.getpid()}.part") if replaced else path
    try:
        with named_when_full(path, f"{path.name} could not be written and nothing of it was kept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            if replaced:
                part.replace(path)
    except OSError as error:
        if error.filename == str(part):  # nobody knows the hidden name
            error.filename = str(path)
        raise
    finally:
        if replaced:
            with suppress(OSError):  # the first error is told, not that of tidying up
                part.unlink()


@contextmanager
def named_when_full(path: Path, what: str) -> Iterator[None]:
    """Say which file the system's error is about where it does not, and what became of one that did not fit."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason = "the system allows no larger file" if error.errno == errno.EFBIG else "the disk is full"
            raise disk_full(path, f"{reason}: {what}") from error
        if error.errno in _REMEDIES and error.filename is None:  # not those of a network, which have no place
            error.filename = str(path)
        raise


def disk_full(path: Path, message: str) -> OSError:
    """The error of a full disk: what happened, what is free, what to do."""
    path = path.absolute()
    folder = next(place for place in (path, *path.parents) if place.is_dir())
    free = shutil.disk_usage(folder).free
    advice = f"{_REMEDIES[errno.ENOSPC]}, then repeat the call"
    return OSError(errno.ENOSPC, f"{message}; {size_text(free)} are free: {advice}", str(path))


def told(error: Exception) -> str:
    """An error in words: of one of the system the path, what the system says, what helps.

    One that a library or this project has raised in words of its own keeps them.
    """
    if not isinstance(error, OSError):
        return str(error)
    words = error.strerror
    if error.errno is None or not words:
        return str(error)
    if words == os.strerror(error.errno) and error.errno in _REMEDIES:
        words = f"{words[0].lower()}{words[1:]}; {_REMEDIES[error.errno]}"
    place = error.filename if error.filename2 is None else error.filename2
    return words if place is None else f"{os.fsdecode(place) if isinstance(place, bytes) else place}: {words}"


@contextmanager
def reported_errors() -> Iterator[None]:
    """End a command in one line on standard error, with exit code 1 where a user can mend it and 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        print("stopped; what is whole is kept, and the same command makes what is missing", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: a download, a store in use
        import typer

        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {told(error)}", err=True)
        raise SystemExit(1) from error


def size_text(size: float) -> str:
    """Bytes for people, in decimal units as file managers count them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def lock(descriptor: int) -> bool:
    """Lock an open file for this process until it is closed; False where another has it.

    True as well where the system or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return True


def file_hash(path: Path | str, algorithm: str) -> str:
    """Hexadecimal digest of a file; `algorithm` as in `hashlib.new` ("sha256", "md5")."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def file_sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file."""
    return file_hash(path, "sha256")


def read_sums(folder: Path | str) -> dict[str, str]:
    """SHA-256 by file name from ``SHA256SUMS`` of `folder` (sha256sum's format); empty where there is none.

    Raises
    ------
    ValueError
        The file is damaged, or a name in it leads out of the folder.
    """
    path = Path(folder) / SUMS_NAME
    if not path.exists():
        return {}
    with parsed(f"{path} is no list of SHA-256 and file names", "Delete it and fetch the files again."):
        rows = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        sums = {name.removeprefix("*"): digest for digest, name in rows}
    for name in sums:
        inside(Path(folder), name, source=path)
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


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], *, key: str, header: Mapping[str, Any]) -> None:
    """Write tensors, with a JSON header in the same file so that it can never belong to others.

    Raises
    ------
    OSError
        The file could not be written; the one that was there stays.
    """
    with whole_file(path) as part:
        save_tensors(part, tensors, metadata={key: json.dumps(dict(header))})


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in place, readable by anyone as other files are.

    Raises
    ------
    OSError
        It could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # deferred: it loads torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # its own words for the system's errors, without the file
        refused = re.search(r"os error (\d+)", str(error))
        if refused is None:
            raise OSError(f"{path} could not be written: {error}") from error
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from error
    path.chmod(0o644)  # safetensors writes for the owner only


def read_tensors(path: Path, *, key: str, kind: str, advice: str) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Tensors and JSON header of a file that `write_tensors` wrote; the header is empty where it has another key.

    Raises
    ------
    ValueError
        The file is damaged; it is named, as in `medrobust_lib.files.parsed`.
    """
    from safetensors import safe_open

    with parsed(f"{path} is not {kind}", advice), safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(key, "{}"))
        if not isinstance(header, dict):
            raise TypeError(f"its header {key!r} is no object")
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - it is no mapping


class _TextLoader(yaml.SafeLoader):
    """Leaves every scalar as it is written, and refuses a key given twice, of which YAML would drop one in silence."""

    # By YAML 1.1 yes is true, 010 is eight, 1:30 is ninety and 1e2 is no number.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        return super().construct_scalar(node).replace(_QUESTION_MARK, "?")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(source: Path | str, *, says: str = "") -> Any:
    """Read YAML without types: every scalar is the text that is written, and `typed` makes a number of it.

    A question mark is text, too: keys after "? " are not read.

    Parameters
    ----------
    source : Path or str
        A file in UTF-8, or the YAML itself.
    says : str
        Begin of the message for a text, in place of the file's name.

    Raises
    ------
    ValueError
        No valid YAML, or a key given twice.
    OSError
        As from the system, for example FileNotFoundError.
    """
    with parsed(f"{says or source} is no valid YAML", "Put text that holds ': ', ' #' or brackets in quotes."):
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        try:
            return yaml.load(text.replace("?", _QUESTION_MARK), Loader=_TextLoader)
        except yaml.YAMLError as error:
            raise ValueError(str(error).replace(_QUESTION_MARK, "?")) from error

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medrobust_lib.files import inside, lock, parsed, read_json_object, reported_errors, size_text, told, whole_file


def test_sizes_are_readable():
    assert [size_text(size) for size in (5, 12_345, 17_700_000, 31e9)] == ["5 B", "12.3 kB", "17.7 MB", "31.0 GB"]


@pytest.mark.parametrize(
    "error", [IndexError("out of range."), RecursionError(), KeyError("tasks"), OSError("no seek")]
)
def test_whatever_a_parser_raises_names_the_file(error):
    with (
        pytest.raises(ValueError, match=r"^a\.yaml is no list: \S.*\. Mend it\.$"),
        parsed("a.yaml is no list", "Mend it."),
    ):
        raise error


def test_what_the_system_says_about_a_file_stays(tmp_path):
    with pytest.raises(FileNotFoundError), parsed("a.yaml is no list"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(KeyboardInterrupt), parsed("a.yaml is no list"):
        raise KeyboardInterrupt


def test_long_reasons_are_cut():
    with pytest.raises(ValueError) as caught, parsed("a"):
        raise ValueError("x" * 10_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"{", b"[" * 100_000, b'{"a": 1} more'])
def test_json_that_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not a card: .* Delete it\."):
        read_json_object(path, "a card", "Delete it.")
    path.write_text(json.dumps({"a": 1}))
    assert read_json_object(path, "a card") == {"a": 1}


@pytest.mark.parametrize("name", ["../b", "a/../../b", "/etc/passwd", "a\\..\\..\\b", "", " ", "a\0b", "link/b"])
def test_names_that_leave_a_folder_are_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"table\.csv: .* (is no path|does not name a file inside)"):
        inside(tmp_path / "folder", name, source=tmp_path / "table.csv")
    assert inside(tmp_path / "folder", "a/b.c", source=tmp_path) == tmp_path / "folder" / "a" / "b.c"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as part:
        part.write_text("old")
        assert not path.exists()
    with (
        pytest.raises(OSError, match=r"disk is full: a\.txt could not be written .* are free"),
        whole_file(path) as part,
    ):
        part.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), whole_file(tmp_path / "file" / "a.txt"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_device_is_written_to_and_not_replaced(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "null").symlink_to("/dev/null")
    with whole_file(tmp_path / "null") as part:
        part.write_text("gone")
    with pytest.raises(OSError, match="disk is full: full could not"), whole_file(tmp_path / "full") as part:
        part.write_text("no room")
    assert {path.name: path.is_symlink() for path in tmp_path.iterdir()} == {"full": True, "null": True}


def test_the_hidden_name_of_a_file_in_the_making_is_not_told(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, whole_file(tmp_path / "folder") as part:
        part.write_text("text")
    assert told(caught.value) == f"{tmp_path / 'folder'}: is a directory; name a file"
    path = tmp_path / "a.txt"
    with pytest.raises(PermissionError) as caught, whole_file(path) as part:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(part))
    assert told(caught.value).startswith(f"{path}: permission denied; change its permissions, or name another place")


def refused(number, *names):
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (refused(errno.EROFS, "/a"), "/a: read-only file system; name another place, in which you may write"),
        (refused(errno.EDQUOT, "/a"),
         "/a: disk quota exceeded; free some of your quota, or name a folder on another disk"),
        (refused(errno.EMFILE, b"/a"),
         "/a: too many open files; allow more, for example with `ulimit -n 4096`, or start fewer jobs at a time"),
        (refused(errno.ENOSPC), "no space left on device; free some, or name a folder on another disk"),
        (refused(errno.EXDEV, "/a", None, "/b"), f"/b: {os.strerror(errno.EXDEV)}"),
        (refused(errno.EXDEV, "/a"), f"/a: {os.strerror(errno.EXDEV)}"),
        (OSError(errno.ENOENT, "no such study; write one", "/a"), "/a: no such study; write one"),
        (FileNotFoundError("no weights; fetch them with\n    a command"), "no weights; fetch them with\n    a command"),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_told_with_the_path_and_what_helps(error, line):
    assert told(error) == line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            refused(errno.EROFS, "/a"),
            1,
            "error: /a: read-only file system; name another place, in which you may write\n",
        ),
        (ValueError("n=0: give 1"), 1, "error: n=0: give 1\n"),
        (KeyboardInterrupt(), 130, "stopped; what is whole is kept, and the same command makes what is missing\n"),
    ],
)
def test_a_command_ends_in_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as stopped, reported_errors():
        raise error
    assert (stopped.value.code, capsys.readouterr().err) == (code, line)


def test_one_process_at_a_time_has_a_lock(tmp_path):
    code = "import sys; from medrobust_lib.files import lock; f = open(sys.argv[1], 'ab'); print(lock(f.fileno()))"
    path = tmp_path / "a"
    with path.open("ab") as stream:
        assert lock(stream.fileno())
        other = [sys.executable, "-c", code, str(path)]
        assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == "False\n"
    assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == "True\n"

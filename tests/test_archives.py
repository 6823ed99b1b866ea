import io
import re
import stat
import tarfile
import zipfile

import pytest

from medrobust_lib.files import DownloadError
from preparing.archives import extract


def make_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_extract_unpacks_all_or_the_chosen_members(tmp_path, make):
    archive = make(tmp_path / "archive", {"set/a.txt": b"a", "set/b/c.txt": b"c"})
    assert extract(archive, tmp_path / "all") == [tmp_path / "all/set/a.txt", tmp_path / "all/set/b/c.txt"]
    assert (tmp_path / "all/set/b/c.txt").read_bytes() == b"c"
    assert extract(archive, tmp_path / "one", members=["set/a.txt"]) == [tmp_path / "one/set/a.txt"]
    assert not (tmp_path / "one/set/b").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"archive", "all", "one"}


def test_extract_adds_to_a_folder_that_exists(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("mine")
    extract(make_zip(tmp_path / "a.zip", {"theirs.txt": b"theirs"}), tmp_path / "kept")
    assert {entry.name for entry in (tmp_path / "kept").iterdir()} == {"mine.txt", "theirs.txt"}


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    "name", ["../evil.txt", "fine/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil.txt"]
)
def test_a_member_that_leads_outside_is_refused(tmp_path, make, name):
    archive = make(tmp_path / "archive", {"fine.txt": b"fine", name: b"evil"})
    with pytest.raises(DownloadError, match=f"refused: its member {re.escape(repr(name))} leads outside"):
        extract(archive, tmp_path / "deep/folder")
    assert not list(tmp_path.rglob("*.txt"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DownloadError, match="its member 'link' is not a plain file"):
        extract(tmp_path / "a.tar", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    make_zip(tmp_path / "a.zip", {info: b"/etc/passwd"})
    with pytest.raises(DownloadError, match="its member 'link' is not a plain file"):
        extract(tmp_path / "a.zip", tmp_path / "folder")


def test_a_damaged_archive_leaves_nothing(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"first.txt": b"fine", "second.txt": b"content " * 20})
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"content content", b"c0ntent content", 1))
    with pytest.raises(DownloadError, match=r"a\.zip is damaged: .*second\.txt.*Delete it and fetch it again"):
        extract(archive, tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]
    archive.write_bytes(b"no archive at all")
    with pytest.raises(DownloadError, match="is neither a zip nor a tar archive"):
        extract(archive, tmp_path / "folder")


def test_a_member_that_is_not_there_names_the_closest(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"pytorch_model.bin": b"", "README": b""})
    with pytest.raises(
        DownloadError, match=r"has no file 'pytorch_modell\.bin'; it has, for example: pytorch_model\.bin"
    ):
        extract(archive, tmp_path / "folder", members=["pytorch_modell.bin"])

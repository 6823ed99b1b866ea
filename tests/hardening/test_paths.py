"""No name in an archive, a table or a manifest reaches a file outside its folder."""

import importlib.util
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medrobust_lib.corruptions.stored import set_folder
from medrobust_lib.data.own_images import class_folder_split, csv_split
from medrobust_lib.files import DownloadError, check_sums
from preparing.archives import extract
from preparing.corrupted_sets import check_benchmark
from preparing.folders import StagedDataset

spec = importlib.util.spec_from_file_location("spoiling", Path(__file__).with_name("spoiling.py"))
spoiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(spoiling)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


# Archives


def packed(kind, members):
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.hardening(
    area="damaged files", tried="zip and tar archives",
    outcome="unpacked below the folder, or refused with the archive named and nothing unpacked",
)  # fmt: skip
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives(tmp_path, judge, kind):
    whole = packed(kind, {"set/a.txt": b"one" * 50, "set/b/c.txt": b"two", "d.txt": b""})
    archive = tmp_path / "in" / "archive.bin"
    archive.parent.mkdir()
    numbers = iter(range(10**6))

    @spoiling.fuzz
    @given(spoiling.damages())
    def run(changes):
        archive.write_bytes(spoiling.damaged(whole, changes))
        target = tmp_path / "out" / str(next(numbers))

        def read():
            try:
                return extract(archive, target)
            except DownloadError as error:
                assert not target.exists()
                raise ValueError(str(error)) from error

        paths = judge(archive, read)
        assert all(path.is_relative_to(target) for path in paths or [])
        assert {path.name for path in (tmp_path / "out").iterdir()} <= {str(n) for n in range(next(numbers))}

    run()
    assert listing(tmp_path / "in") == ["archive.bin"]


HOSTILE_NAMES = [
    "../evil", "a/../../evil", "/evil", "//evil", "..\\evil", "a\\..\\..\\evil", "C:\\evil", "C:evil",
    "\\\\server\\share\\evil", "a/../..", "..", "./../evil", "a//../../evil",
]  # fmt: skip


@pytest.mark.hardening(
    area="paths and names", tried="archive members with parent folders, absolute names, drives and backslashes",
    outcome="refused, member named, nothing unpacked",
)  # fmt: skip
@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_members_that_lead_outside(tmp_path, kind, name):
    archive = tmp_path / "a.bin"
    archive.write_bytes(packed(kind, {"fine": b"1", name: b"evil"}))
    with pytest.raises(DownloadError, match=r"a\.bin is refused: its member .* Nothing was unpacked"):
        extract(archive, tmp_path / "deep" / "folder")
    assert [name for name in listing(tmp_path) if name not in ("a.bin", "deep")] == []


@pytest.mark.hardening(
    area="paths and names", tried="links, pipes, sockets and devices in zip and tar, and files written through a link",
    outcome="refused, member named, nothing unpacked",
)  # fmt: skip
@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
        *(stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK),
    ],
)
def test_members_that_are_no_files(tmp_path, kind):
    archive = tmp_path / "a.bin"
    if isinstance(kind, int):
        info = zipfile.ZipInfo("link")
        info.external_attr = (kind | 0o777) << 16
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr(info, str(tmp_path))
            opened.writestr("link/evil", "evil")
    else:
        with tarfile.open(archive, "w") as opened:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, str(tmp_path)
            opened.addfile(info)
            opened.addfile(tarfile.TarInfo("link/evil"))
    with pytest.raises(DownloadError, match=r"a\.bin is refused: its member 'link' is not a plain file"):
        extract(archive, tmp_path / "folder")
    assert listing(tmp_path) == ["a.bin"]


@pytest.mark.hardening(
    area="paths and names", tried="archives with files for folders, names too long, encryption, NUL bytes",
    outcome="refused, archive named, nothing unpacked",
)  # fmt: skip
@pytest.mark.parametrize(
    "content",
    [
        packed("zip", {"a": b"1", "a/b": b"2"}),
        packed("tar", {"a": b"1", "a/b": b"2"}),
        packed("zip", {"n" * 300: b"1"}),
        packed("tar", {"n" * 300: b"1"}),
        packed("zip", {"a": b"1"}).replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0"),
        packed("zip", {"a": b"1"}).replace(b"PK\x01\x02\x14\x03\x14\0\0\0\x08", b"PK\x01\x02\x14\x03\x14\0\0\0\x63"),
        packed("tar", {"a\0b" + "c" * 200: b"1"})[:-20],
    ],
)
def test_archives_that_cannot_be_unpacked(tmp_path, content):
    archive = tmp_path / "a.bin"
    archive.write_bytes(content)
    with pytest.raises(DownloadError, match=r"a\.bin"):
        extract(archive, tmp_path / "folder")
    assert listing(tmp_path) == ["a.bin"]


@pytest.mark.hardening(
    area="disk and folders", tried="an archive that unpacks to more than the disk has free (a decompression bomb)",
    outcome="refused before unpacking, with both sizes",
)  # fmt: skip
def test_bombs(tmp_path, monkeypatch):
    archive = tmp_path / "a.zip"
    archive.write_bytes(packed("zip", {"zeros": bytes(5_000_000)}))
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 10**6})
    )
    with pytest.raises(OSError, match=r"a\.zip unpacks to 5 MB; 1.* MB are free"):
        extract(archive, tmp_path / "folder")
    assert listing(tmp_path) == ["a.zip"]


# Tables, folders, manifests


@pytest.mark.hardening(
    area="paths and names", tried="CSV rows with parent folders, and with links that lead outside",
    outcome="refused, line named",
)  # fmt: skip
@pytest.mark.parametrize("written", ["../secret.png", "a/../../secret.png", "link/secret.png", "link.png"])
def test_relative_rows_stay_inside(tmp_path, written):
    image(tmp_path / "secret.png")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a").mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "t.csv").write_text(f"path,label\n{written},x\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 2: .* leaves the folder of the CSV; move the file inside or"):
        csv_split(folder / "t.csv", "test")


@pytest.mark.hardening(
    area="paths and names", tried="links among class folders, to files, folders, nothing or themselves; pipes",
    outcome="decided: links to images are followed, the rest is left out; nothing waits",
)  # fmt: skip
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_links_in_class_folders(tmp_path):
    image(tmp_path / "elsewhere" / "b.png")
    folder = tmp_path / "set" / "cat"
    image(folder / "a.png")
    (folder / "linked.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (folder / "broken.png").symlink_to(tmp_path / "nothing.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    split = class_folder_split(tmp_path / "set", "test")
    assert split.codes == ("cat", "dog")
    assert split.labels.tolist() == [0, 0, 1]
    assert len(list(split.read(np.arange(3)))) == 3


@pytest.mark.hardening(
    area="paths and names", tried="names from tables of downloads that lead out of the prepared set",
    outcome="refused, name shown, nothing written",
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["..", ".", "", "../x", "/x", "a\\b", "C:x", "a\0b"])
def test_prepared_sets_stay_inside(tmp_path, place, name):
    staged = StagedDataset("chest/covid", tmp_path / "new")
    names = ["train", "covid", "a.png"]
    names[place] = name
    with pytest.raises(ValueError, match="chest/covid: .* cannot be the name of a file or folder"):
        staged.add(*names, np.zeros((2, 2, 3), np.uint8))
    assert listing(tmp_path) == []


@pytest.mark.hardening(
    area="paths and names", tried="recorded sums and manifests of corrupted sets that name files elsewhere",
    outcome="refused, manifest named, nothing read",
)  # fmt: skip
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret"])
def test_manifests_stay_inside(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "C"
    folder.mkdir()
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match="SHA256SUMS"):
        check_sums(folder)
    (folder / "manifest.json").write_text(
        '{"parameters": {"kind": "corrupted sets", "layout": "per-severity", "suite": {"id": "x"}, "seed": 0}}'
    )
    (folder / "table.csv").write_text(f"file,bytes,sha256\n{name},6,{'0' * 64}\n")
    with pytest.raises(ValueError, match=r"table\.csv is no table of corrupted sets"):
        check_benchmark(folder)


@pytest.mark.hardening(
    area="paths and names", tried="folder names made of any data set id",
    outcome="one folder below the collection, never a parent, never hidden by a slash",
)  # fmt: skip
def test_folder_names_of_ids():
    @spoiling.fuzz
    @given(st.text(alphabet=st.sampled_from("./\\:ab\0é|<>\n "), min_size=1, max_size=8))
    def run(id):
        name = set_folder(f"folder:{id}")
        assert not set(name) & set('/\\:\0\n<>|"') and name not in ("", ".", "..")

    run()

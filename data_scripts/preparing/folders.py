"""From a public download to class folders: what the scripts in data_scripts share.

A prepared set is ``ROOT/ID/images/{train,val,test}/CLASS/FILE`` with a ``manifest.json`` beside ``images``
that says where the files come from, how they were split and how many there are. It is built in a hidden
folder and takes its place only when it is whole.
"""

import hashlib
import inspect
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from medrobust_lib.data.wording import class_wording
from medrobust_lib.files import DownloadError, file_hash, named_when_full, parsed
from preparing.downloads import download

MANIFEST_NAME = "manifest.json"
NUCLEUS_CHANNELS = 5  # PanNuke: neoplastic, inflammatory, connective, dead, epithelial; then the background
NEOPLASTIC = 0


@dataclass(frozen=True)
class Origin:
    """Where a set comes from; copied into its manifest.

    Attributes
    ----------
    source : str
        Address of the data set's page.
    licence, citation : str
        The owner's terms and the publication to cite.
    split : str
        In words, how train and test were told apart.
    seed : int or None
        Seed of the split; None for a split made by the owner.
    """

    source: str
    licence: str
    citation: str
    split: str
    seed: int | None = None


@dataclass(frozen=True)
class StagedDataset:
    """A set in the making.

    Attributes
    ----------
    dataset_id : str
        Registry id, for example ``pathology/kather``.
    folder : Path
        Hidden folder that becomes ``ROOT/ID``.
    facts : dict
        JSON values for the manifest: hashes of the sources, what was left out, options.
    """

    dataset_id: str
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> Path:
        """Folder of the splits."""
        return self.folder / "images"

    def add(self, split: str, class_name: str, name: str, content: Path | NDArray[np.uint8]) -> None:
        """Put one image in its place.

        Parameters
        ----------
        split, class_name, name : str
            Names of the two folders and of the file.
        content : Path or uint8 [H, W, 3]
            A file to copy as it is, or pixels to write (PNG; gray where the three channels agree).

        Raises
        ------
        ValueError
            An image of that name is there already, or a name is not that of one file or folder: names come from
            tables and must not lead elsewhere.
        """
        for part in (split, class_name, name):
            if part in ("", ".", "..") or set(part) & set("/\\:\0"):
                raise ValueError(f"{self.dataset_id}: {part!r} cannot be the name of a file or folder")
        target = self.images / split / class_name / name
        if target.exists():
            raise ValueError(f"two images of {self.dataset_id} would be called {split}/{class_name}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
            return
        gray = (content == content[..., :1]).all()
        Image.fromarray(content[..., 0] if gray else content).save(target)


@contextmanager
def staged_dataset(dataset_id: str, *, root: Path, origin: Origin, overwrite: bool) -> Iterator[StagedDataset]:
    """Build a set aside; on leaving the block without an error it is checked and moved to ``ROOT/ID``.

    Parameters
    ----------
    dataset_id : str
        Registry id with an entry in classes.json.
    root : Path
        Data root.
    origin : Origin
        For the manifest.
    overwrite : bool
        Replace a set that is there already, once the new one is whole.

    Raises
    ------
    FileExistsError
        The set is there already and `overwrite` is False.
    ValueError
        A class folder that the set does not know, or a class without images in train or test.
    """
    final = root / dataset_id
    if (final / MANIFEST_NAME).exists() and not overwrite:
        raise FileExistsError(f"{final} is prepared already; pass --overwrite to build it anew")
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists but was not made by this script; move it away or pass --overwrite")
    final.parent.mkdir(parents=True, exist_ok=True)
    full = named_when_full(final, "the set could not be built and nothing of it was kept")
    with full, tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as scratch:
        staged = StagedDataset(dataset_id, Path(scratch) / "new")
        staged.images.mkdir(parents=True)
        yield staged
        manifest = {"dataset": dataset_id, **vars(origin), "counts": class_counts(dataset_id, staged.images)}
        text = json.dumps(manifest | staged.facts, indent=2, ensure_ascii=False)
        (staged.folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        if final.exists():
            final.replace(Path(scratch) / "old")
        staged.folder.replace(final)


def class_counts(dataset_id: str, images: Path) -> dict[str, dict[str, int]]:
    """Images per split and class folder of a prepared set.

    Raises
    ------
    ValueError
        A class folder that classes.json does not know for this set, or a class without images in train
        or test.
    """
    wording = class_wording(dataset_id)
    counts: dict[str, dict[str, int]] = {}
    for split in sorted(path for path in images.iterdir() if path.is_dir()):
        folders = sorted(path for path in split.iterdir() if path.is_dir())
        counts[split.name] = {path.name: sum(1 for _ in path.iterdir()) for path in folders}
        unknown = [path.name for path in folders if wording.label_of(path.name) is None]
        if unknown:
            known = ", ".join(wording.names)
            raise ValueError(f"{dataset_id} has no class {unknown[0]!r} (in {split.name}); its classes are: {known}")
    for split in ("train", "test"):
        filled = {wording.label_of(name) for name, count in counts.get(split, {}).items() if count}
        empty = [name for label, name in enumerate(wording.names) if label not in filled]
        if empty:
            raise ValueError(
                f"{dataset_id} would have no {split} images of: {', '.join(empty)}. Is the source complete?"
            )
    return counts


def split_by_group(groups: Sequence[str], labels: Sequence[str], *, folds: int, seed: int) -> NDArray[np.bool_]:
    """Choose about 1/`folds` of the rows for testing, class by class, never dividing a group.

    Parameters
    ----------
    groups : sequence of str
        What must not be divided, for example the patient of each row.
    labels : sequence of str
        Class of each row.
    folds : int
        At least 2; 5 makes a 20 % test set.
    seed : int
        The same rows, in any order, give the same split.

    Returns
    -------
    bool [n]
        True for the test rows.

    Raises
    ------
    ValueError
        Fewer groups, or fewer rows of a class, than folds.
    """
    rows = pd.DataFrame({"group": groups, "label": labels})
    if rows["group"].nunique() < folds:
        raise ValueError(
            f"{rows['group'].nunique()} groups cannot be split into {folds} folds; is the source complete?"
        )
    ordered = rows.sort_values(["group", "label"], kind="stable")
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    _, test = next(splitter.split(ordered, ordered["label"], ordered["group"]))
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[ordered.index[test]] = True
    return chosen


def nuclei_counts(masks: NDArray[Any]) -> NDArray[np.int64]:
    """Number of nuclei of each kind in one PanNuke tile.

    Parameters
    ----------
    masks : [H, W, 6]
        A nucleus number per pixel (0 = none) for each of five kinds, then the background.

    Returns
    -------
    int64 [5]
        Neoplastic, inflammatory, connective, dead, epithelial.
    """
    return np.array(
        [np.count_nonzero(np.unique(masks[..., channel])) for channel in range(NUCLEUS_CHANNELS)],
        dtype=np.int64,
    )


def pannuke_class(counts: NDArray[np.int64]) -> str | None:
    """Class of a PanNuke tile by its nuclei, or None where it is left out.

    At least 10 neoplastic nuclei which are more than 30 % of all: malignant. Other nuclei only: benign.
    Few neoplastic nuclei, or none of any kind: left out. This is the rule of the PLIP and BAPLe scripts,
    except that those count the background as one more nucleus.

    Parameters
    ----------
    counts : int64 [5]
        As from `nuclei_counts`.
    """
    tumour, total = int(counts[NEOPLASTIC]), int(counts.sum())
    if tumour >= 10 and tumour > 0.3 * total:
        return "malignant"
    return "benign" if tumour == 0 and total > 0 else None


def read_table(path: Path) -> pd.DataFrame:
    """A table from ``.xlsx``, or from a ``.csv`` of the same name beside it.

    Raises
    ------
    FileNotFoundError
        Neither is there.
    ImportError
        Only the workbook is there and openpyxl is not installed.
    ValueError
        The file is damaged.
    """
    as_csv = path.with_suffix(".csv")
    if as_csv.exists():
        says = f"{as_csv} is not a readable CSV table (UTF-8, commas, no row longer than the header)"
        with parsed(says), warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # By default pandas would take the first column of longer rows for their names.
            return pd.read_csv(as_csv, index_col=False)
    if not path.exists():
        raise FileNotFoundError(f"no {path} (nor {as_csv.name} beside it)")
    with parsed(f"{path} is not a readable workbook", f"Save it as {as_csv}."):
        try:
            return pd.read_excel(path)
        except ImportError as error:
            missing = error
    raise ImportError(f"reading {path} needs openpyxl: `pip install openpyxl`, or save it as {as_csv}") from missing


def require_columns(table: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Raise a ValueError naming the columns that a table lacks and those it has."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(map(str, table.columns))}")


def obtain(
    url: str, name: str, *, source: Path | None, root: Path, sha256: str | None = None, md5: str | None = None
) -> Path:
    """A file from the user's own folder `source` if given, else downloaded to ``ROOT/downloads``; verified.

    Raises
    ------
    FileNotFoundError
        `source` is given and does not hold the file.
    DownloadError
        As from `preparing.downloads.download`; a user's own file with a wrong hash stays in place.
    """
    if source is None:
        return download(url, root / "downloads" / name, sha256=sha256, md5=md5)
    path = source / name
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {source}; fetch {url}, or leave --source out to download it")
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := file_hash(path, algorithm)) != expected:
            raise DownloadError(f"{path} has {algorithm} {found}, expected {expected}; fetch {url} again")
    return path


def named_source(source: Path | None, command: Callable[..., None]) -> Path:
    """The folder given with ``--source``; without it an error with the command's own instructions."""
    if source is None:
        raise ValueError(f"this set is fetched by hand, then named with --source.\n\n{inspect.getdoc(command)}")
    return source


def listing_sha256(paths: Iterable[Path], *, base: Path) -> str:
    """Hash of a collection of files by relative name and size, where hashing every byte would take long."""
    lines = sorted(f"{path.relative_to(base).as_posix()} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()

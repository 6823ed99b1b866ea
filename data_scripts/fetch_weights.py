"""Fetch the weights of models into WEIGHTS_DIR/ID/, verified where a hash is known.

The first download is recorded in SHA256SUMS beside the files, in the format of sha256sum, so that later
loads can be compared with it. Interrupted downloads go on where they stopped. Licences and citations are
those of `medrobust models`; several of these models are for research only, none is for clinical use.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from medrobust_lib.files import DownloadError, check_sums, file_sha256, named_when_full, read_sums, reported_errors
from medrobust_lib.models.catalogue import GENERATIVE as VLMS
from medrobust_lib.models.catalogue import HUB_PREFIX, HUB_URL, ModelEntry, fetch_command, gate_hint
from medrobust_lib.models.loading import find_model, list_models
from medrobust_lib.places import default_weights_dir
from preparing.archives import OF_THE_DISK, extract
from preparing.downloads import download, record_sums

AUTHORS_HUB = "razaimam45/RobustMedCLIP"
# Checkpoints that a hub repository keeps in folders; they are found by pattern and stored by file name.
HUB_PATTERNS = {
    "unimedclip": (AUTHORS_HUB, ("*unimed_clip_vit_b16.pt",)),
    "robustmedclip": (AUTHORS_HUB, ("*exp-rank-16/vit/fewshot_100_percent/checkpoints/best_model/*",)),
    "robustmedclip-rn50": (AUTHORS_HUB, ("*exp-rank-16/resnet/fewshot_100_percent/checkpoints/best_model/*",)),
}
# Of a whole repository: no second copy of the weights in another format.
REPOSITORY_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
REPOSITORY_FILES = [f"*{suffix}" for suffix in REPOSITORY_SUFFIXES]
HUB_ERRORS = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


class WeightFile(NamedTuple):
    """One file of a model: its name in the model's folder, where it is published, and its hash where that is known."""

    name: str
    url: str
    sha256: str | None = None


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(help=__doc__)
def main(
    models: Annotated[list[str], typer.Argument(help="Model ids, as in `medrobust models`; generative ones too.")],
    weights_dir: Annotated[
        Path | None, typer.Option(help="Folder of weights; default MEDROBUST_WEIGHTS or ./weights.")
    ] = None,
) -> None:
    """Fetch the weights of the models asked for."""
    with reported_errors():
        for model in models:
            if model.startswith(HUB_PREFIX):
                raise ValueError(
                    f"{model!r} stays in the hub cache: run `{fetch_command(model)}`, after which "
                    f"load_model({model!r}), or load_vlm({model!r}) for a model that writes, works offline, too"
                )
        generative = {entry.id: entry for entry in VLMS}
        # All ids are looked up before anything is fetched.
        for entry in [generative.get(model) or find_model(model) for model in models]:
            folder = (weights_dir or default_weights_dir()) / entry.id
            if entry.generative or (entry.source.startswith(HUB_PREFIX) and not entry.files):
                fetch_repository(entry, folder)
            else:
                for file in published_files(entry):
                    fetch(file, folder)
            check_sums(folder)
            typer.echo(f"{folder}  ready")


def fetch_repository(entry: ModelEntry, folder: Path) -> None:
    """Put the files of a model's hub repository into the folder, and record their SHA-256."""
    if not entry.source.startswith(HUB_PREFIX):
        raise ValueError(f"{entry.id} needs no download ({entry.source})")
    repository = entry.source.removeprefix(HUB_PREFIX)
    with from_hub(f"{HUB_URL}{repository} (save its files in {folder})", folder, gate_hint(entry)):
        # It goes on where it stopped, and each file takes its name when it is whole.
        snapshot_download(repository, local_dir=folder, allow_patterns=REPOSITORY_FILES)
    fetched = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in REPOSITORY_SUFFIXES]
    record_sums(folder, [name for name in fetched if name not in read_sums(folder)])


def published_files(entry: ModelEntry) -> list[WeightFile]:
    """What to fetch for a model: the table's files, and those found by pattern on the hub."""
    files = [WeightFile(url.rpartition("/")[2], url) for url in entry.files]
    if entry.id in HUB_PATTERNS and not any(file.url.startswith(f"{HUB_URL}{AUTHORS_HUB}") for file in files):
        repository, patterns = HUB_PATTERNS[entry.id]
        with from_hub(f"the list of files of {HUB_URL}{repository}"):
            paths = HfApi().list_repo_files(repository)
        found = [path for path in paths if any(fnmatch(path, pattern) for pattern in patterns)]
        if not found:
            raise DownloadError(f"{HUB_URL}{repository} has no file like {' or '.join(patterns)}")
        files += [WeightFile(Path(path).name, f"{HUB_URL}{repository}/resolve/main/{path}") for path in found]
    if not files:
        fetched = [id for id in list_models()["id"] if not find_model(id).shipped]
        raise ValueError(f"{entry.id} needs no download ({entry.source}); models to fetch: {', '.join(fetched)}")
    return files


def fetch(file: WeightFile, folder: Path) -> None:
    """Put one file into the folder, unpack it if it is a zip archive, and record its SHA-256."""
    path = folder / file.name
    if file.name in read_sums(folder):
        return
    if file.url.startswith(HUB_URL):
        fetch_from_hub(file, path)
    else:
        download(file.url, path, sha256=file.sha256)
    unpacked = []
    if path.suffix == ".zip":
        unpacked = [str(member.relative_to(folder)) for member in extract(path, folder)]
    record_sums(folder, [*unpacked, file.name])


def fetch_from_hub(file: WeightFile, path: Path) -> None:
    """Fetch a ``https://huggingface.co/OWNER/NAME/resolve/REVISION/FILE`` through huggingface_hub."""
    repository, _, place = file.url.removeprefix(HUB_URL).partition("/resolve/")
    revision, _, name = place.partition("/")
    scratch = path.parent / ".hub"  # keeps what is half done for the next call
    if not path.exists():
        with from_hub(f"{file.url} (save it as {path})", path):
            fetched = Path(hf_hub_download(repository, name, revision=revision, local_dir=scratch))
        fetched.replace(path)
        shutil.rmtree(scratch)
    if file.sha256 and (found := file_sha256(path)) != file.sha256:
        aside = path.with_name(path.name + ".wrong-hash")
        path.replace(aside)
        raise DownloadError(
            f"{file.name} from {file.url} has sha256 {found}, expected {file.sha256}. It is kept aside as {aside}."
        )


@contextmanager
def from_hub(what: str, place: Path = Path(), hint: str = "") -> Iterator[None]:
    """Say what to do about a hub that did not give a file; troubles of the disk below `place` stay what they are."""
    try:
        with named_when_full(place, "what came is kept"):
            yield
    except HUB_ERRORS as error:
        if getattr(error, "errno", None) in OF_THE_DISK:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(
            f"cannot fetch {what}: {reason}{hint} Check the network or the proxy settings, unset HF_HUB_OFFLINE (it "
            "forbids downloads), log in with `hf auth login` if the repository asks for it, or fetch it with a browser."
        ) from error


if __name__ == "__main__":
    app()

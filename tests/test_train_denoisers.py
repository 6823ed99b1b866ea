import importlib.util
import shlex
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import medrobust_lib as mr
from medrobust_lib.smoothing import denoisers
from medrobust_lib.smoothing.denoisers import (
    DEMO_FOLDER,
    DiffusionDenoiser,
    DnCNN,
    DnCNNDenoiser,
    denoiser_path,
    find_denoiser,
    load_denoiser,
)
from training import images
from training.denoisers import Recipe, save_denoiser

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "train_denoisers.py"
DATA = "phantom/histology"
SMALL = ["--n-images", 10, "--batch-size", 4, "--steps", 7, "--save-every", 2, "--width", 8, "--image-size", 32]
DIFFUSION = [*SMALL, "--sigmas", "0.25,0.5", "--device", "cpu"]
SMALL = [*DIFFUSION, "--depth", 3]
JUDGED = [*(64 if word == 32 else word for word in SMALL), "--model", "demo-clip"]
OPTIONS = {"mse": SMALL, "stability": JUDGED, "diffusion": DIFFUSION}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_denoisers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(script):
    """Run the command; what it raises is raised."""
    app = typer.Typer()
    app.command()(script.main)

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


class Killed(Exception):
    """The power has failed."""


def kill_at(monkeypatch, step):
    """Make the optimiser fail at its so-many-th step from now."""
    whole, taken = torch.optim.Adam.step, []

    def fail(optimiser, *arguments, **options):
        taken.append(1)
        if len(taken) == step:
            raise Killed
        return whole(optimiser, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", fail)


# ---- going on ----


@pytest.mark.parametrize("kind", ["mse", "stability", "diffusion"])
def test_a_run_that_was_killed_again_and_again_ends_with_the_same_file(kind, call, tmp_path, monkeypatch):
    whole, torn = (tmp_path / name / "weights.safetensors" for name in ("whole", "torn"))
    call(kind, DATA, *OPTIONS[kind], "--out", whole)
    kills = np.random.default_rng(3).integers(3, 7, 2)
    for step in kills:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_at(patched, step)
            call(kind, DATA, *OPTIONS[kind], "--out", torn)
        assert not torn.exists()
    assert "resumed" in call(kind, DATA, *OPTIONS[kind], "--out", torn)
    assert torn.read_bytes() == whole.read_bytes()
    beside = {path.name for path in torn.with_suffix(".training").iterdir()}
    assert beside == {"journal.jsonl", "manifest.json"}


def test_a_kill_while_images_are_decoded_leaves_nothing_that_is_taken_for_them(call, tmp_path, monkeypatch):
    whole, torn = (tmp_path / name / "weights.safetensors" for name in ("whole", "torn"))
    call("mse", DATA, *SMALL, "--out", whole)
    decode, seen = images.fit_square, []

    def fail(image, size, **options):
        seen.append(1)
        if len(seen) == 5:
            raise Killed
        return decode(image, size, **options)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(images, "fit_square", fail)
        call("mse", DATA, *SMALL, "--out", torn)
    call("mse", DATA, *SMALL, "--out", torn)
    assert torn.read_bytes() == whole.read_bytes()


def test_what_is_there_is_not_trained_again_and_other_settings_are_refused(call, tmp_path, monkeypatch):
    out = tmp_path / "weights.safetensors"
    call("mse", DATA, *SMALL, "--out", out)
    kill_at(monkeypatch, 1)
    before = out.stat().st_mtime_ns
    assert "ready" in call("mse", DATA, *SMALL, "--out", out)
    assert out.stat().st_mtime_ns == before
    changes = {"--steps": 9, "--seed": 1, "--sigmas": "0.25"}
    for option, value in changes.items():
        with pytest.raises(ValueError, match=f"{option.strip('-')}: the store has .*, this run asks"):
            call("mse", DATA, *SMALL, option, value, "--out", out)
    with pytest.raises(ValueError, match='kind: the store has "mse", this run asks "diffusion"'):
        call("diffusion", DATA, *DIFFUSION, "--out", out)
    (tmp_path / "other.safetensors").write_bytes(out.read_bytes())
    with pytest.raises(ValueError, match="other.safetensors is there, and nothing tells with which settings"):
        call("mse", DATA, *SMALL, "--out", tmp_path / "other.safetensors")


# ---- what is trained ----


def write_table(folder, labels, splits):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(len(labels)):
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(len(labels))]
    table = pd.DataFrame({"path": names, "label": labels} | ({} if splits is None else {"split": splits}))
    table.to_csv(folder / "list.csv", index=False)
    return f"csv:{folder / 'list.csv'}"


def test_only_images_of_the_train_split_count_and_no_label_does(call, tmp_path):
    splits = ["train", "test", "train", "train", "test", "train"]
    options = ["--steps", 2, "--depth", 3, "--width", 8, "--image-size", 32, "--sigmas", "0.25", "--device", "cpu"]
    files = []
    for name, labels in (("a", "mmnnmn"), ("b", "nmnmnm")):
        dataset = write_table(tmp_path / name, list(labels), splits)
        files.append(tmp_path / f"{name}.safetensors")
        call("mse", dataset, *options, "--out", files[-1])
    assert files[0].read_bytes() == files[1].read_bytes()
    origin = load_denoiser(files[0]).provenance["0.25"]
    assert (origin["dataset"], origin["split"], origin["images"]) == ("csv:list.csv", "train", 4)
    assert origin["pixels"] == "32 x 32"
    undivided = write_table(tmp_path / "c", list("mmnnmn"), None)
    with pytest.raises(ValueError, match="is not divided into splits, so it has no 'train'"):
        call("mse", undivided, *options, "--out", tmp_path / "c.safetensors")


def test_the_decoded_images_are_those_of_the_data_set_in_their_order(tmp_path):
    loaded = mr.load_dataset(DATA, split="train", n=7, seed=2, image_size=48)
    split = mr.data.registry.open_split(DATA, split="train", image_size=48)
    decoded = images.decoded(split, loaded.indices, image_size=48, path=tmp_path / "images.npy")
    assert np.array_equal(decoded.images, loaded.images)
    assert (len(decoded), decoded.classes, decoded.templates) == (7, loaded.classes, loaded.templates)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    side, count = 64, 400
    made = (np.full((side, side, 3), number % 256, np.uint8) for number in range(count))
    split = SimpleNamespace(
        listed=SimpleNamespace(read=lambda positions: made, split="train"), fit="crop", classes=(),
        row=SimpleNamespace(id="many"), words=SimpleNamespace(templates=()),
    )  # fmt: skip
    tracemalloc.start()
    decoded = images.decoded(split, np.arange(count), image_size=side, path=tmp_path / "images.npy")
    rows = np.array([399, 5, 300])
    taken = decoded.images[rows]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken[:, 0, 0, 0].tolist() == (rows % 256).tolist()
    assert peak < 0.1 * count * side * side * 3


def test_stability_goes_on_from_a_start_and_keeps_its_networks(call, tmp_path):
    start, out = tmp_path / "mse.safetensors", tmp_path / "stability.safetensors"
    call("mse", DATA, *SMALL, "--out", start)
    arguments = [word for word in JUDGED if word not in ("--depth", 3, "--width", 8)]
    call("stability", DATA, *arguments, "--start", start, "--steps", 1, "--out", out)
    origins = load_denoiser(out).provenance.values()
    assert {origin["start"] for origin in origins} == {load_denoiser(start).id}
    assert {origin["model"] for origin in origins} == {"demo-clip"}
    with pytest.raises(ValueError, match=r"not a DnCNN for each sigma of 0.25,1"):
        call("stability", DATA, *arguments, "--start", start, "--sigmas", "0.25,1", "--out", out)
    with pytest.raises(ValueError, match="width: a --start keeps its networks' own"):
        call("stability", DATA, *arguments, "--start", start, "--width", 16, "--out", out)


def test_one_diffusion_is_trained_up_to_the_largest_sigma(call, tmp_path):
    out = tmp_path / "diffusion.safetensors"
    call("diffusion", DATA, *DIFFUSION, "--out", out)
    trained = load_denoiser(out)
    assert isinstance(trained, DiffusionDenoiser)
    assert trained.sigma_range[1] == pytest.approx(0.5, rel=0.01)
    with pytest.raises(ValueError, match="images of 40 x 40 pixels: .* takes sides that are multiples of 32"):
        trained(torch.zeros(1, 3, 40, 40), 0.25)


# ---- the recipe ----


def test_the_defaults_are_the_papers(call, script, monkeypatch):
    plans = []
    monkeypatch.setattr(script, "carry_out", lambda plan, path, every: plans.append((plan, path)))
    monkeypatch.setenv("MEDROBUST_WEIGHTS", "/weights")
    for kind in ("mse", "diffusion"):
        call(kind, DATA)
    (dncnn, first), (diffusion, second) = plans
    assert dncnn.recipe == Recipe(90 * (1440 // 32), 32, 1e-3, "step", 1e-4)
    assert DnCNN(**dncnn.architecture).architecture == DnCNN().architecture
    assert diffusion.recipe == Recipe(100_000, 32, 2e-4)
    for plan in (dncnn, diffusion):
        assert (plan.image_size, plan.sigmas, len(plan.positions)) == (224, (0.1, 0.25, 0.5, 1.0), 1440)
    assert first == Path("/weights/denoisers/phantom-histology-mse.safetensors").resolve()
    assert second == first.with_name("phantom-histology-diffusion.safetensors")


@pytest.mark.parametrize("decay", ["cosine", "step"])
def test_the_rate_is_that_of_torchs_schedulers(decay):
    recipe = Recipe(steps=90, learning_rate=0.3, decay=decay)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    if decay == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 90)
    else:
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, 30, 0.1)
    for step in range(90):
        assert recipe.rate(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimiser.step()
        schedule.step()


def test_every_epoch_takes_no_image_twice_and_has_an_order_of_its_own():
    recipe = Recipe(batch_size=4)
    epochs = [np.concatenate([recipe.rows(3 * epoch + place, 14) for place in range(3)]) for epoch in range(20)]
    assert {len(set(epoch)) for epoch in epochs} == {12}
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert set(np.concatenate(epochs)) == set(range(14))  # who is left out changes
    assert sorted(recipe.rows(5, 3)) == [0, 1, 2]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"decay": "linear"}])
def test_an_impossible_recipe_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Recipe(**wrong)


# ---- its price, and refusals ----


@pytest.mark.parametrize("kind", ["mse", "stability", "diffusion"])
def test_a_dry_run_prices_and_writes_nothing(kind, call, tmp_path):
    output = call(kind, DATA, *OPTIONS[kind], "--out", tmp_path / "new" / "weights.safetensors", "--dry-run")
    networks = "diffusion" if kind == "diffusion" else "sigma-0.25, sigma-0.5"
    assert f"{7 if kind == 'diffusion' else 14} steps of 4 images ({networks}) on cpu" in output
    for word in ("time    about", "disk    ", "memory  about", "stop    loses at most 2 steps"):
        assert word in output
    assert list(tmp_path.iterdir()) == []


def test_the_price_of_memory_is_what_a_step_keeps(call, tmp_path):
    """A DnCNN of depth 2 keeps for its gradient: the input, the hidden layer, and the two layers' weights."""
    options = [2 if word == 3 else word for word in SMALL]
    output = call("mse", DATA, *options, "--out", tmp_path / "weights.safetensors", "--dry-run")
    weights = 4 * (3 * 8 * 9 + 8 + 8 * 3 * 9)
    pixels = 4 * 32 * 32 * 4  # bytes of one channel of four images
    expected = (3 + 8) * pixels + 3 * pixels + 4 * weights  # and the difference of the squared error
    stated = float(output.split("memory  about ")[1].split(" kB")[0]) * 1000
    assert expected <= stated < 1.5 * expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wavelet", DATA], "unknown kind 'wavelet'; choose one of mse, stability, diffusion"),
        (["stability", DATA], "stability needs its frozen judge, --model"),
        (["mse", DATA, "--model", "demo-clip"], "mse and diffusion have none"),
        (["stability", DATA, "--model", "demo-clip", "--image-size", 96], "demo-clip reads 64 pixels"),
        (["diffusion", DATA, "--image-size", 100], "--image-size 100: the diffusion's network takes sides that are"),
        (["diffusion", DATA, "--width", 12], "UNet needs a width that is a multiple of 8"),
        (["diffusion", DATA, "--depth", 5], "depth: .* a diffusion has no --depth"),
        (["mse", DATA, "--sigmas", "0.1;0.2"], "--sigmas 0.1;0.2: .*Give noise levels with commas"),
        (["mse", DATA, "--sigmas", "25"], "divide a level in 0 to 255 units by 255"),
        (["mse", DATA, "--epochs", 1, "--steps", 1], "--epochs 1 and --steps 1: give one of them"),
        (["mse", DATA, "--n-images", 1441], "n-images"),
        (["mse", "phantom/histologi"], "Did you mean 'phantom/histology'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(arguments, message, call, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(*arguments, "--out", tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_name_than_one_of_a_tensor_file_is_refused(call, tmp_path):
    with pytest.raises(ValueError, match="weights.training: give a file name that ends in .safetensors"):
        call("mse", DATA, *SMALL, "--out", tmp_path / "weights.training")


def test_a_disk_that_is_too_small_is_refused(call, script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match=r"30.7 kB are needed for the decoded images; 10 kB are free"):
        call("mse", DATA, *SMALL, "--out", tmp_path / "weights.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- finding ----


def test_a_study_finds_the_stability_networks_or_else_mse(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path))
    network = DnCNN(depth=2, width=4)
    for kind in ("mse", "stability"):
        path = denoiser_path(kind, "pathology/kather")
        assert path == tmp_path.resolve() / "denoisers" / f"pathology-kather-{kind}.safetensors"
        save_denoiser(DnCNNDenoiser({0.25: network}, kind), path)
        assert find_denoiser("denoised", "pathology/kather") == path
        assert load_denoiser(find_denoiser("denoised", "pathology/kather")).objective == kind


@pytest.mark.parametrize("dataset", ["pathology/kather", "folder:some where/my images?fit=pad"])
@pytest.mark.parametrize(("kind", "trained"), [("denoised", "mse"), ("diffusion", "diffusion")])
@pytest.mark.parametrize("named", [False, True])
def test_where_none_is_the_error_has_a_command_that_puts_one_there(
    kind, trained, dataset, named, script, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path / "default"))
    where = {"weights_dir": tmp_path / "my weights"} if named else {}
    with pytest.raises(FileNotFoundError, match="no denoiser for") as caught:
        find_denoiser(kind, dataset, **where)
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert words[:2] == ["python", "data_scripts/train_denoisers.py"]
    app = typer.Typer()
    app.command()(script.main)
    given = typer.main.get_command(app).make_context("train", words[2:]).params
    assert (given["kind"], given["dataset"]) == (trained, dataset)
    path = given["out"] or denoiser_path(given["kind"], given["dataset"])
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_denoiser(kind, dataset, **where) == path


def test_own_data_are_found_by_the_path_and_by_the_id_of_the_loaded_set(tmp_path):
    long, short = (
        denoiser_path("mse", name, weights_dir=tmp_path) for name in ("folder:/a/b?fit=pad", "folder:b?fit=pad")
    )
    assert long == short == tmp_path / "denoisers" / "folder-b-fit-pad-mse.safetensors"
    assert denoiser_path("mse", "folder:/a/b", weights_dir=tmp_path) != long


def test_phantoms_have_what_is_shipped(tmp_path, monkeypatch):
    assert (
        find_denoiser("denoised", "phantom/blood", weights_dir=tmp_path) == DEMO_FOLDER / "dncnn-stability.safetensors"
    )
    assert find_denoiser("diffusion", "phantom/blood", weights_dir=tmp_path) == DEMO_FOLDER / "diffusion.safetensors"
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  diffusion.safetensors\n")
    monkeypatch.setattr(denoisers, "DEMO_FOLDER", tmp_path)
    with pytest.raises(mr.files.DownloadError, match="is not the file"):
        find_denoiser("diffusion", "phantom/blood")
    with pytest.raises(ValueError, match="unknown kind of denoiser 'mse'; choose one of denoised, diffusion"):
        find_denoiser("mse", "phantom/blood")

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import medrobust_lib as mr
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.files import DownloadError, read_sums
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.smoothing import denoisers
from medrobust_lib.smoothing.denoisers import (
    DiffusionDenoiser,
    DnCNN,
    DnCNNDenoiser,
    UNet,
    diffusion_sigmas,
    load_demo_denoisers,
    load_denoiser,
    matching_timestep,
)
from medrobust_lib.smoothing.methods import FixedPrompts
from training.denoisers import (
    Recipe,
    joined,
    level_at,
    linear_share,
    psnr,
    save_denoiser,
    stability_loss,
    train_denoiser,
    train_diffusion,
)

KINDS = ("mse", "stability", "diffusion")
SIGMAS = (0.1, 0.25, 0.5, 1.0)
SMALL = {"depth": 3, "width": 8}


class ColourEncoder(DualEncoder):
    """The mean colour is the feature; it counts the images that it encodes."""

    def __init__(self):
        grey = Preprocessing(16, "squash", "bilinear", mean=(0.5,) * 3, std=(1.0,) * 3)
        super().__init__(
            id="colours", preprocessing=grey, embed_dim=3, context_length=8, logit_scale=10.0, provenance={}
        )
        self.encoded = 0
        self.eval()

    def _image_features(self, pixels):
        self.encoded += len(pixels)
        return pixels.mean(dim=(2, 3))

    def tokenize(self, texts):
        raise NotImplementedError

    embed_tokens = _text_features = tokenize


@pytest.fixture(scope="module")
def colours():
    """Sixteen smooth squares, each mostly of one colour."""
    ramp = np.linspace(0, 40, 16, dtype=np.uint8)
    images = np.full((16, 16, 16, 3), 100, dtype=np.uint8) + ramp[None, :, None, None]
    labels = np.arange(16) % 3
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 60
    return ImageDataset(
        id="folder:colours", split="train", images=images, labels=labels.astype(np.int64),
        classes=("red", "green", "blue"), templates=("{}",), modality="drawing", licence="CC0-1.0", provenance={},
        indices=np.arange(16, dtype=np.int64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def few(phantoms):
    """Nine phantoms of the val split, clean, and the same unit noise for every test."""
    data = phantoms("histology", split="val", n=9)
    clean = torch.from_numpy(data.images.copy()).permute(0, 3, 1, 2).float() / 255
    return clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))


def random_dncnn(seed=0, **changes):
    network = DnCNN(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def random_unet(seed=0):
    network = UNet(width=8, multipliers=(1, 2), unshuffle=2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def batch(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ---- noise levels of a diffusion ----


def test_the_matching_timestep_inverts_the_noise_levels():
    sigmas = diffusion_sigmas()
    assert sigmas.shape == (1000,)
    assert (np.diff(sigmas) > 0).all()
    assert sigmas[0] == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)) / 2)
    for place in (0, 1, 57, 400, 999):
        assert matching_timestep(sigmas[place]) == pytest.approx(place, abs=1e-6)
    places = [matching_timestep(sigma) for sigma in np.geomspace(sigmas[0], sigmas[-1], 300)]
    assert (np.diff(places) > 0).all()


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_noise_at_the_timestep_is_twice_sigma(sigma):
    kept = 1.0
    for step in range(1000):  # the definition, step by step
        before, kept = kept, kept * (1 - (1e-4 + (2e-2 - 1e-4) * step / 999))
        if math.sqrt((1 - kept) / kept) >= 2 * sigma:
            break
    assert math.sqrt((1 - before) / before) < 2 * sigma
    assert step - 1 <= matching_timestep(sigma) <= step


@pytest.mark.parametrize("sigma", [0.0, 0.001, 200.0])
def test_noise_levels_that_no_timestep_has_are_refused(sigma):
    with pytest.raises(ValueError, match=rf"sigma={sigma}: the diffusion's noise levels run from 0.0050 to 78.7"):
        matching_timestep(sigma)


# ---- networks ----


@pytest.mark.parametrize("unshuffle", [1, 2])
def test_a_residual_network_with_zero_weights_returns_its_input(unshuffle):
    network = DnCNN(**SMALL, unshuffle=unshuffle)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    noisy = batch(2, 3, 8, 12)
    assert torch.equal(network.eval()(noisy), noisy)


def test_the_skip_is_the_share_of_the_input_that_stays():
    network = DnCNN(**SMALL, skip=0.25)
    nn.init.zeros_(network.dncnn[-1].weight)
    noisy = batch(2, 3, 8, 8)
    assert torch.equal(network.eval()(noisy), 0.25 * noisy)


def test_the_default_network_has_the_published_layout():
    shapes = {name: tuple(value.shape) for name, value in DnCNN().state_dict().items()}
    assert shapes["dncnn.0.weight"] == (64, 3, 3, 3)
    assert shapes["dncnn.0.bias"] == (64,)
    assert shapes["dncnn.2.weight"] == (64, 64, 3, 3)
    assert shapes["dncnn.45.running_mean"] == (64,)
    assert shapes["dncnn.47.weight"] == (3, 64, 3, 3)
    assert "dncnn.2.bias" not in shapes
    assert "dncnn.47.bias" not in shapes
    assert len(shapes) == 2 + 15 * 6 + 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DnCNN(depth=1), "got 1, 64, 1"),
        (lambda: UNet(width=12), "multiple of 8"),
        (lambda: UNet(multipliers=()), "at least one level"),
    ],
)
def test_impossible_networks_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- frozen denoisers ----


@pytest.mark.parametrize("kind", ["dncnn", "diffusion"])
def test_a_denoiser_keeps_shape_and_type_and_treats_images_one_by_one(kind):
    if kind == "dncnn":
        denoise = DnCNNDenoiser({0.25: random_dncnn(unshuffle=2)}, "mse")
    else:
        denoise = DiffusionDenoiser(random_unet(), (0.01, 1.0))
    noisy = batch(3, 3, 8, 12)
    result = denoise(noisy, 0.25)
    assert result.shape == noisy.shape
    assert result.dtype == torch.float32
    assert not result.requires_grad
    torch.testing.assert_close(torch.cat([denoise(noisy[row : row + 1], 0.25) for row in range(3)]), result)
    assert torch.equal(denoise(noisy, 0.25), result)  # no noise of its own, no state
    with pytest.raises(ValueError, match=r"images of 9 x 8 pixels: this denoiser takes sides that are multiples of"):
        denoise(batch(1, 3, 8, 9), 0.25)


def test_a_denoiser_is_a_frozen_copy():
    network = random_dncnn().train()
    denoise = DnCNNDenoiser({0.25: network}, "mse")
    identity = denoise.id
    nn.init.ones_(network.dncnn[0].weight)
    assert denoise.id == identity
    assert not denoise.networks[0.25].training
    assert DnCNNDenoiser({0.25: network}, "mse").id != identity
    assert DnCNNDenoiser({0.5: random_dncnn()}, "mse").id != identity
    assert DnCNNDenoiser({0.25: random_dncnn()}, "stability").id != identity
    assert DnCNNDenoiser({0.25: random_dncnn(skip=0.5)}, "mse").id != identity
    assert pickle.loads(pickle.dumps(denoise)).id == identity


def test_a_noise_level_without_a_network_is_refused():
    denoise = DnCNNDenoiser({0.5: random_dncnn(), 0.25: random_dncnn(1)}, "mse")
    assert denoise.sigmas == (0.25, 0.5)
    denoise(batch(1, 3, 8, 8), float(np.float32(0.1) * np.float32(2.5)))
    with pytest.raises(ValueError, match=r"no denoiser for sigma=0.3: there is one each for 0.25, 0.5; train it with"):
        denoise(batch(1, 3, 8, 8), 0.3)
    diffusion = DiffusionDenoiser(random_unet(), (0.01, 1.0))
    with pytest.raises(ValueError, match=r"sigma=1.5: this diffusion was trained for noise levels from 0.01 to 1"):
        diffusion(batch(1, 3, 8, 8), 1.5)
    with pytest.raises(ValueError, match=r"networks by noise level > 0, got levels \[0.0\]"):
        DnCNNDenoiser({0.0: random_dncnn()}, "mse")
    with pytest.raises(ValueError, match=r"unknown objective 'mae'; choose one of mse, stability"):
        DnCNNDenoiser({0.1: random_dncnn()}, "mae")


def test_joining_keeps_every_level_and_refuses_mixed_objectives():
    parts = [DnCNNDenoiser({s: random_dncnn(i)}, "mse", {str(s): {"seed": i}}) for i, s in enumerate((0.5, 0.25))]
    both = joined(*parts)
    noisy = batch(1, 3, 8, 8)
    assert both.sigmas == (0.25, 0.5)
    assert both.provenance == {"0.5": {"seed": 0}, "0.25": {"seed": 1}}
    for part, sigma in zip(parts, (0.5, 0.25), strict=True):
        assert torch.equal(both(noisy, sigma), part(noisy, sigma))
    with pytest.raises(ValueError, match="denoisers of different objectives: mse, stability"):
        joined(parts[0], DnCNNDenoiser({1.0: random_dncnn()}, "stability"))


class Oracle(nn.Module):
    """Knows the clean image, and with it the noise in what it is asked about."""

    def __init__(self, clean, sigma):
        super().__init__()
        self.clean, self.sigma, self.asked = 2 * clean - 1, sigma, []

    def forward(self, pixels, timesteps):
        self.asked.append(timesteps)
        return (pixels * math.sqrt(1 + 4 * self.sigma**2) - self.clean) / (2 * self.sigma)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_perfect_noise_predictor_gives_the_clean_image_back(sigma):
    clean = batch(2, 3, 8, 8)
    denoise = DiffusionDenoiser(Oracle(clean, sigma), (0.01, 2.0))
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(denoise(noisy, sigma), clean, atol=1e-5, rtol=0)
    (asked,) = denoise.network.asked
    assert asked.shape == (2,)
    assert asked[0].item() == pytest.approx(matching_timestep(sigma), rel=1e-6)
    assert level_at(matching_timestep(sigma)) == pytest.approx(sigma, rel=1e-9)


def test_the_network_sees_unit_variance_like_a_diffusion():
    seen = []

    class Recorder(nn.Module):
        def forward(self, pixels, timesteps):
            seen.append(pixels)
            return torch.zeros_like(pixels)

    grey = torch.full((4, 3, 32, 32), 0.5)
    noise = torch.randn(grey.shape, generator=torch.Generator().manual_seed(2))
    result = DiffusionDenoiser(Recorder(), (0.01, 2.0))(grey + 0.5 * noise, 0.5)
    assert seen[0].square().mean().item() == pytest.approx(0.5, rel=0.05)  # (2 sigma)^2 / (1 + (2 sigma)^2)
    assert (result.min() >= 0) and (result.max() <= 1)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_u_net_that_adds_nothing_gives_the_linear_estimate(sigma):
    network = UNet(width=8, multipliers=(1, 2), unshuffle=2, spread=0.4)
    nn.init.zeros_(network.last[-1].weight)
    nn.init.zeros_(network.last[-1].bias)
    noisy = batch(2, 3, 8, 8)
    share = 0.4**2 / (0.4**2 + (2 * sigma) ** 2)
    expected = (share * (2 * noisy - 1) + 1) / 2
    torch.testing.assert_close(DiffusionDenoiser(network, (0.01, 2.0))(noisy, sigma), expected)


# ---- files ----


def test_dncnn_survives_a_file(tmp_path):
    network = random_dncnn(unshuffle=2, skip=0.5)
    network(batch(4, 3, 8, 8))  # moves the running means
    denoise = DnCNNDenoiser({0.25: network, 1.0: random_dncnn(3)}, "stability", {"0.25": {"seed": 4}})
    path = save_denoiser(denoise, tmp_path / "new" / "own.safetensors")
    again = load_denoiser(path)
    noisy = batch(2, 3, 8, 8, seed=9)
    assert (again.id, again.sigmas, again.objective, again.provenance) == (
        denoise.id, (0.25, 1.0), "stability", {"0.25": {"seed": 4}},
    )  # fmt: skip
    for sigma in again.sigmas:
        assert torch.equal(again(noisy, sigma), denoise(noisy, sigma))
    assert [entry.name for entry in path.parent.iterdir()] == ["own.safetensors"]


def test_diffusion_survives_a_file(tmp_path):
    denoise = DiffusionDenoiser(random_unet(), (0.01, 1.0), {"seed": 4})
    again = load_denoiser(save_denoiser(denoise, tmp_path / "own.safetensors"))
    noisy = batch(2, 3, 8, 8, seed=9)
    assert (again.id, again.sigma_range, again.provenance) == (denoise.id, (0.01, 1.0), {"seed": 4})
    assert torch.equal(again(noisy, 0.3), denoise(noisy, 0.3))
    assert denoise.id != DiffusionDenoiser(random_unet(1), (0.01, 1.0)).id
    with pytest.raises(ValueError, match="only a UNet can be saved, not Oracle"):
        save_denoiser(DiffusionDenoiser(Oracle(noisy, 0.1), (0.01, 1.0)), tmp_path / "other.safetensors")


def test_wrong_files_are_refused(tmp_path):
    good = save_denoiser(DnCNNDenoiser({0.25: random_dncnn()}, "mse"), tmp_path / "good.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match=r"no denoiser at .*none.safetensors; data_scripts/train_denoisers.py makes one",
    ):
        load_denoiser(tmp_path / "none.safetensors")
    for change in ({"kind": "wavelet"}, {"format": 2}):
        header = {"format": 1, "kind": "dncnn"} | change
        save_file(load_file(good), tmp_path / "other.safetensors", metadata={"denoiser": json.dumps(header)})
        refusal = (
            rf"holds a denoiser of kind '{header['kind']}', not a denoiser of kind 'dncnn' or 'diffusion' and form"
        )
        with pytest.raises(ValueError, match=refusal):
            load_denoiser(tmp_path / "other.safetensors")
    save_file({"context": torch.zeros(1)}, tmp_path / "prompt.safetensors")
    with pytest.raises(ValueError, match=r"prompt.safetensors holds something else, not a denoiser of kind 'dncnn'"):
        load_denoiser(tmp_path / "prompt.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut.safetensors is not a readable file of a denoiser: .*Copy it anew"):
        load_denoiser(tmp_path / "cut.safetensors")
    header = {
        "format": 1, "kind": "dncnn", "objective": "mse", "provenance": {},
        "architectures": {"0.25": {**SMALL, "depth": 4}},
    }  # fmt: skip
    save_file(load_file(good), tmp_path / "deep.safetensors", metadata={"denoiser": json.dumps(header)})
    with pytest.raises(ValueError, match=r"deep.safetensors does not fit the model; 5 missing keys: dncnn.6.bias"):
        load_denoiser(tmp_path / "deep.safetensors")


# ---- training ----


@pytest.fixture(scope="module")
def trained(colours):
    return train_denoiser(None, colours, sigma=0.25, recipe=Recipe(60, 8, 3e-3, seed=1), device="cpu", **SMALL)


def test_mse_training_lowers_the_loss_and_the_noise(trained, colours):
    origin = trained.provenance["0.25"]
    assert origin["first_loss"] > 2 * origin["last_loss"]
    assert {
        "dataset": "folder:colours",
        "split": "train",
        "images": 16,
        "steps": 60,
        "seed": 1,
    }.items() <= origin.items()
    clean = torch.from_numpy(colours.images).permute(0, 3, 1, 2).float() / 255
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    assert (psnr(trained(noisy, 0.25), clean) > psnr(noisy, clean) + 3).all()


def test_training_depends_on_its_seed_alone(colours, tmp_path):
    def short(seed):
        torch.randn(3)  # a global stream that is elsewhere each time
        return train_denoiser(None, colours, sigma=0.5, recipe=Recipe(2, seed=seed), crop=8, device="cpu", **SMALL)

    state = torch.get_rng_state()
    identities = [short(seed).id for seed in (1, 1, 2)]
    assert identities[0] == identities[1] != identities[2]
    torch.set_rng_state(state)
    train_diffusion(colours, max_sigma=1.0, width=8, multipliers=(1, 2), recipe=Recipe(1), device="cpu")
    denoise = train_denoiser(None, colours, sigma=0.5, recipe=Recipe(1), device="cpu", **SMALL)
    load_denoiser(save_denoiser(denoise, tmp_path / "own.safetensors"))
    assert torch.equal(torch.get_rng_state(), state)


def test_stability_training_goes_on_from_a_start_and_brings_answers_closer(trained, colours):
    model, texts = ColourEncoder(), torch.eye(3)
    clean = model.prepare(colours.images)
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    start = DnCNNDenoiser({0.25: random_dncnn(7)}, "mse")
    after = train_denoiser(
        model, colours, sigma=0.25, objective="stability", start=start, class_features=texts,
        recipe=Recipe(40, 8, 3e-3),
    )  # fmt: skip
    assert after.objective == "stability"
    assert after.provenance["0.25"]["start"] == start.id
    assert after.networks[0.25].architecture == start.networks[0.25].architecture
    losses = [stability_loss(model, texts, d(noisy, 0.25), clean).item() for d in (start, after)]
    floor = stability_loss(model, texts, clean, clean).item()  # the entropy of the clean answers
    assert floor < losses[1] < losses[0]
    assert losses[1] - floor < 0.5 * (losses[0] - floor)
    one_step = train_denoiser(
        model, colours, sigma=0.25, objective="stability", start=trained, class_features=texts,
        recipe=Recipe(1, learning_rate=1e-9),
    )  # fmt: skip
    torch.testing.assert_close(one_step.networks[0.25].dncnn[0].weight, trained.networks[0.25].dncnn[0].weight)


def test_training_that_diverges_is_refused_with_the_remedy(colours):
    with pytest.raises(ValueError, match=r"training diverged in step \d+: lower learning_rate=1e\+30"):
        train_denoiser(None, colours, sigma=0.25, recipe=Recipe(20, 8, 1e30), device="cpu", **SMALL)


def test_the_stability_loss_is_the_cross_entropy_of_the_soft_answers():
    model, texts = ColourEncoder(), torch.eye(3)
    denoised, clean = batch(4, 3, 16, 16), batch(4, 3, 16, 16, seed=1)
    wanted, found = (model.probabilities(model.encode_image(pixels), texts) for pixels in (clean, denoised))
    expected = -(wanted * found.log()).sum(1).mean()
    torch.testing.assert_close(stability_loss(model, texts, denoised, clean), expected)


def test_diffusion_training_lowers_the_loss_and_learns_the_range_it_states(colours):
    denoise = train_diffusion(
        colours, max_sigma=0.5, width=8, multipliers=(1, 2), recipe=Recipe(60, 8, 3e-3), device="cpu"
    )
    assert denoise.provenance["last_loss"] < 0.6 * denoise.provenance["first_loss"]
    assert denoise.provenance["timesteps"] == math.ceil(matching_timestep(0.5)) + 1
    assert denoise.sigma_range == pytest.approx((0.005, 0.5), rel=0.01)
    assert denoise.sigma_range[1] >= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0: a denoiser is trained for a noise level > 0"),
        ({"objective": "mae"}, "unknown objective 'mae'"),
        ({"objective": "stability"}, "give a model and no crop"),
        ({"crop": 17}, "crop=17: the images are 16 x 16 pixels"),
        ({"start": DnCNNDenoiser({0.5: random_dncnn()}, "mse")}, "start has no network for sigma=0.25, only for 0.5"),
    ],
)
def test_impossible_training_is_refused(colours, changes, message):
    with pytest.raises(ValueError, match=message):
        train_denoiser(None, colours, **{"sigma": 0.25, "device": "cpu", **SMALL, **changes})


def test_the_linear_share_is_the_best_one(colours):
    clean = torch.from_numpy(colours.images).float() / 255
    clean = clean - clean.mean(dim=(0, 1, 2))
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    best = (clean * noisy).sum() / noisy.square().sum()
    assert linear_share(colours, 0.3) == pytest.approx(best.item(), rel=0.05)
    assert linear_share(colours, 1e-6) == pytest.approx(1)


# ---- in a study ----


def test_denoised_methods_share_features_and_are_certified_as_standard(tmp_path, colours):
    model, texts = ColourEncoder(), torch.eye(3)
    denoise = DnCNNDenoiser({0.25: random_dncnn()}, "mse")
    plain = FixedPrompts("plain", texts)
    methods = [
        plain,
        FixedPrompts("denoised", texts, denoiser=denoise),
        FixedPrompts("denoised, turned", texts.roll(1, 0), denoiser=denoise),
    ]
    numbers = {"sigmas": (0.25,), "n0": 10, "n": 40, "alpha": 0.05, "sampling": "fixed", "batch_size": 25}
    data = colours.subset([0, 1])
    rows = mr.certify_dataset(model, data, methods, **numbers, store=tmp_path / "store")
    assert set(rows["guarantee"]) == {"standard"}
    assert rows["method"].tolist() == [method.name for method in methods] * 2
    shared = model.encoded
    model.encoded = 0
    alone = mr.certify_dataset(model, data, methods[:1], **numbers)
    assert shared == 2 * model.encoded  # the two denoised methods share one pass of the tower
    assert alone["k"].tolist() == rows[rows["method"] == "plain"]["k"].tolist()
    other = FixedPrompts("denoised", texts, denoiser=DnCNNDenoiser({0.25: random_dncnn(1)}, "mse"))
    with pytest.raises(ValueError, match="denoiser"):
        mr.certify_dataset(model, data, [methods[0], other, methods[2]], **numbers, store=tmp_path / "store")


def test_an_identity_denoiser_changes_no_certificate(colours):
    model, texts = ColourEncoder(), torch.eye(3)
    network = DnCNN(**SMALL)
    nn.init.zeros_(network.dncnn[-1].weight)
    methods = [
        FixedPrompts("plain", texts),
        FixedPrompts("same", texts, denoiser=DnCNNDenoiser({0.25: network}, "mse")),
    ]
    rows = mr.certify_dataset(model, colours.subset([0, 4]), methods, sigmas=(0.25,), n0=10, n=40, alpha=0.05)
    columns = ["image", "predicted", "k", "radius"]
    halves = [rows[rows["method"] == name][columns].reset_index(drop=True) for name in ("plain", "same")]
    assert halves[0].equals(halves[1])


# ---- the weights that ship ----


def test_the_shipped_weights_are_small_and_as_recorded():
    files = [denoisers.DEMO_FOLDER / name for name in denoisers.DEMO_FILES.values()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert set(read_sums(denoisers.DEMO_FOLDER)) == set(denoisers.DEMO_FILES.values())
    card = (denoisers.DEMO_FOLDER / "MODEL_CARD.md").read_text()
    for words in ("Not for clinical use", "train split", *denoisers.DEMO_FILES.values()):
        assert words in card


@pytest.mark.parametrize("kind", ["mse", "diffusion"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_shipped_denoisers_raise_the_signal_of_every_phantom(few, kind, sigma):
    clean, noise = few
    noisy = clean + sigma * noise
    with torch.inference_mode():
        denoised = load_demo_denoisers(kind)(noisy, sigma)
    assert (psnr(denoised, clean) > psnr(noisy, clean) + 3).all()


def test_the_shipped_stability_denoiser_brings_answers_closer_to_the_clean_ones(model, phantoms, few):
    data = phantoms("histology", split="val", n=9)
    texts = model.class_features(data.classes, data.templates[:1])
    clean, noise = few
    denoise = load_demo_denoisers("stability")
    assert denoise.sigmas == SIGMAS
    weights = fingerprint(list(model.state_dict().values()))  # other weights: train_demo_denoisers.py --only stability
    assert {(o["model"], o["model_weights"]) for o in denoise.provenance.values()} == {("demo-clip", weights)}
    with torch.inference_mode():
        for sigma in SIGMAS:
            noisy = clean + sigma * noise
            losses = [stability_loss(model, texts, pixels, clean).item() for pixels in (noisy, denoise(noisy, sigma))]
            assert losses[1] < 0.8 * losses[0], sigma


def test_no_shipped_denoiser_has_seen_anything_but_the_train_split():
    for kind in KINDS:
        denoise = load_demo_denoisers(kind)
        origins = [denoise.provenance] if kind == "diffusion" else denoise.provenance.values()
        assert {(origin["dataset"], origin["split"]) for origin in origins} == {("phantom/histology", "train")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"width": 8, "depth": 3}}, "TypeError: .*unexpected keyword argument 'depth'"),
        ({"architecture": None}, "TypeError"),
        ({"timestep": "random"}, "unknown timestep 'random'"),
        ({"sigma_range": 3}, "TypeError"),
    ],
)
def test_a_header_that_cannot_be_followed_is_refused(tmp_path, change, message):
    path = save_denoiser(DiffusionDenoiser(UNet(width=8), (0.1, 1.0)), tmp_path / "mine.safetensors")
    with safe_open(path, framework="pt") as file:
        (key, header), *_ = file.metadata().items()
    save_file(load_file(path), path, metadata={key: json.dumps(json.loads(header) | change)})
    with pytest.raises(ValueError, match=message):
        load_denoiser(path)
    kept = {name: value for name, value in json.loads(header).items() if name not in change}
    save_file(load_file(path), path, metadata={key: json.dumps(kept)})
    with pytest.raises(ValueError, match=f"mine.safetensors: KeyError: '{next(iter(change))}'"):
        load_denoiser(path)


def test_demo_files_are_checked(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown demo denoiser 'diffusions'; .*; did you mean 'diffusion'"):
        load_demo_denoisers("diffusions")
    good = save_denoiser(DnCNNDenoiser({0.25: random_dncnn()}, "mse"), tmp_path / denoisers.DEMO_FILES["mse"])
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {good.name}\n")
    monkeypatch.setattr(denoisers, "DEMO_FOLDER", tmp_path)
    with pytest.raises(DownloadError, match=r"dncnn-mse.safetensors is not the file"):
        load_demo_denoisers("mse")


def test_frozen_fields_cannot_be_replaced_in_place():
    denoise = DnCNNDenoiser({0.25: random_dncnn()}, "mse")
    with pytest.raises(dataclasses.FrozenInstanceError):
        denoise.objective = "stability"

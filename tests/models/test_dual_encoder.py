from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

import medrobust_lib
from medrobust_lib.data.decoding import read_image
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens, check_text_lengths
from medrobust_lib.models.geometry import prepare_images

CROP = Preprocessing(32, "shortest-edge-crop", "bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
SIZES = [(40, 40), (64, 48), (48, 64), (37, 61), (16, 16), (7, 9), (91, 30), (32, 32), (33, 32), (35, 32)]


class LetterEncoder(DualEncoder):
    """Smallest possible model: colour means for images, letter counts for texts."""

    def __init__(self) -> None:
        super().__init__(
            id="letters",
            preprocessing=CROP,
            embed_dim=3,
            context_length=8,
            logit_scale=10.0,
            provenance={"source": "a test"},
        )
        self.seen_pixels = None

    def _image_features(self, pixels):
        self.seen_pixels = pixels
        return pixels.mean(dim=(2, 3))

    def tokenize(self, texts):
        check_text_lengths(texts, [len(t) for t in texts], context_length=8, model_id=self.id)
        ids = torch.zeros(len(texts), 8, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor([ord(letter) for letter in text])
        return Tokens(ids, ids > 0)

    def embed_tokens(self, tokens):
        ids = tokens.ids[..., None]
        return torch.cat([ids == ord("a"), ids == ord("b"), ids == ord("c")], dim=-1).to(self.device, self.dtype)

    def _text_features(self, embeddings, tokens):
        return (embeddings * tokens.mask[..., None]).sum(dim=1) + 1e-3


@pytest.fixture
def encoder():
    return LetterEncoder()


def random_image(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("geometry", "mode"), [("shortest-edge-crop", "shortest"), ("squash", "squash")])
def test_prepare_equals_the_transform_of_open_clip(size, interpolation, geometry, mode):
    image = random_image(*size)
    transform = image_transform(
        32, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation, resize_mode=mode
    )
    preprocessing = Preprocessing(32, geometry, interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(prepare_images([image], preprocessing)[0], transform(Image.fromarray(image)))


@pytest.mark.parametrize("size", [size for size in SIZES if size != (35, 32)])
def test_prepare_matches_the_image_processor_of_transformers(size):
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_normalize": False}
    image = random_image(*size)
    ours = prepare_images([image], CROP)[0].numpy()
    pillow = CLIPImageProcessorPil(**settings)(images=Image.fromarray(image))["pixel_values"][0]
    np.testing.assert_allclose(ours, pillow, atol=1e-6)
    # torchvision resizes with other integer arithmetic: at most two of the 256 levels apart.
    default = CLIPImageProcessor(**settings)(images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(ours, default.numpy(), atol=2.01 / 255)


def test_odd_margin_is_cut_as_torchvision_cuts_it():
    image = random_image(35, 32)
    expected = torch.from_numpy(image[2:34]).permute(2, 0, 1) / 255
    assert torch.equal(prepare_images([image], CROP)[0], expected)


def test_pad_square_centres_on_black_and_does_not_enlarge():
    medclip = Preprocessing(32, "pad-square", "bicubic", mean=(0.5,) * 3, std=(0.3,) * 3, grayscale=True)
    small = np.full((10, 20), 200, dtype=np.uint8)
    prepared = prepare_images([small], medclip)
    assert prepared.shape == (1, 3, 32, 32)
    bright = prepared[0] > 0.5
    assert bright[:, 11:21, 6:26].all()
    assert bright.sum() == 3 * 10 * 20
    wide = prepare_images([np.full((20, 80), 200, dtype=np.uint8)], medclip)
    assert wide[0, 0, 16].min() > 0.7
    assert wide[0, 0, [0, 31]].max() == 0


def test_letterbox_enlarges_small_images_and_cuts_nothing_off():
    letterbox = Preprocessing(32, "letterbox", "bicubic", mean=(0.5,) * 3, std=(0.3,) * 3)
    small = random_image(16, 16)
    enlarged = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(
        prepare_images([small], letterbox)[0], torch.from_numpy(np.array(enlarged)).permute(2, 0, 1) / 255
    )
    # Every edge of a wide and of a tall image is there, between black bars of equal size.
    framed = np.full((40, 80, 3), 128, dtype=np.uint8)
    framed[[0, 1, -2, -1]] = 255
    framed[:, [0, 1, -2, -1]] = 255
    for image, turn in ((framed, 0), (framed.transpose(1, 0, 2), 1)):
        prepared = prepare_images([image], letterbox)[0, 0]
        upright = prepared.T if turn else prepared
        assert upright[[*range(7), *range(25, 32)]].max() == 0
        assert upright[[8, 23]].min() > 0.6
        assert upright[8:24, [0, 31]].min() > 0.6
        assert torch.allclose(upright[12:20, 4:28], torch.tensor(128 / 255), atol=0.02)
    assert torch.equal(prepare_images([framed[:, ::-1]], letterbox), prepare_images([framed], letterbox))


def test_grayscale_uses_luma_on_three_equal_channels():
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 255
    gray = Preprocessing(32, "squash", "bicubic", mean=(0.5,) * 3, std=(0.3,) * 3, grayscale=True)
    assert torch.allclose(prepare_images([red], gray), torch.tensor(76 / 255))


def test_prepare_takes_arrays_pillow_images_and_paths_alike(encoder, images, tmp_path):
    paths = []
    for index, image in enumerate(images):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image).save(paths[-1])
    from_array = encoder.prepare(images)
    assert from_array.dtype == torch.float32
    assert from_array.shape == (5, 3, 32, 32)
    assert 0 <= from_array.min() < from_array.max() <= 1
    assert torch.equal(encoder.prepare([Image.fromarray(image) for image in images]), from_array)
    assert torch.equal(encoder.prepare(paths), from_array)
    assert torch.equal(encoder.prepare([str(paths[0]), images[1]]), from_array[:2])
    gray = images[..., 0]
    assert torch.equal(encoder.prepare(gray), encoder.prepare(np.repeat(gray[..., None], 3, axis=-1)))


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "CMYK"])
def test_prepare_reads_other_8_bit_modes_as_rgb(encoder, mode):
    picture = Image.fromarray(random_image(40, 40)).convert(mode)
    assert torch.equal(encoder.prepare([picture]), encoder.prepare([picture.convert("RGB")]))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.full((2, 8, 8, 3), np.nan), ValueError, "NaN or infinite values in a float64 array"),
        (np.full((2, 8, 8, 3), 0.5), TypeError, r"found float64 with values in \[0.5, 0.5\]; scale to 0..255"),
        (np.zeros((2, 8, 8, 3), np.int16) - 5, TypeError, r"found int16 with values in \[-5, -5\]"),
        (np.array([["a"]]), TypeError, "expected uint8 in 0..255, found <U1"),
        (np.zeros((2, 8, 8, 4), np.uint8), ValueError, r"\[n, H, W, 3\] or \[n, H, W\], not \(2, 8, 8, 4\)"),
        (np.zeros((8, 8), np.uint8), ValueError, r"not \(8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"look like a single one: pass images\[None\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "no image given"),
        ([], ValueError, "no image given"),
        ([np.zeros((8, 8, 2), np.uint8)], ValueError, r"image 0 must be uint8 \[H, W, 3\] or \[H, W\]"),
        ([np.zeros((8, 8), np.uint8), np.zeros((8, 0), np.uint8)], ValueError, "image 1 must be uint8"),
        ([np.zeros((8, 8), np.uint8), np.ones((8, 8))], TypeError, "image 1: expected uint8 in 0..255, found float64"),
        ([3], TypeError, "image 0 must be a PIL image, a uint8 array or a path, not int"),
        (7, TypeError, "images must be an array or a sequence of images or paths, not int"),
        ("a.png", TypeError, r"pass \[str\(...\)\] for a single one"),
        (torch.zeros(2, 3, 8, 8), TypeError, "not a torch.Tensor"),
        ([Image.new("I;16", (8, 8))], ValueError, "image 0: Pillow mode 'I;16' is not 8-bit; window it"),
        ([Image.new("F", (8, 8))], ValueError, "mode 'F' is not 8-bit"),
    ],
)
def test_prepare_says_what_is_wrong_with_an_image(encoder, bad, error, message):
    with pytest.raises(error, match=message):
        encoder.prepare(bad)


def test_prepare_names_missing_and_corrupt_files(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image file at .*absent\.png"):
        encoder.prepare([tmp_path / "absent.png"])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png is not a readable image"):
        encoder.prepare([tmp_path / "text.png"])
    Image.fromarray(random_image(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"half\.png is not a readable image"):
        encoder.prepare([tmp_path / "whole.png", tmp_path / "half.png"])


def test_prepare_reads_files_as_data_sets_do(encoder, tmp_path):
    deep = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = encoder.prepare(read_image(tmp_path / "deep.png")[None])
    torch.testing.assert_close(encoder.prepare([tmp_path / "deep.png"]), expected)


def test_encode_image_normalises_pixels_inside_and_returns_unit_norm(encoder, images):
    pixels = encoder.prepare(images)
    features = encoder.encode_image(pixels)
    mean, std = torch.tensor(CROP.mean), torch.tensor(CROP.std)
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(encoder.seen_pixels, expected, atol=1e-6)
    assert torch.allclose(features.norm(dim=-1), torch.ones(5), atol=1e-6)
    assert torch.allclose(features, torch.nn.functional.normalize(expected.mean(dim=(2, 3)), dim=-1), atol=1e-6)


def test_encode_image_accepts_noise_beyond_the_unit_interval_and_passes_gradients(encoder, images):
    noise = 2 * torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = (encoder.prepare(images) + noise).requires_grad_(True)
    assert pixels.min() < -1
    encoder.encode_image(pixels)[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros((1, 3, 32, 32)), TypeError, "must be a torch.Tensor from prepare"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "not torch.uint8; use prepare"),
        (torch.zeros(3, 32, 32), ValueError, r"\[n, 3, 32, 32\] for letters, not \(3, 32, 32\)"),
        (torch.zeros(1, 3, 16, 32), ValueError, r"not \(1, 3, 16, 32\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"not \(1, 1, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), ValueError, "pixels hold no image"),
        (torch.full((1, 3, 32, 32), 200.0), ValueError, r"range over \[200, 200\].*divide 0..255 by 255"),
    ],
)
def test_encode_image_says_what_is_wrong_with_pixels(encoder, bad, error, message):
    with pytest.raises(error, match=message):
        encoder.encode_image(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_encode_image_names_the_image_with_nan(encoder, value):
    pixels = torch.rand(4, 3, 32, 32)
    pixels[2, 1, 5, 5] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values in image 2 \(1 in all\)"):
        encoder.encode_image(pixels)


def test_class_features_are_the_renormalised_mean_over_templates(encoder):
    features = encoder.class_features(["a", "b"], ["{}", "{}c"])
    for row, name in zip(features, "ab", strict=True):
        both = encoder.encode_text([name, name + "c"])
        assert torch.allclose(row, torch.nn.functional.normalize(both.mean(dim=0), dim=0), atol=1e-6)
    assert torch.allclose(encoder.class_features(["a"], ["{}{}"]), encoder.encode_text("aa"), atol=1e-6)
    braces = encoder.class_features(["{a}"], ["{}"])
    assert torch.allclose(braces, encoder.encode_text(["{a}"]), atol=1e-6)


def test_encode_text_in_chunks_gives_the_same_rows(encoder):
    texts = ["a" * (1 + index % 5) + "b" for index in range(150)]
    assert torch.allclose(encoder.encode_text(texts), torch.cat([encoder.encode_text([t]) for t in texts]), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.encode_text([]), ValueError, "no text given"),
        (lambda e: e.encode_text(["a", 3]), TypeError, "texts must be strings, not int: 3"),
        (lambda e: e.class_features([], ["{}"]), ValueError, "no text given"),
        (lambda e: e.class_features(["a"], ["an image"]), ValueError, "template 'an image' lacks '{}'"),
        (
            lambda e: e.encode_text(["a", "abcabcabc"]),
            ValueError,
            r"'abcabcabc' has 9 tokens .* letters reads at most 8; shorten the template",
        ),
        (lambda e: e.encode_embeddings(torch.zeros(1, 8, 3), e.tokenize(["a", "b"])), ValueError, r"\(2, 8\)"),
        (lambda e: e.encode_embeddings(torch.zeros(2, 8), e.tokenize(["a", "b"])), ValueError, r"not \(2, 8\)"),
    ],
)
def test_text_side_says_what_is_wrong(encoder, call, error, message):
    with pytest.raises(error, match=message):
        call(encoder)


def test_probabilities_are_the_softmax_of_scaled_cosines(encoder):
    image_features = torch.eye(3)[:2]
    class_features = torch.eye(3)
    probabilities = encoder.probabilities(image_features, class_features)
    expected = np.exp(10) / (np.exp(10) + 2)
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(2))
    assert probabilities[0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_device_and_dtype_follow_the_model_and_features_stay_float32(encoder, images):
    assert (encoder.dtype, encoder.device.type, encoder.image_size) == (torch.float32, "cpu", 32)
    pixels = encoder.prepare(images)
    exact = encoder.encode_image(pixels)
    encoder.to(torch.bfloat16)
    features = encoder.encode_image(pixels)
    assert encoder.dtype == torch.bfloat16
    assert encoder.seen_pixels.dtype == torch.bfloat16
    assert features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=-1), torch.ones(5), atol=1e-6)
    assert torch.allclose(features, exact, atol=0.05)
    assert encoder.encode_text(["a"]).dtype == torch.float32


def test_repr_shows_the_facts_in_one_line(encoder):
    assert repr(encoder) == (
        "LetterEncoder(id='letters', image_size=32, embed_dim=3, context_length=8, dtype=float32, device='cpu')"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0 is no whole number of 1 or more"),
        ({"geometry": "crop"}, "unknown geometry 'crop'; choose one of .*pad-square"),
        ({"interpolation": "nearest"}, "unknown interpolation 'nearest'; choose one of bicubic"),
        ({"std": (0.1, 0.0, 0.1)}, "std above 0"),
        ({"mean": (0.1,)}, "3 values each"),
    ],
)
def test_preprocessing_refuses_wrong_settings(settings, message):
    right = {"image_size": 8, "geometry": "squash", "interpolation": "bicubic", "mean": (0,) * 3, "std": (1,) * 3}
    with pytest.raises(ValueError, match=message):
        Preprocessing(**(right | settings))


def test_tokens_are_checked_sliced_and_trimmed():
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0]])
    tokens = Tokens(ids, ids > 0)
    assert len(tokens) == 2
    assert tokens.trimmed().ids.tolist() == [[5, 6, 0], [5, 6, 7]]
    assert tokens[:1].trimmed().ids.tolist() == [[5, 6]]
    assert tokens.to(torch.device("cpu")).mask.sum() == 5
    with pytest.raises(ValueError, match="token ids must be int64"):
        Tokens(ids.int(), ids > 0)
    with pytest.raises(ValueError, match="token mask must be bool"):
        Tokens(ids, ids)


def test_a_subclass_must_provide_its_four_parts():
    with pytest.raises(TypeError, match="abstract"):
        DualEncoder(id="x", preprocessing=CROP, embed_dim=1, context_length=1, logit_scale=1.0, provenance={})


def test_no_device_is_named_outside_the_registry():
    folder = Path(medrobust_lib.__file__).parent / "models"
    named = [path.name for path in folder.glob("*.py") if '"cuda"' in path.read_text(encoding="utf-8")]
    assert named == []

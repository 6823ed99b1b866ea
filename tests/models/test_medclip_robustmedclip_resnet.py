"""RobustMedCLIP's ResNet: the 1 x 1 paths beside the convolutions, as in the authors' wrapper, merged by us."""

import copy
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision import transforms
from transformers import BertConfig

from medrobust_lib.models import medclip
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.medclip import MedCLIPNetwork, load_medclip, load_robustmedclip_resnet, published_network

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cell", "of", "blood", "platelet", "image"]
TEXTS = ["a blood cell", "image of a platelet"]
SHORT, FULL = "lora_weights.safetensors", "model.pth"
EVERY, THREE_BY_THREE = r"conv1|layer\d\.\d+\.conv[123]", r"layer\d\.\d+\.conv2"
BERT = BertConfig(
    vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class AuthorsConvolution(nn.Module):
    """The authors' wrapper: a low-rank product over the channels of every pixel, resized where the sizes differ."""

    def __init__(self, conv, rank):
        super().__init__()
        self.conv = conv
        self.linear_a = nn.Linear(conv.in_channels, rank, bias=False)
        self.linear_b = nn.Linear(rank, conv.out_channels, bias=False)

    def forward(self, x):
        out = self.conv(x)
        beside = self.linear_b(self.linear_a(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if beside.shape != out.shape:
            beside = functional.interpolate(beside, size=out.shape[2:], mode="nearest")
        return out + beside


class AuthorsModel(nn.Module):
    """Nesting of the authors' classes, which gives the keys of model.pth: every factor is there twice."""

    def __init__(self, network, rank, pattern=EVERY):
        super().__init__()
        tower = copy.deepcopy(network.vision_model)
        self.lora_resnet = nn.Module()
        self.lora_resnet.w_As, self.lora_resnet.w_Bs = nn.ModuleList(), nn.ModuleList()
        for name, layer in list(tower.model.named_modules()):
            if re.fullmatch(pattern, name):
                wrapped = AuthorsConvolution(layer, rank)
                tower.model.set_submodule(name, wrapped)
                self.lora_resnet.w_As.append(wrapped.linear_a)
                self.lora_resnet.w_Bs.append(wrapped.linear_b)
        self.lora_resnet.lora_medclip = tower
        self.text_encoder = network.text_model

    def full_file(self):
        return self.state_dict() | {"text_encoder.model.embeddings.position_ids": torch.arange(8)[None]}

    def short_file(self):
        """What save_lora_parameters writes: the pairs in their order, and the projection."""
        head = self.lora_resnet.lora_medclip.model.fc
        lists = {"a": self.lora_resnet.w_As, "b": self.lora_resnet.w_Bs}
        tensors = {
            f"w_{side}_{number:03d}": layer.weight.detach().clone()
            for side, layers in lists.items()
            for number, layer in enumerate(layers)
        }
        return tensors | {f"fc_{head.in_features}in_{head.out_features}out": head.weight.detach().clone()}

    def image_features(self, normalised):
        with torch.no_grad():
            return functional.normalize(self.lora_resnet.lora_medclip(normalised), dim=-1)


def tiny_network():
    return MedCLIPNetwork((1, 1, 1, 1), BERT, 24)


def moved_statistics(tower, seed):
    """Let batch normalisation see images: in training mode, as the authors leave it."""
    with torch.no_grad():
        tower.train()(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    tower.eval()


@pytest.fixture(scope="module")
def base():
    network = tiny_network()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        network.logit_scale.fill_(2.5)
    moved_statistics(network.vision_model, 1)
    return network.eval()


@pytest.fixture(scope="module", params=[EVERY, THREE_BY_THREE], ids=["every convolution", "3 x 3"])
def authors(base, request):
    model = AuthorsModel(base, rank=3, pattern=request.param)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in (*model.lora_resnet.w_As, *model.lora_resnet.w_Bs):
            layer.weight.copy_(0.5 * torch.randn(layer.weight.shape, generator=generator) / len(layer.weight[0]) ** 0.5)
    moved_statistics(model.lora_resnet.lora_medclip, 3)
    return model.eval()


@pytest.fixture
def weights_dir(base, tmp_path):
    write_medclip(base, tmp_path / "medclip-rn50")
    (tmp_path / "robustmedclip-rn50").mkdir()
    return tmp_path


def write_medclip(network, folder):
    folder.mkdir(exist_ok=True)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")


def write(weights_dir, name, tensors):
    path = weights_dir / "robustmedclip-rn50" / name
    torch.save(tensors, path) if name == FULL else save_file(tensors, path)


def load(weights_dir, loader=load_robustmedclip_resnet, id="robustmedclip-rn50"):
    with patch.object(medclip, "published_network", lambda id: tiny_network()):
        return loader(find_model(id), weights_dir=weights_dir, offline=True)


def normalised(pixels):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def random_pixels(side=224):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def test_full_checkpoint_gives_the_authors_features(authors, base, weights_dir, recwarn):
    write(weights_dir, FULL, authors.full_file())
    write(weights_dir, SHORT, {"w_a_000": torch.zeros(1)})
    model, pixels = load(weights_dir), random_pixels()
    assert not [warning for warning in recwarn if "published model" in str(warning.message)]
    features = model.encode_image(pixels)
    assert torch.allclose(features, authors.image_features(normalised(pixels)), atol=1e-5, rtol=0)
    assert torch.allclose(model.encode_image(pixels[:1]), features[:1], atol=1e-5, rtol=0), "no batch statistics"
    medclip_itself = load(weights_dir, load_medclip, "medclip-rn50")
    assert torch.equal(model.encode_text(TEXTS), medclip_itself.encode_text(TEXTS))
    with torch.no_grad():
        without = functional.normalize(base.vision_model(normalised(pixels)), dim=-1)
    assert (features - without).abs().max() > 1e-2
    assert model.logit_scale == pytest.approx(torch.tensor(2.5).exp().item())
    assert set(model.network.state_dict()) == set(base.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_images_are_prepared_as_in_the_authors_code(authors, weights_dir):
    write(weights_dir, FULL, authors.full_file())
    model = load(weights_dir)
    theirs = transforms.Compose([
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8))
    expected = theirs(image)[None]
    assert torch.allclose(normalised(model.prepare([image])), expected, atol=1e-5)
    assert torch.allclose(model.encode_image(model.prepare([image])), authors.image_features(expected), atol=1e-5)


def test_short_file_lacks_the_statistics_and_warns(authors, base, weights_dir):
    write(weights_dir, SHORT, authors.short_file())
    with pytest.warns(UserWarning, match=r"no statistics of batch normalisation; MedCLIP's are used.*model\.pth"):
        model = load(weights_dir)
    pixels = random_pixels()
    features = model.encode_image(pixels)
    assert (features - authors.image_features(normalised(pixels))).abs().max() > 1e-3, "the statistics matter"
    before = copy.deepcopy(authors)
    tower = before.lora_resnet.lora_medclip
    statistics = {key: value for key, value in base.vision_model.state_dict().items() if "running" in key}
    assert not tower.load_state_dict(statistics, strict=False).unexpected_keys
    assert torch.allclose(features, before.image_features(normalised(pixels)), atol=1e-5, rtol=0)


def test_projection_in_the_short_file_is_used(authors, weights_dir):
    tensors = authors.short_file()
    write(weights_dir, SHORT, tensors)
    with pytest.warns(UserWarning):
        before = load(weights_dir).encode_image(random_pixels())
    head = next(key for key in tensors if key.startswith("fc_"))
    write(weights_dir, SHORT, tensors | {head: -tensors[head]})
    with pytest.warns(UserWarning):
        assert torch.allclose(load(weights_dir).encode_image(random_pixels()), -before, atol=1e-6)


def test_the_middle_of_a_kernel_is_the_nearest_pixel_for_even_rows_only():
    """Kernel and stride of conv1 and of conv2 where a stage begins, and the sizes of their inputs at 224 px."""
    generator = torch.Generator().manual_seed(5)
    for kernel, side in ((7, 224), (3, 56), (3, 28), (3, 14), (3, 15)):
        layer = AuthorsConvolution(nn.Conv2d(4, 6, kernel, 2, kernel // 2, bias=False), rank=2)
        merged = copy.deepcopy(layer.conv)
        x = torch.randn(1, 4, side, side, generator=generator)
        with torch.no_grad():
            merged.weight[:, :, kernel // 2, kernel // 2] += layer.linear_b.weight @ layer.linear_a.weight
            assert torch.allclose(merged(x), layer(x), atol=1e-5) == (side % 2 == 0)


def test_the_published_adapters_in_number_and_order():
    with torch.device("meta"):
        network = published_network("robustmedclip-rn50")
        model = AuthorsModel(network, rank=16)
    assert len(model.lora_resnet.w_As) == 49
    factors = (*model.lora_resnet.w_As.parameters(), *model.lora_resnet.w_Bs.parameters())
    assert sum(factor.numel() for factor in factors) == 694_320
    assert sum(parameter.numel() for parameter in network.parameters()) == find_model("robustmedclip-rn50").parameters
    names = [name for name, layer in network.vision_model.model.named_modules() if isinstance(layer, nn.Conv2d)]
    assert [name for name in names if "downsample" not in name] == [n for n in names if re.fullmatch(EVERY, n)]


def test_medclip_may_lie_beside_the_adapters(authors, base, tmp_path):
    write_medclip(base, tmp_path / "robustmedclip-rn50")
    write(tmp_path, FULL, authors.full_file())
    model = load(tmp_path)
    assert (model.id, model.provenance["base"]["id"]) == ("robustmedclip-rn50", "medclip-rn50")
    assert set(model.provenance["files"]) == {FULL}
    assert set(model.provenance["base"]["files"]) == {"pytorch_model.bin", "vocab.txt"}


PREFIX = "lora_resnet.lora_medclip.model."


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("text_encoder.projection_head.weight", {}, r"1 missing keys: text_model\.projection_head\.weight"),
        (PREFIX + "bn1.running_mean", {}, r"1 missing keys: vision_model\.model\.bn1\.running_mean"),
        (None, {"teacher.weight": torch.zeros(1)}, r"1 unexpected keys: teacher\.weight"),
        (PREFIX + "layer2.0.conv2.linear_b.weight", {}, r"incomplete.*: vision_model\.model\.layer2\.0\.conv2$"),
        (
            None,
            {f"{PREFIX}layer1.0.downsample.0.linear_{side}.weight": torch.zeros(2, 2) for side in "ab"},
            r"no layer of the network: vision_model\.model\.layer1\.0\.downsample\.0$",
        ),
        (
            None,
            {PREFIX + "layer1.0.conv2.linear_a.weight": torch.zeros(3, 9)},
            r"conv2 has A \(3, 9\) and B \(64, 3\), not A \(r, 64\)",
        ),
        (
            None,
            {PREFIX + "layer1.0.conv2.linear_a.weight": torch.full((3, 64), torch.nan)},
            r"the adapter of vision_model\.model\.layer1\.0\.conv2 holds NaN or infinite values",
        ),
    ],
)
def test_a_broken_full_checkpoint_is_refused(authors, weights_dir, drop, add, message):
    tensors = {key: value for key, value in authors.full_file().items() if key != drop} | add
    write(weights_dir, FULL, tensors)
    with pytest.raises(ValueError, match=message):
        load(weights_dir)


def test_a_short_file_of_another_tower_is_refused(weights_dir):
    write(weights_dir, SHORT, {f"w_{side}_{n:03d}": torch.zeros(2, 2) for side in "ab" for n in range(5)})
    with pytest.raises(ValueError, match="holds 5 adapter pairs; this image tower needs 4 or 13"):
        load(weights_dir)


def test_missing_adapters_name_places_and_command(weights_dir):
    with pytest.raises(FileNotFoundError, match=r"model\.pth.*fetch_weights\.py robustmedclip-rn50"):
        load(weights_dir)

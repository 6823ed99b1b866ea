"""What docs/adapters.md says: its Python runs as written, and its numbers are those of the layouts."""

import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import medrobust_lib as mr  # before torchvision-based packages

# isort: split
import open_clip
import pytest
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from torch import nn
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib.data import splits
from medrobust_lib.models.adapters import (
    adapter_layout,
    adapter_parameters,
    attach_adapters,
    attached_adapters,
    trainable_share,
)
from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.medclip import MedCLIPNetwork

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
RANKS = (4, 8, 16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors are slower on several threads, above all beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ImageTower(DualEncoder):
    """An image tower of full size beside a text tower without parameters."""

    def __init__(self, tower, encode):
        super().__init__(
            id="tower",
            preprocessing=Preprocessing(224, "squash", "bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
            embed_dim=512,
            context_length=4,
            logit_scale=1.0,
            provenance={},
        )
        self.tower, self.encode = tower, encode
        self.eval()

    def _image_features(self, pixels):
        return self.encode(self.tower(pixels))

    def tokenize(self, texts):
        return Tokens(torch.ones(len(texts), 4, dtype=torch.int64), torch.ones(len(texts), 4, dtype=torch.bool))

    def embed_tokens(self, tokens):
        return tokens.ids[..., None].float().expand(-1, -1, self.embed_dim)

    def _text_features(self, embeddings, tokens):
        return embeddings.sum(dim=1)


def timm_tower():
    vision = CLIPVisionCfg(timm_model_name="vit_base_patch16_224", timm_pool="", timm_proj="linear", image_size=224)
    return open_clip.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=CLIPTextCfg(layers=1)).visual


def unimed_tower():
    return open_clip.CLIP(embed_dim=512, vision_cfg=CLIPVisionCfg(), text_cfg=CLIPTextCfg(layers=1)).visual


def medclip_tower(vision):
    return MedCLIPNetwork(vision, BertConfig(num_hidden_layers=1)).vision_model


TOWERS = {
    "clip-vit-b16": lambda: open_clip.create_model("ViT-B-16-quickgelu", device="meta").visual,
    "clip-rn50": lambda: open_clip.create_model("RN50-quickgelu", device="meta").visual,
    "plip": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=768, num_attention_heads=12,
        intermediate_size=3072, patch_size=32)),
    "quilt-b32": lambda: open_clip.create_model("ViT-B-32-quickgelu", device="meta").visual,
    "biomedclip": timm_tower,
    "medclip-vit": lambda: medclip_tower(SwinConfig()),
    "medclip-rn50": lambda: medclip_tower((3, 4, 6, 3)),
    "unimedclip": unimed_tower,
    # The two largest have patches of 56 px here: a hundredth of the arithmetic, and 3 % more numbers.
    "bmc-clip": lambda: open_clip.CLIP(embed_dim=768, text_cfg=CLIPTextCfg(layers=1),
        vision_cfg=CLIPVisionCfg(layers=24, width=1024, patch_size=56)).visual,
    "siglip2-base": lambda: SiglipVisionModel(SiglipVisionConfig()),
    "medsiglip-448": lambda: SiglipVisionModel(SiglipVisionConfig(hidden_size=1152, num_attention_heads=16,
        intermediate_size=4304, num_hidden_layers=27, patch_size=56)),
}  # fmt: skip


@pytest.fixture(scope="module")
def hollow():
    path = Path(__file__).parent / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("model_builders", path)
    builders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builders)
    return builders.hollow


def published(id, hollow):
    """Model of a row: the demo models themselves, or the image tower of the public one at full size, all zeros."""
    if id.startswith("demo-clip"):
        return mr.load_model(id, device="cpu")
    tower = hollow(TOWERS[id])
    return ImageTower(tower, lambda found: getattr(found, "image_embeds", getattr(found, "pooler_output", found)))


def numbers_of(model, rank):
    """Adapter parameters in closed form: r (inputs + outputs) of each layer, three of them for a fused projection."""
    layout, total = adapter_layout(model), 0
    for name in layout.names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            total += rank * (layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1] + layer.out_channels)
        else:
            width = layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else layer.in_features
            total += (3 if layout.fused else 1) * rank * 2 * width
    return total


def table():
    """Cells of the table of models, by model."""
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    return {id: [cell.strip() for cell in cells] for first, *cells in lines for id in re.findall(r"`([^`]+)`", first)}


def test_the_table_has_every_model():
    assert set(table()) == set(mr.list_models()["id"])
    # The same towers once their adapters are merged.
    assert table()["pubmedclip"] == table()["plip"]
    assert table()["robustmedclip"] == table()["biomedclip"]
    assert table()["robustmedclip-rn50"] == table()["medclip-rn50"]


@pytest.mark.parametrize("id", ["demo-clip", "demo-clip-vit", *TOWERS])
def test_the_table_tells_the_layout_and_the_numbers(id, hollow):
    _, kind, number, *numbers, share = table()[id]
    model = published(id, hollow)
    layout = adapter_layout(model)
    assert kind == {"convolutions": "convolutions", "query, key, value": "queries, keys, values"}[layout.kind]
    assert int(number) == len(layout.names) * (3 if layout.fused else 1)
    assert numbers == [f"{numbers_of(model, rank):,}" for rank in RANKS]
    whole = id.startswith("demo-clip")  # of the others the image tower alone is built
    tower = trainable_share(model).image_tower if whole else sum(p.numel() for p in model.parameters())
    assert share == f"{100 * numbers_of(model, 16) / tower:.1f} %"


@pytest.mark.parametrize("id", ["demo-clip", "medclip-rn50"])
def test_attached_adapters_have_the_numbers_of_the_table(id, hollow):
    model = published(id, hollow)
    found = sum(parameter.numel() for parameter in adapter_parameters(attach_adapters(model, rank=16)).values())
    assert f"{found:,}" == table()[id][5]


def test_other_numbers_of_the_page():
    blocks, width, rank = 12, 768, 16
    assert f"{blocks * rank * (width + 3 * width):,} numbers at rank 16, and all three share A" in PAGE
    # The authors' parallel path: one 1 x 1 pair for each of the 49 convolutions of a ResNet-50 but for its shortcuts.
    channels, sizes = 64, [(3, 64)]
    for stage, count in enumerate((3, 4, 6, 3)):
        for _ in range(count):
            inner = 64 * 2**stage
            sizes += [(channels, inner), (inner, inner), (inner, 4 * inner)]
            channels = 4 * inner
    assert f"{rank * sum(a + b for a, b in sizes):,} numbers at rank 16; it sees no neighbourhood" in PAGE


def test_the_estimates_follow_from_what_they_name():
    assert f"{find_model('biomedclip').parameters / 1e6:.1f} million × 4 bytes = 0.8 GB" in PAGE
    visits = (55 + 471) * 20
    assert f"{visits:,} image visits" in PAGE
    assert f"{visits * 1.17 / 3600:.1f} hours ({visits:,} × 1.17 s)" in PAGE
    assert f"{3 * 4 * 86_191_872 / 1e6:,.0f} MB | 118 MB" in PAGE
    assert 32 * 0.081 + 0.8 + 0.4 + 0.5 < 5
    assert 6 < 32 * 0.118 + 0.8 + 0.4 + 1.0 + 0.5 < 7


def test_the_python_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "fraction_splits", functools.cache(splits.fraction_splits))  # drawn once
    assert len(PYTHON) == 3
    scope: dict = {}
    for code in PYTHON:
        exec(compile(code, "docs/adapters.md", "exec"), scope)
    folder = tmp_path / "adapters" / "breast-and-oct"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "provenance.json",
    }  # fmt: skip
    assert not folder.with_name("breast-and-oct.training").exists()
    history = scope["adapted"].history
    assert scope["adapted"].best_epoch > 0
    assert history.val_mean.max() > history.val_mean[0]
    assert "val_balanced_accuracy" in capsys.readouterr().out
    assert scope["tower"].id == "demo-clip + breast-and-oct"
    assert (attached_adapters(scope["tower"]), attached_adapters(scope["adapted"].model).rank) == (None, 16)
    assert (scope["answers"].cpu().numpy() == scope["test"].labels).mean() > 0.6
    # Killed or finished, the same call gives the same adapter.
    before = (folder / "adapter_model.safetensors").read_bytes()
    exec(compile(PYTHON[0], "docs/adapters.md", "exec"), scope)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert scope["adapted"].history.equals(history)


def test_names_and_files_of_the_page_exist():
    modules = [importlib.import_module(name) for name in set(re.findall(r"`(medrobust_lib[\w.]+)`", PAGE))]
    for name in ("adapter_layout", "trainable_share", "attach_adapters", "load_adapter", "merge_adapters"):
        assert f"`{name}" in PAGE or f"({name}" in PAGE
        assert [module for module in modules if hasattr(module, name)]
    for command in re.findall(r"`python ([\w/.]+)", PAGE):
        assert (ROOT / command).is_file()
    assert (ROOT / "benchmarks" / "adaptation.py").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_have_the_parameters_that_are_shown(command):
    program, name, number, *words = shlex.split(command)
    assert (program, name) == ("medrobust", "run")
    described = CliRunner().invoke(cli.app, ["run", number, "--describe"], env={"COLUMNS": "200"}).output
    assert words[::2] == ["-p"] * (len(words) // 2)
    for assignment in words[1::2]:
        assert f"{assignment.split('=')[0]}: " in described

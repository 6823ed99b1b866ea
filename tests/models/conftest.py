"""Tiny models with random weights in the file layouts of the public ones, and a hub cache to put them in."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import BertConfig, CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SwinConfig

from medrobust_lib.models.adapters import adapter_parameters, attach_adapters
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.loading import load_model
from medrobust_lib.models.medclip import MedCLIPEncoder, MedCLIPNetwork
from medrobust_lib.smoothing import prompts

WORDS = ["a", "an", "image", "of", "tissue", "lymphocytes", "debris", "histology", "patch", ".", ","]
REVISION = "0123456789abcdef0123456789abcdef01234567"


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights whose features differ between inputs: fresh towers start with many zeros and tiny values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def images() -> np.ndarray:
    """Five random RGB images of 40 x 40 pixels."""
    return np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)


@pytest.fixture
def texts() -> list[str]:
    """Texts of different lengths."""
    return ["an image of debris.", "a histology patch of tissue, of lymphocytes", "tissue"]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Function giving the snapshot folder of a repository in an otherwise empty hub cache."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def snapshot(repository: str) -> Path:
        root = cache / f"models--{repository.replace('/', '--')}"
        folder = root / "snapshots" / REVISION
        folder.mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(REVISION)
        return folder

    return snapshot


def write_word_tokenizer(folder: Path, *, context_length: int, padding: str = "[PAD]") -> int:
    """A lower-casing word tokenizer with start and end tokens; the end token has the highest id, as in CLIP."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS, "[BOS]", "[EOS]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        special_tokens=[("[BOS]", vocabulary["[BOS]"]), ("[EOS]", vocabulary["[EOS]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=padding,
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=context_length,
    ).save_pretrained(folder)
    return len(vocabulary)


def write_word_pieces(folder: Path) -> int:
    """BERT's ``vocab.txt`` and ``tokenizer_config.json`` with a handful of words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *WORDS, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    return len(pieces)


def tiny_configuration(vocabulary: int, *, context_length: int = 16, **text: object) -> dict:
    """open_clip's configuration of a native CLIP with one layer in each tower."""
    return {
        "model_cfg": {
            "embed_dim": 24,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
            "text_cfg": {
                "context_length": context_length,
                "vocab_size": vocabulary,
                "width": 32,
                "heads": 2,
                "layers": 2,
                **text,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]},
    }


def write_weights(folder: Path, configuration: dict, *, name: str = "open_clip_model.safetensors") -> None:
    """Configuration and random weights of a model in open_clip's layout."""
    (folder / "open_clip_config.json").write_text(json.dumps(configuration))
    model = randomise(open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False))
    if name.endswith(".safetensors"):
        save_file(model.state_dict(), folder / name)
    else:
        torch.save(model.state_dict(), folder / name)


@pytest.fixture
def demo_folder(tmp_path: Path) -> Path:
    """A native CLIP with an own small vocabulary beside it: the layout of demo-clip."""
    folder = tmp_path / "a folder" / "clip"
    folder.mkdir(parents=True)
    size = write_word_tokenizer(folder, context_length=16)
    write_weights(folder, tiny_configuration(size, hf_tokenizer_name="beside the weights"))
    return folder


def biomedclip_configuration(bert: str, *, vision: str = "test_vit", image_size: int = 160) -> dict:
    """The configuration that BiomedCLIP publishes, with other towers."""
    return {
        "model_cfg": {
            "embed_dim": 512,
            "vision_cfg": {
                "timm_model_name": vision,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": image_size,
            },
            "text_cfg": {
                "hf_model_name": bert,
                "hf_tokenizer_name": bert,
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 256,
            },
        },
        "preprocess_cfg": {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
        },
    }


def write_bert(folder: Path) -> None:
    """Configuration and tokenizer of a tiny BERT, as the hub repository of a text tower has them."""
    size = write_word_pieces(folder)
    BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(folder)


def write_plip(folder: Path, *, end_token: int, safetensors: bool, merges: bool = True) -> None:
    """A tiny ``CLIPModel`` in the layout of vinid/plip, with CLIP's real vocabulary or, to load sooner, its bytes only.

    The checkpoint keeps the ``position_ids`` that transformers stored when PLIP was published.
    """
    tokenizer = SimpleTokenizer()
    # open_clip spells the names of the two special tokens differently.
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = [names.get(token, token) for token in tokenizer.encoder]
    vocabulary = {token: place for place, token in enumerate(tokens if merges else [*tokens[:512], *names.values()])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    pairs = [" ".join(pair) for pair in tokenizer.bpe_ranks] if merges else []
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 32,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": list(open_clip.OPENAI_DATASET_MEAN),
                "image_std": list(open_clip.OPENAI_DATASET_STD),
                "resample": 3,
                "size": 32,
            }
        )
    )
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    model = randomise(
        CLIPModel(
            CLIPConfig(
                text_config={
                    **layers,
                    "vocab_size": len(vocabulary),
                    "bos_token_id": 0,
                    "eos_token_id": end_token,
                    "pad_token_id": 1,
                },
                vision_config={**layers, "image_size": 32, "patch_size": 8},
                projection_dim=24,
            )
        )
    )
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    if safetensors:
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        return
    old = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save({**model.state_dict(), **old}, folder / "pytorch_model.bin")


@pytest.fixture(scope="session")
def plip_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function giving a PLIP folder that is made once; copy it before changing anything."""

    @functools.cache
    def made(end_token: int, safetensors: bool, merges: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("plip")
        write_plip(folder, end_token=end_token, safetensors=safetensors, merges=merges)
        return folder

    return made


KINDS = ("timm ViT", "open_clip ViT", "HF CLIP", "HF Swin", "torchvision ResNet", "CLIP ResNet")
FORMS = [*((kind, "separate") for kind in KINDS), ("timm ViT", "fused"), ("open_clip ViT", "fused")]


def medclip(vision: SwinConfig | tuple[int, ...], folder: Path, *, image_size: int) -> MedCLIPEncoder:
    """MedCLIP's layout with a tiny text tower; a tuple is the number of blocks in the stages of a ResNet."""
    words = write_word_pieces(folder)
    bert = BertConfig(
        vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    network = MedCLIPNetwork(vision, bert, embed_dim=24)
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    return MedCLIPEncoder(network, tokenizer, id="medclip", image_size=image_size, provenance={"source": "this test"})


@pytest.fixture(scope="session")
def loaded(
    plip_folders: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, model: DualEncoder
) -> Callable[[str], DualEncoder]:
    """Function giving a tiny model of one of `KINDS`, made once; none of the functions under test may change it."""

    @functools.cache
    def made(kind: str) -> DualEncoder:
        folder = tmp_path_factory.mktemp("models")
        torch.manual_seed(0)
        if kind == "timm ViT":
            write_bert(folder)
            write_weights(folder, biomedclip_configuration(str(folder)))
        elif kind == "open_clip ViT":
            size = write_word_tokenizer(folder, context_length=16)
            write_weights(folder, tiny_configuration(size, hf_tokenizer_name="beside"))
        elif kind == "HF CLIP":
            shutil.copytree(plip_folders(2, True, merges=False), folder / "plip")
            return load_model("plip", device="cpu", weights_dir=folder)
        elif kind == "HF Swin":
            swin = SwinConfig(image_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=7)
            return randomise(medclip(swin, folder, image_size=56)).requires_grad_(False)
        elif kind == "torchvision ResNet":
            return randomise(medclip((1, 1, 1, 1), folder, image_size=64)).requires_grad_(False)
        else:
            return model
        return load_model(f"local-dir:{folder}", device="cpu")

    return made


def hollow(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A network of full size whose zeros take no time to draw."""
    with torch.device("meta"):
        network = build()
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    return network


@pytest.fixture
def kinds() -> tuple[str, ...]:
    """Every kind of image tower that adapters go on."""
    return KINDS


@pytest.fixture(params=KINDS)
def each_kind(request: pytest.FixtureRequest) -> str:
    """Every kind of image tower."""
    return request.param


@pytest.fixture(params=FORMS, ids="-".join)
def form(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every kind of image tower, with separate adapters and, where there is a fused projection, with a fused one."""
    return request.param


@pytest.fixture
def demo(loaded: Callable[[str], DualEncoder]) -> DualEncoder:
    """demo-clip, not to be changed."""
    return loaded("CLIP ResNet")


@pytest.fixture(scope="session")
def pixels() -> Callable[[DualEncoder], torch.Tensor]:
    """Function giving three random images in a model's size."""

    def drawn(model: DualEncoder) -> torch.Tensor:
        size = model.image_size
        return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))

    return drawn


@pytest.fixture(scope="session")
def trained(pixels: Callable[[DualEncoder], torch.Tensor]) -> Callable[..., DualEncoder]:
    """Function giving a model whose adapters took a few optimiser steps on random targets, not to be changed."""

    @functools.cache
    def train(model: DualEncoder, **options: object) -> DualEncoder:
        adapted = attach_adapters(model, **{"rank": 4, **options})
        images, generator = pixels(adapted), torch.Generator().manual_seed(2)
        targets = functional.normalize(torch.randn(3, model.embed_dim, generator=generator), dim=1)
        optimiser = torch.optim.AdamW(adapter_parameters(adapted).values(), lr=1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            (-(adapted.encode_image(images) * targets).sum()).backward()
            optimiser.step()
        return adapted

    return train


@pytest.fixture
def check_prompts() -> Callable[[DualEncoder], None]:
    """What prompt learning needs of a back end, whatever its tokenizer."""

    def check(model: DualEncoder) -> None:
        classes = ("tissue", "lymphocytes of tissue")
        written = prompts.text_prompts(model, classes, "an image of {}.")
        expected = model.encode_text(["an image of tissue.", "an image of lymphocytes of tissue."])
        assert torch.equal(written.class_features(model), expected)
        assert (expected[0] - expected[1]).abs().max() > 1e-4
        for position in ("end", "middle", "front"):
            frame = prompts.empty_frame(model, classes, n_context=3, position=position)
            generator = torch.Generator().manual_seed(0)
            shared = torch.randn(3, frame.embeddings.shape[2], generator=generator).requires_grad_(True)
            features = frame.features(model, shared)
            assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-5)
            (gradient,) = torch.autograd.grad(features[0, 0] + features[1, 1], shared)
            assert (gradient.abs().sum(dim=1) > 0).all(), position
            own = shared.detach().expand(2, -1, -1).clone()
            assert torch.allclose(frame.features(model, own), features, atol=1e-6)
            own[1] = -own[1]  # a constant shift would vanish in layer normalisation
            moved = frame.features(model, own) - features
            assert moved[0].abs().max() < 1e-6 < 1e-4 < moved[1].abs().max()
        with pytest.raises(ValueError, match="reads at most"):
            prompts.empty_frame(model, classes, n_context=model.context_length)

    return check


@pytest.fixture(scope="session")
def builders() -> type:
    """The functions above, for test modules (which cannot import each other)."""

    class Builders:
        biomedclip_configuration = staticmethod(biomedclip_configuration)
        hollow = staticmethod(hollow)
        medclip = staticmethod(medclip)
        randomise = staticmethod(randomise)
        tiny_configuration = staticmethod(tiny_configuration)
        write_bert = staticmethod(write_bert)
        write_weights = staticmethod(write_weights)
        write_word_tokenizer = staticmethod(write_word_tokenizer)

    return Builders

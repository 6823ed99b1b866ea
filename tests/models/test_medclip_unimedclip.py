"""UniMed-CLIP: a checkpoint in the layout of the authors' fork against a forward pass written out here."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from medrobust_lib.models import medclip
from medrobust_lib.models.loading import find_model
from medrobust_lib.models.medclip import convert_state_dict, load_unimedclip
from medrobust_lib.models.open_clip import build_folder

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fundus", "photo", "of", "retina", "with", "drus"),
    *("##en", ",", "normal", "Normal"),
]
TEXTS = ["a fundus photo of retina with drusen", "Normal", "retina, normal"]
WIDTH, LAYERS, PATCH, SIZE, DIM = 64, 2, 8, 32, 24
CONTEXT = 20
VISION = {"image_size": SIZE, "layers": LAYERS, "width": WIDTH, "head_width": 16, "patch_size": PATCH}
TEXT = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)


def visual_shapes(width, layers, patch, size, dim):
    """Tensors of the fork's image tower: OpenAI's vision transformer."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": ((size // patch) ** 2 + 1, width),
        "proj": (width, dim),
        "conv1.weight": (width, 3, patch, patch),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}."
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}mlp.c_fc.weight": (4 * width, width),
            f"{block}mlp.c_fc.bias": (4 * width,),
            f"{block}mlp.c_proj.weight": (width, 4 * width),
            f"{block}mlp.c_proj.bias": (width,),
        }
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
    return {f"visual.{key}": shape for key, shape in shapes.items()}


def fork_image_features(tensors, pixels):
    """The fork's image tower: pre-norm blocks, QuickGELU, class token, projection."""

    def norm(x, name):
        return functional.layer_norm(x, (WIDTH,), tensors[f"visual.{name}.weight"], tensors[f"visual.{name}.bias"])

    x = functional.conv2d(pixels, tensors["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([tensors["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(x + tensors["visual.positional_embedding"], "ln_pre")
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}"
        part = {key: tensors[f"visual.{block}.{key}"] for key in ("attn.in_proj_weight", "attn.in_proj_bias")}
        qkv = functional.linear(norm(x, f"{block}.ln_1"), *part.values())
        q, k, v = (third.unflatten(-1, (4, -1)).transpose(1, 2) for third in qkv.chunk(3, dim=-1))
        attended = ((q @ k.transpose(-1, -2) / 4).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + functional.linear(
            attended,
            tensors[f"visual.{block}.attn.out_proj.weight"],
            tensors[f"visual.{block}.attn.out_proj.bias"],
        )
        inner = functional.linear(
            norm(x, f"{block}.ln_2"),
            tensors[f"visual.{block}.mlp.c_fc.weight"],
            tensors[f"visual.{block}.mlp.c_fc.bias"],
        )
        inner = inner * torch.sigmoid(1.702 * inner)
        x = x + functional.linear(
            inner, tensors[f"visual.{block}.mlp.c_proj.weight"], tensors[f"visual.{block}.mlp.c_proj.bias"]
        )
    return functional.normalize(norm(x[:, 0], "ln_post") @ tensors["visual.proj"], dim=-1)


def fork_text_features(bert, tensors, ids):
    """The fork's text tower: BERT, first token of the last layer, two linear maps with a GELU between."""
    first = bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
    inner = functional.gelu(first @ tensors["text_encoder.proj.0.weight"].T)
    return functional.normalize(inner @ tensors["text_encoder.proj.2.weight"].T, dim=-1)


@pytest.fixture(scope="module")
def fork():
    """Random tensors in the fork's layout, and the BERT that belongs to them."""
    generator = torch.Generator().manual_seed(0)
    shapes = visual_shapes(WIDTH, LAYERS, PATCH, SIZE, DIM)
    shapes |= {"text_encoder.proj.0.weight": (28, 32), "text_encoder.proj.2.weight": (DIM, 28)}
    tensors = {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    bert = BertModel(TEXT, add_pooling_layer=False).eval().requires_grad_(False)
    for tensor in bert.parameters():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    tensors |= {f"text_encoder.transformer.{key}": value for key, value in bert.state_dict().items()}
    tensors["text_encoder.transformer.embeddings.position_ids"] = torch.arange(64)[None]
    tensors["logit_scale"] = torch.tensor(2.5)
    return tensors, bert


def write_weights(root, content, words=WORDS):
    folder = root / "unimedclip"
    folder.mkdir(parents=True)
    torch.save(content, folder / "unimed_clip_vit_b16.pt")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return root


def load(root, mode=0o755):
    """The model at a fraction of its size, from an installation whose folder has this mode."""
    folder = root / "tiny"
    shutil.copytree(medclip.UNIMED_FOLDER, folder, dirs_exist_ok=True)
    TEXT.save_pretrained(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"embed_dim": DIM, "vision_cfg": VISION}
    config["model_cfg"]["text_cfg"]["context_length"] = CONTEXT
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    folder.chmod(mode)
    with patch.object(medclip, "UNIMED_FOLDER", folder):
        return load_unimedclip(find_model("unimedclip"), weights_dir=root, offline=True)


@pytest.fixture(scope="module")
def model(fork, tmp_path_factory):
    training_checkpoint = {
        "epoch": 10,
        "name": "run",
        "state_dict": {f"module.{key}": value for key, value in fork[0].items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
    }
    return load(write_weights(tmp_path_factory.mktemp("weights"), training_checkpoint))


def test_image_features_equal_the_fork(model, fork):
    pixels = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    features = model.encode_image(pixels)
    assert torch.allclose(features, fork_image_features(fork[0], (pixels - mean) / std), atol=1e-5, rtol=0)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_text_features_equal_the_fork(model, fork):
    tokens = model.tokenize(TEXTS)
    padded = functional.pad(tokens.ids, (0, CONTEXT - tokens.ids.shape[1]))
    expected = fork_text_features(fork[1], fork[0], padded)
    assert torch.allclose(model.encode_text(TEXTS), expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    embeddings = model.embed_tokens(tokens)
    assert torch.allclose(model.encode_embeddings(embeddings, tokens), expected, atol=1e-5, rtol=0)


def test_tokens_are_lower_cased(model):
    assert model.tokenize(["Normal"]).ids[0].tolist() == [2, WORDS.index("normal"), 3]


def test_facts(model):
    assert model.id == "unimedclip"
    assert model.logit_scale == pytest.approx(torch.tensor(2.5).exp().item())
    assert model.context_length == 20
    assert model.preprocessing.geometry == "shortest-edge-crop"
    assert model.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
    assert set(model.provenance["files"]) == {"unimed_clip_vit_b16.pt", "vocab.txt"}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_full_size_layout(tmp_path):
    folder = shutil.copytree(medclip.UNIMED_FOLDER, tmp_path / "full")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    network, tokenizer = build_folder(folder)
    with torch.device("meta"):
        bert = BertModel(BertConfig(vocab_size=30_522), add_pooling_layer=False)
    fork_shapes = visual_shapes(768, 12, 16, 224, 512)
    fork_shapes |= {f"text_encoder.transformer.{key}": t.shape for key, t in bert.state_dict().items()}
    fork_shapes |= {"text_encoder.proj.0.weight": (640, 768), "text_encoder.proj.2.weight": (512, 640)}
    fork_shapes["logit_scale"] = ()
    file = {key: torch.empty(shape, device="meta") for key, shape in fork_shapes.items()}
    file["text_encoder.transformer.embeddings.position_ids"] = torch.empty(1, 512, device="meta")
    expected = network.state_dict()
    converted = convert_state_dict(file, expected=expected)
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in expected.items()}
    assert sum(p.numel() for p in network.visual.parameters()) == 86_192_640
    assert sum(p.numel() for p in network.parameters()) == 86_192_640 + 108_891_648 + 819_200 + 1
    assert tokenizer.context_length == 256


def test_the_mode_of_a_read_only_installation_is_not_taken_over(fork, tmp_path, monkeypatch):
    modes = []

    def build(folder):
        modes.append(folder.stat().st_mode & 0o777)
        return build_folder(folder)

    monkeypatch.setattr(medclip, "build_folder", build)
    load(write_weights(tmp_path, fork[0]), mode=0o555)
    assert modes == [0o700]


def test_unknown_and_missing_keys_are_listed(fork, tmp_path):
    broken = {key: t for key, t in fork[0].items() if not key.startswith("text_encoder.transformer.encoder.layer.1")}
    broken |= {"token_embedding.weight": torch.zeros(1), "text_encoder.adapter.bias": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"16 missing keys: text\.transformer\.encoder\.layer\.1.* and 6 more"
    ) as error:
        load(write_weights(tmp_path, broken))
    assert "2 unexpected keys: text.adapter.bias, token_embedding.weight" in str(error.value)
    assert "unimed_clip_vit_b16.pt" in str(error.value)


def test_missing_weights_name_places_and_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_scripts/fetch_weights\.py unimedclip") as error:
        load(tmp_path)
    assert str(tmp_path / "unimedclip" / "unimed_clip_vit_b16.pt") in str(error.value)


def test_wrong_vocabulary_size_is_refused(fork, tmp_path):
    with pytest.raises(ValueError, match=r"vocab\.txt holds 5 tokens, but 16 expected"):
        load(write_weights(tmp_path, fork[0], words=WORDS[:5]))


def test_a_checkpoint_that_is_no_state_dict(tmp_path):
    with pytest.raises(ValueError, match=r"is no state dict: 'epoch' is of type int"):
        load(write_weights(tmp_path, {"epoch": 3, "model": {}}))


def test_too_long_a_text_is_refused(model):
    with pytest.raises(ValueError, match=r"32 tokens.*at most 20"):
        model.encode_text(["retina " * 30])


def test_prompts_can_be_learned(model, check_prompts):
    check_prompts(model)

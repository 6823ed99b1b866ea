"""The weights and data that the protocols name, in the layouts of the public files: random weights, drawn images.

Weights lie where `data_scripts/fetch_weights.py` puts them, data where the scripts leave them. Where a loader knows the
size of its network, `fraction_of_their_size` makes it small while the layout stays.
"""

import contextlib
import functools
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import open_clip
import pytest
import torch
import yaml
from huggingface_hub import constants
from open_clip import factory
from PIL import Image
from safetensors.torch import save_file
from torchvision.models.resnet import Bottleneck, ResNet
from transformers import BertConfig, CLIPConfig, CLIPModel, SwinConfig

from medrobust_lib.data.questions import IMAGE_TYPES, MM_FOLDER, QUESTION_FIELDS, SCENARIOS
from medrobust_lib.data.registry import DATASETS
from medrobust_lib.data.wording import class_wording
from medrobust_lib.models import medclip
from medrobust_lib.models.medclip import MedCLIPNetwork
from medrobust_lib.models.open_clip import build_folder
from medrobust_lib.smoothing.denoisers import DiffusionDenoiser, DnCNN, DnCNNDenoiser, UNet, denoiser_path
from training.denoisers import save_denoiser

SIDE, TEST_IMAGES, QUESTIONS = 224, 10, 10
FOLDERS = tuple(id for id, row in DATASETS.items() if row.kind == "folders")
MEDIMETA = tuple(id for id, row in DATASETS.items() if row.kind == "medimeta")
MEDMNIST = tuple(id for id, row in DATASETS.items() if row.kind == "medmnist")
DENOISED = ("pathology/kather", "pathology/pannuke", "chest/covid", "chest/rsna")
# What data_scripts/prepare_*.py leave: the splits of a set, and the ending of its files.
PREPARED = {
    "pathology/kather": (("train", "test"), "tif"),
    "pathology/pannuke": (("train", "test"), "png"),
    "pathology/skincancer": (("train", "val", "test"), "jpg"),
    "pathology/sicapv2": (("train", "test"), "jpg"),
    "chest/covid": (("train", "test"), "png"),
    "chest/rsna": (("train", "test"), "png"),
}
BIOMED_BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
RESNET = (1, 1, 1, 1)
VISION = {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Narrow(Bottleneck):
    """A block of MedCLIP's ResNet that does not widen."""

    expansion = 1


def neighbour(name: str) -> ModuleType:
    """What the tests of the models build their tiny models with."""
    path = Path(__file__).with_name("models") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"of_the_models_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- weights ----


def write_all_weights(root: Path) -> None:
    """Every model of the protocols below ``root``, by its id, and the denoisers of its data sets."""
    build = neighbour("conftest")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_plip(root / "plip", build)
        for id, architecture in (("clip-vit-b16", "ViT-B-16-quickgelu"), ("clip-rn50", "RN50-quickgelu")):
            (root / id).mkdir()
            model = build.randomise(open_clip.create_model(architecture, pretrained_text=False, load_weights=False))
            save_file(model.state_dict(), root / id / "open_clip_model.safetensors")
        (root / "quilt-b32").mkdir()
        quilt = native_configuration(build)
        build.write_weights(root / "quilt-b32", quilt, name="open_clip_pytorch_model.bin")
        write_biomedclip(root, build)
        write_unimedclip(root / "unimedclip", build)
        write_medclip(root, build)
    vlms = neighbour("tiny_vlms")
    vlms.write(root / "llava-1.6-vicuna-7b", vlms.llava_next_vicuna)
    vlms.as_published(root / "llava-1.6-vicuna-7b")
    write_denoisers(root)


def write_plip(folder: Path, build: ModuleType) -> None:
    """As vinid/plip, at 224 px."""
    folder.mkdir()
    build.write_plip(folder, end_token=2, safetensors=False)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"size": SIDE, "crop_size": SIDE}))
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    configuration = CLIPConfig(
        text_config={**tower, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        vision_config={**tower, "image_size": SIDE, "patch_size": 32},
        projection_dim=24,
    )
    model = build.randomise(CLIPModel(configuration))
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def native_configuration(build: ModuleType, *, layers: int | list[int] = 1) -> dict:
    """open_clip's configuration of an OpenAI CLIP, of little width."""
    configuration = build.tiny_configuration(49_408, context_length=77, layers=1)
    vision = VISION | {"layers": layers}
    if isinstance(layers, list):
        vision |= {"width": 8, "patch_size": None}
    configuration["model_cfg"]["vision_cfg"] = vision
    return configuration


def words_of_the_classes() -> list[str]:
    """A BERT vocabulary in which the prompts are whole words."""
    wordings = [class_wording(id) for id in (*FOLDERS, *MEDIMETA, *MEDMNIST)]
    texts = " ".join(text for words in wordings for text in (*words.prompt_nouns, *words.templates))
    words = dict.fromkeys(re.findall(r"[a-z0-9]+|[^\w\s]", texts.lower()))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *dict.fromkeys([*words, *LETTERS]), *(f"##{letter}" for letter in LETTERS)]


def tiny_bert() -> BertConfig:
    """A BERT over `words_of_the_classes`."""
    return BertConfig(vocab_size=len(words_of_the_classes()), **BERT)


def write_vocabulary(folder: Path) -> None:
    """The ``vocab.txt`` that is fetched beside a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words_of_the_classes()) + "\n", encoding="utf-8")


def write_biomedclip(root: Path, build: ModuleType) -> None:
    """BiomedCLIP, and RobustMedCLIP's ``model.pth`` with the keys of its authors' classes."""
    folder = root / "biomedclip"
    write_vocabulary(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    tiny_bert().save_pretrained(folder)
    local = build.biomedclip_configuration(str(folder), image_size=SIDE)
    build.write_weights(folder, local, name="open_clip_pytorch_model.bin")
    clip = open_clip.create_model(f"local-dir:{folder}")
    # As published: the text tower's name points at the hub.
    published = build.biomedclip_configuration(BIOMED_BERT, image_size=SIDE)
    (folder / "open_clip_config.json").write_text(json.dumps(published))
    (root / "robustmedclip").mkdir()
    authors = neighbour("test_medclip_robustmedclip").AuthorsModel(clip, 4)
    torch.save(authors.state_dict(), root / "robustmedclip" / "model.pth")


def write_unimedclip(folder: Path, build: ModuleType) -> None:
    """A training checkpoint of UniMed-CLIP's fork of open_clip."""
    write_vocabulary(folder)
    scratch = folder / "scratch"
    shutil.copytree(medclip.UNIMED_FOLDER, scratch)
    write_vocabulary(scratch)
    network = build.randomise(build_folder(scratch)[0])
    shutil.rmtree(scratch)
    tensors = {f"module.{re.sub('^text.', 'text_encoder.', key)}": value for key, value in network.state_dict().items()}
    torch.save({"epoch": 10, "name": "run", "state_dict": tensors}, folder / "unimed_clip_vit_b16.pt")


def write_medclip(root: Path, build: ModuleType) -> None:
    """Both MedCLIPs, and RobustMedCLIP's ResNet with the keys of its authors' classes."""
    resnet = neighbour("test_medclip_robustmedclip_resnet")
    for id in ("medclip-vit", "medclip-rn50"):
        network = medclip.published_network(id)
        if id == "medclip-vit":
            build.randomise(network)
        else:
            resnet.moved_statistics(network.vision_model, 1)
        write_vocabulary(root / id)
        positions = {"text_model.model.embeddings.position_ids": torch.arange(512)[None]}
        tensors = {of_transformers_4(key): value for key, value in network.state_dict().items()} | positions
        torch.save(tensors, root / id / "pytorch_model.bin")
    (root / "robustmedclip-rn50").mkdir()
    torch.save(resnet.AuthorsModel(network, 4).full_file(), root / "robustmedclip-rn50" / "model.pth")


def of_transformers_4(key: str) -> str:
    """A Swin's key as in MedCLIP's checkpoint."""
    if not key.startswith("vision_model.model.encoder."):
        return key
    long = {"q": "query", "k": "key", "v": "value"}
    key = re.sub(r"\.attention\.([qkv])_proj\.", lambda match: f".attention.self.{long[match[1]]}.", key)
    for new, old in (
        (".attention.relative_position_bias.", ".attention.self."),
        (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ):
        key = key.replace(new, old)
    return key


def write_denoisers(root: Path) -> None:
    """Untrained networks where `data_scripts/train_denoisers.py` puts trained ones."""
    for dataset in DENOISED:
        networks = {sigma: DnCNN(depth=2, width=4) for sigma in (0.1, 0.25, 0.5, 1.0)}
        made = {"mse": DnCNNDenoiser(networks, "mse")}
        made["diffusion"] = DiffusionDenoiser(UNet(width=8, multipliers=(1,), unshuffle=8), (0.05, 1.1))
        for kind, denoiser in made.items():
            path = denoiser_path(kind, dataset, weights_dir=root)
            path.parent.mkdir(exist_ok=True)
            save_denoiser(denoiser, path)


@contextlib.contextmanager
def fraction_of_their_size(scratch: Path) -> Iterator[pytest.MonkeyPatch]:
    """While it lasts, the networks whose size the loaders know are small; the hub's cache is empty."""
    build = neighbour("conftest")
    swin = SwinConfig(image_size=SIDE, patch_size=16, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=7)
    unimed = scratch / "unimedclip"
    shutil.copytree(medclip.UNIMED_FOLDER, unimed)
    tiny_bert().save_pretrained(unimed)
    config = json.loads((unimed / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"embed_dim": 24, "vision_cfg": VISION}
    (unimed / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patched:
        for name, layers in (("ViT-B-16-quickgelu", 1), ("RN50-quickgelu", list(RESNET))):
            architecture = native_configuration(build, layers=layers)["model_cfg"]
            patched.setitem(factory._MODEL_CONFIGS, name, architecture)
        patched.setattr(
            medclip,
            "published_network",
            lambda id: MedCLIPNetwork(swin if id == "medclip-vit" else RESNET, tiny_bert(), 24),
        )
        patched.setattr(medclip, "Bottleneck", Narrow)
        patched.setattr(medclip, "ResNet", functools.partial(ResNet, width_per_group=16))
        patched.setattr(medclip, "UNIMED_FOLDER", unimed)
        patched.setattr(constants, "HF_HUB_CACHE", str(scratch / "hub"))
        yield patched


# ---- data ----


def counts(id: str) -> dict[str, int]:
    """Images of each split: every class in each; one more in val, so that fractions of it differ."""
    classes = len(class_wording(id).names)
    return {"train": classes, "val": classes + 2, "test": max(TEST_IMAGES, classes)}


def drawn(draw: np.random.Generator, label: int, *, side: int = SIDE) -> np.ndarray:
    """A coarse image, uint8 [side, side, 3], whose colour tells the class."""
    colour = np.array([15 * label % 256, 128, 200])
    coarse = (colour + draw.integers(-40, 40, (side // 7, side // 7, 3))).clip(0, 255)
    return coarse.astype(np.uint8).repeat(7, axis=0).repeat(7, axis=1)


def write_all_data(root: Path) -> None:
    """Every data set of the protocols below ``root``."""
    for id in FOLDERS:
        write_class_folders(root, id)
    for id in MEDIMETA:
        write_medimeta(root, id)
    for id in MEDMNIST:
        write_medmnist(root, id)
    write_questions(root)


def write_class_folders(root: Path, id: str) -> None:
    """``images/SPLIT/CLASS/FILE`` beside a manifest, as `data_scripts/preparing/folders.py` leaves them."""
    folder, draw = root / id, np.random.default_rng(0)
    words = class_wording(id)
    splits, ending = PREPARED[id]
    # Skin tiles keep the class names of their table.
    codes = list(words.names)
    if id == "pathology/skincancer":
        table = json.loads((Path(medclip.__file__).parents[1] / "data" / "classes.json").read_text(encoding="utf-8"))
        codes = [code for code in table[id]["aliases"] if "tumor" in code]
    manifest: dict[str, dict[str, int]] = {}
    for split in splits:
        manifest[split] = dict.fromkeys(codes, 0)
        for number in range(counts(id)[split]):
            code = codes[number % len(codes)]
            place = folder / "images" / split / code
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn(draw, number % len(codes))).save(place / f"{split}-{number}.{ending}")
            manifest[split][code] += 1
    (folder / "manifest.json").write_text(json.dumps({"dataset": id, "counts": manifest}))


def write_medimeta(root: Path, id: str) -> None:
    """MedIMeta's files; its numbers are in another order than the paper's classes."""
    folder, names = root / DATASETS[id].location, class_wording(id).names
    for part in ("splits", "task_labels"):
        (folder / part).mkdir(parents=True)
    task = {"task_name": "the task", "task_target": "MULTICLASS_CLASSIFICATION"}
    info = {"id": folder.name, "tasks": [task | {"labels": dict(enumerate(names[::-1]))}]}
    (folder / "info.yaml").write_text(yaml.safe_dump(info))
    draw, labels = np.random.default_rng(0), []
    for split, count in counts(id).items():
        members = range(len(labels), len(labels) + count)
        (folder / "splits" / f"{split}.txt").write_text("".join(f"images/{member:06d}.tiff\n" for member in members))
        labels += [number % len(names) for number in range(count)]
    np.save(folder / "task_labels" / "the task.npy", np.array(labels))
    with h5py.File(folder / "images.hdf5", "w") as container:
        container["images"] = np.stack([drawn(draw, label) for label in labels])


def write_medmnist(root: Path, id: str) -> None:
    """One npz, 28 x 28 pixels, gray but for blood and retina."""
    path, draw, arrays = root / f"{DATASETS[id].location}.npz", np.random.default_rng(0), {}
    path.parent.mkdir(exist_ok=True)
    for split, count in counts(id).items():
        labels = np.arange(count) % len(class_wording(id).names)
        images = np.stack([drawn(draw, label, side=28) for label in labels])
        coloured = id in ("medmnist/blood", "medmnist/retina")
        arrays |= {f"{split}_images": images if coloured else images[..., 0]}
        arrays |= {f"{split}_labels": labels.astype(np.uint8)[:, None]}
    np.savez(path, **arrays)


def write_questions(root: Path) -> None:
    """Thirteen scenarios of harmless questions, each with its three kinds of images."""
    folder, draw = root / MM_FOLDER, np.random.default_rng(0)
    (folder / "processed_questions").mkdir(parents=True)
    fields = set(QUESTION_FIELDS.values())
    for scenario in SCENARIOS:
        asked = {str(i): dict.fromkeys(fields, f"what is in the image number {i} ?") for i in range(QUESTIONS)}
        (folder / "processed_questions" / f"{scenario}.json").write_text(json.dumps(asked))
        for kind in IMAGE_TYPES:
            place = folder / "imgs" / scenario / kind
            place.mkdir(parents=True)
            for number in range(QUESTIONS):
                Image.fromarray(drawn(draw, number, side=42)[:, :35]).save(place / f"{number}.jpg")

"""What a reader must know beside any number: where the images come from and what the model has seen."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.inspection import first_of
from medrobust_lib.data.questions import QuestionSet
from medrobust_lib.data.wording import SITE_A
from medrobust_lib.models.catalogue import DEMO_VLM
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.phantoms import MODALITIES

DEMO_MODEL = "demo-clip"
# From here on the model sees either blown-up pixels or a thumbnail of what a reader of the images saw.
SIZE_FACTOR = 3.0

NOT_CLINICAL = "For teaching and research, not for clinical use."
SYNTHETIC = "The images are synthetic phantoms, not patients' images: no number here says anything about patients."
OTHER_MODELS_ON_PHANTOMS = "Which model is best on synthetic phantoms says nothing about which is best on real images."
OWN_SITE = f"{DEMO_MODEL} was trained on phantoms of this very site, so its numbers here are flattering."
DEMO_ON_REAL = (
    f"{DEMO_MODEL} was trained on synthetic phantoms only: its numbers on real images test the plumbing and say "
    "nothing about medical models."
)
UNSEEN_MODALITY = f"{DEMO_VLM} never saw this modality: its answers here are guesses."
MADE_UP_ANSWERS = "What is called safe, and which action follows a finding, is made up and no medical advice."


def caveats(model: DualEncoder, dataset: ImageDataset) -> list[str]:
    """Sentences that a result card of this model on this data set must carry.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset

    Returns
    -------
    list of str
        The weightiest first, the clinical disclaimer last, which is always there. Sentences name no data
        set, so that those of several sets can be merged without repetition.
    """
    found = []
    base = model.provenance.get("base")  # a re-trained copy has seen what its base saw
    origin = base.get("id", model.id) if isinstance(base, Mapping) else base or model.id
    if dataset.synthetic:
        found.append(SYNTHETIC)
        if origin != DEMO_MODEL:
            found.append(OTHER_MODELS_ON_PHANTOMS)
        elif dataset.id.endswith(SITE_A):
            found.append(OWN_SITE)
    elif origin == DEMO_MODEL:
        found.append(DEMO_ON_REAL)
    absent = [name for name, count in dataset.class_counts().items() if not count]
    if absent:
        found.append(f"No image of {len(absent)} of {len(dataset.classes)} classes was measured: {first_of(absent)}.")
    return [*found, *dataset.caveats, *_size_caveats(model, dataset), NOT_CLINICAL]


def vlm_caveats(vlm: Any, questions: QuestionSet) -> list[str]:
    """Sentences that a result card of this generative model on these questions must carry; see `caveats`."""
    found = []
    if questions.synthetic:
        found += [SYNTHETIC, MADE_UP_ANSWERS]
    modality = questions.id.removeprefix("phantom/").removesuffix(SITE_A)
    if vlm.id == DEMO_VLM and modality in MODALITIES and modality not in _demo_modalities():
        found.insert(0, UNSEEN_MODALITY)
    if vlm.id == DEMO_VLM and not questions.synthetic:
        found.append(DEMO_ON_REAL.replace(DEMO_MODEL, DEMO_VLM))
    elif vlm.id != DEMO_VLM and questions.synthetic:
        found.append(OTHER_MODELS_ON_PHANTOMS)
    return [*found, *questions.provenance.get("caveats", ()), NOT_CLINICAL]


def _demo_modalities() -> list[str]:
    """Modalities that the generative demo model was trained on."""
    recipe = files("medrobust_lib.models").joinpath("demo", "vlm", "recipe.json")
    return json.loads(recipe.read_text(encoding="utf-8"))["modalities"]


def _size_caveats(model: DualEncoder, dataset: ImageDataset) -> list[str]:
    shorter_edge = min(dataset.images.shape[1:3])
    sizes = f"{shorter_edge} px images for {model.id}'s {model.image_size} px input"
    if model.image_size >= SIZE_FACTOR * shorter_edge:
        return [f"Preprocessing enlarges {sizes}: what the enlargement invents is blur, not detail."]
    if shorter_edge >= SIZE_FACTOR * model.image_size:
        return [f"Preprocessing shrinks {sizes}: fine structures are lost before the model sees them."]
    return []

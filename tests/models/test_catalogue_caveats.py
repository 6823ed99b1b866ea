import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from medrobust_lib import load_dataset, load_questions
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.data.questions import ask
from medrobust_lib.models import catalogue, vision_language
from medrobust_lib.models.catalogue import (
    CAVEATS,
    caveats,
    vlm_caveats,
)


def encoder(id: str = "demo-clip", image_size: int = 64) -> SimpleNamespace:
    return SimpleNamespace(id=id, image_size=image_size, provenance={})


def images(id: str = "folder:mine", *, side: int = 64, synthetic: bool = False, said: tuple = ()) -> ImageDataset:
    return ImageDataset(
        id=id,
        split="test",
        images=np.zeros((2, side, side + 9, 3), np.uint8),
        labels=np.array([0, 1]),
        classes=("a", "b"),
        templates=("{}",),
        modality="any",
        licence="MIT",
        provenance={"synthetic": synthetic, "caveats": said},
        indices=np.arange(2),
    )


def test_demo_clip_on_phantoms_says_synthetic_and_nothing_of_real_images(model, data):
    found = caveats(model, data)
    assert found == [
        "The images are synthetic phantoms, not patients' images: no number here says anything about patients.",
        CAVEATS["not_clinical"],
    ]


def test_demo_clip_on_real_images_is_a_test_of_the_plumbing():
    found = caveats(encoder(), images())
    assert found[0].startswith("demo-clip was trained on synthetic phantoms only: its numbers on real images test the")
    assert not any("are synthetic phantoms" in sentence for sentence in found)


def test_demo_clip_on_its_training_site_is_flattered():
    assert "trained on phantoms of this very site" in " ".join(
        caveats(encoder(), load_dataset("phantom/oct-site-a", n=4))
    )


def test_a_retrained_copy_carries_the_caveats_of_its_base():
    copied = encoder("demo-clip retrained at sigma 0.25")
    copied.provenance["base"] = {"id": "demo-clip"}
    for data in (images(), images("phantom/blood", synthetic=True)):
        assert caveats(copied, data) == caveats(encoder(), data)


def test_other_models_are_not_ranked_by_phantoms():
    found = caveats(encoder("plip"), images("phantom/blood", synthetic=True))
    assert "Which model is best on synthetic phantoms says nothing about which is best on real images." in found
    assert not any("was trained on" in sentence for sentence in found)


def test_a_medical_model_on_real_images_of_its_size_is_only_not_clinical():
    assert caveats(encoder("biomedclip", 224), images(side=224)) == ["For teaching and research, not for clinical use."]


def test_classes_without_an_image_are_named():
    (sentence,) = [s for s in caveats(encoder(), load_dataset("phantom/blood", n=4)) if "classes" in s]
    assert sentence.startswith("No image of 4 of 8 classes was measured: ") and sentence.endswith(" and 1 more.")


def test_what_was_found_in_the_images_is_on_the_card():
    said = ["2 of 9 files are left out: a/notes.txt."]
    assert caveats(encoder("biomedclip", 224), images(side=224, said=said)) == [*said, CAVEATS["not_clinical"]]
    asked = ask(images(said=said), "finding")
    assert vlm_caveats(SimpleNamespace(id="smolvlm-256m"), asked) == [*said, CAVEATS["not_clinical"]]


@pytest.mark.parametrize(
    ("side", "input_size", "said"),
    [
        (28, 224, "enlarges 28 px images for plip's 224 px input"),
        (75, 224, None),
        (671, 224, None),
        (672, 224, "shrinks 672 px images for plip's 224 px input"),
    ],
)
def test_sizes_far_apart_are_named_by_the_shorter_edge(side, input_size, said):
    found = [s for s in caveats(encoder("plip", input_size), images(side=side)) if s.startswith("Preprocessing")]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_generative_models_on_phantoms_say_that_answers_are_made_up():
    asked = load_questions("phantom/blood", n=8)
    assert vlm_caveats(SimpleNamespace(id="demo-vlm"), asked) == [
        CAVEATS["synthetic"],
        CAVEATS["made_up_answers"],
        CAVEATS["not_clinical"],
    ]
    assert (
        "says nothing about which is best on real images" in vlm_caveats(SimpleNamespace(id="smolvlm-256m"), asked)[2]
    )


@pytest.mark.parametrize("site", ["", "-site-a"])
@pytest.mark.parametrize(
    ("modality", "seen"),
    [("histology", True), ("blood", True), ("chest", True), ("oct", True), ("breast", False), ("fundus", False)],
)
def test_the_generative_demo_says_which_modalities_it_never_saw(modality, seen, site):
    asked = load_questions(f"phantom/{modality}{site}", n=6)
    found = vlm_caveats(SimpleNamespace(id="demo-vlm"), asked)
    guesses = "demo-vlm never saw this modality: its answers here are guesses."
    assert (guesses in found) != seen
    assert guesses not in vlm_caveats(SimpleNamespace(id="smolvlm-256m"), asked)


def test_generative_models_on_real_images():
    real = ask(images(), "finding")
    assert vlm_caveats(SimpleNamespace(id="smolvlm-256m"), real) == [CAVEATS["not_clinical"]]
    said = "smolvlm-256m in bfloat16 may answer differently alone and in a batch"
    assert vlm_caveats(SimpleNamespace(id="smolvlm-256m", caveats=(said,)), real) == [said, CAVEATS["not_clinical"]]
    assert vlm_caveats(SimpleNamespace(id="demo-vlm"), real)[0].startswith("demo-vlm was trained on synthetic phantoms")


def test_every_sentence_can_be_said_and_is():
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (catalogue, vision_language)]
    used = re.findall(r'CAVEATS\["(\w+)"\]', "".join(sources))
    assert set(used) == set(CAVEATS)
    for sentence in CAVEATS.values():
        said = sentence.format(model="a model")
        assert not re.search("demo-clip|demo-vlm|[{}\\n]", said), "the ids of the demos have one home"


def test_what_the_tables_of_models_hold_cannot_be_changed():
    with pytest.raises(TypeError):
        CAVEATS["not_clinical"] = ""
    assert all(isinstance(row.files, tuple) for row in (*catalogue.DUAL_ENCODERS, *catalogue.GENERATIVE))

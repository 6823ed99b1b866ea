"""The papers' methods by name: what each takes, and how it is made ready before any noise of a certificate exists."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from medrobust_lib.checks import check_choice, check_positive, check_whole
from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.files import file_sha256
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.geometry import CropAndFlip
from medrobust_lib.models.weights import read_context
from medrobust_lib.smoothing.denoisers import find_denoiser, load_denoiser
from medrobust_lib.smoothing.methods import (
    AdaptedPrompts,
    CandidatePrompts,
    FixedPrompts,
    PromptMethod,
)
from medrobust_lib.smoothing.noise import noisy_bank
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE, Perturbation, Sigma, check_levels, find_perturbation
from medrobust_lib.smoothing.prompts import (
    TRAINING_SIGMAS,
    Position,
    PromptSet,
    check_learns,
    check_steps,
    learn_prompts,
    sharpen,
    text_prompts,
)

CANDIDATES = 3  # seeds of few-shot prompts that have to agree
RETRAINED = "re-trained"
_LEARNING = ("seed", "shots", "epochs", "batch_size", "learning_rate")
_PROMPTS = (*_LEARNING, "n_context", "class_specific", "position", "draws_per_image", "sigmas", "crop")
# What each method reads; all but "re-trained", which is another image tower, are made by `prompt_methods`.
READS: dict[str, tuple[str, ...]] = {
    "zero-shot": ("template",),
    "zero-shot ensemble": (),
    "CoOp": tuple(name for name in _PROMPTS if name != "sigmas"),
    "few-shot PromptSmooth": (*_PROMPTS, "checkpoint"),
    "few-shot + pool": (*_PROMPTS, "checkpoint", "steps"),
    "candidate set": _PROMPTS,
    "zero-shot PromptSmooth": ("template", "tunable", "steps"),
    "PromptSmooth": (*_PROMPTS, "checkpoint", "steps"),
    "denoised": ("denoiser",),
    "diffusion": ("denoiser",),
    RETRAINED: _LEARNING,
}
LEARNED_METHODS = frozenset(name for name, read in READS.items() if "shots" in read)  # from labelled images
ADAPTED_METHODS = frozenset({"zero-shot PromptSmooth", "PromptSmooth"})  # to each image


@dataclass(frozen=True)
class PaperMethod:
    """One of the papers' methods and what it takes; the defaults are the papers'.

    Attributes
    ----------
    method : str
        A key of `READS`.
    name : str
        In tables; default: the method.
    seed : int or None
        Of shots, their noise and the first context vectors; the candidate set takes the two after it as well.
        None: the seed of the whole.
    shots, epochs, batch_size, learning_rate, n_context, class_specific, position, draws_per_image, sigmas
        As in `learn_prompts`; without sigmas its default, or for a corruption the level of the certificates. The first
        four also of re-training, where `learning_rate` has a default of its own.
    crop : float or None
        CoOp's random crop, which keeps at least this share of the area, and flip; None shows every copy whole.
    checkpoint : str
        File of the authors' few-shot context, as in `load_coop_context`, in place of learning.
    template : str
        Hand-written prompt with one ``{}``; default: the data set's.
    tunable : int or None
        Tokens of the hand-written prompt that are moved, as in `text_prompts`; the authors' code moves 5 of "An H&E
        image patch of". None: all.
    steps : int
        Of adaptation, to an image or to the pool.
    denoiser : str
        File of a denoiser; default: that of the data set, see `find_denoiser`.

    Raises
    ------
    ValueError
        An unknown method, a number out of range, or a setting that the method does not read.
    """

    method: str = field(metadata={"takes": "one of " + ", ".join(READS)})
    name: str = ""
    seed: int | None = None
    shots: int = 16
    epochs: int = 50
    batch_size: int = 16
    learning_rate: float | None = None
    n_context: int = 5
    class_specific: bool = False
    position: Position = "end"
    draws_per_image: int = 16
    sigmas: tuple[float, ...] = ()
    crop: float | None = None
    checkpoint: str = ""
    template: str = ""
    tunable: int | None = None
    steps: int = 1
    denoiser: str = ""

    def __post_init__(self) -> None:
        check_choice("method", self.method, READS)
        object.__setattr__(self, "name", self.name or self.method)
        for own in fields(self)[2:]:
            value = getattr(self, own.name)
            if value != own.default and own.name not in READS[self.method]:
                reads = ", ".join(READS[self.method]) or "nothing"
                raise ValueError(f"{own.name}={value!r} means nothing to {self.method!r}, which reads {reads}")
        for name in ("shots", "epochs", "batch_size", "n_context", "draws_per_image", "steps"):
            check_whole(name, getattr(self, name))
        if self.seed is not None:
            check_whole("seed", self.seed, least=0)
        if self.tunable is not None:
            check_whole("tunable", self.tunable)
        check_choice("position", self.position, get_args(Position))
        if self.crop is not None:
            CropAndFlip(crop=self.crop)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if min(self.sigmas, default=0.0) < 0:
            raise ValueError(f"sigmas={list(self.sigmas)}: give noise levels of training, 0 or more")
        if self.template and self.template.count("{}") != 1:
            raise ValueError(f"template={self.template!r}: write one {{}} where the class name stands")
        given = [own.name for own in fields(self) if own.name in _PROMPTS and getattr(self, own.name) != own.default]
        if self.checkpoint and given:
            raise ValueError(f"{given[0]} is for learning, and checkpoint={self.checkpoint!r} takes its place")

    @property
    def learns(self) -> bool:
        """Whether labelled images are learned from."""
        return self.method in LEARNED_METHODS and not self.checkpoint

    def learning(self, sigmas: tuple[Sigma, ...] = TRAINING_SIGMAS) -> dict[str, Any]:
        """Words for `learn_prompts`; its noise levels where the method has none of its own."""
        words = {name: getattr(self, name) for name in _PROMPTS if name not in ("seed", "crop", "learning_rate")}
        if self.learning_rate is not None:
            words["learning_rate"] = self.learning_rate
        words["sigmas"] = (0.0,) if self.method == "CoOp" else self.sigmas or sigmas
        return words | {"augmentation": None if self.crop is None else CropAndFlip(crop=self.crop)}


def load_coop_context(path: Path | str, model: DualEncoder, classes: Sequence[str]) -> PromptSet:
    """Few-shot prompts that CoOp's code learned, such as the ``prompt_learner/model.pth.tar-50`` of PromptSmooth.

    Parameters
    ----------
    path : Path or str
        Checkpoint of its prompt learner with one context for all classes, before the class name.
    model : DualEncoder
        The one they were learned for, which the file does not name.
    classes : sequence of str
        Prompt nouns, in label order; they may be others than the learned ones.

    Returns
    -------
    PromptSet

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_context`, or a model for which `why_not_learned` has an answer.
    """
    check_learns(model)
    context = read_context(Path(path), width=model.embed_tokens(model.tokenize(["x"])).shape[2], id=model.id)
    provenance = {"method": "CoOp's code", "file": Path(path).name, "sha256": file_sha256(path)}
    return PromptSet(context, tuple(classes), model.id, provenance=provenance)


def adapt_to_pool(
    model: DualEncoder,
    start: PromptSet,
    pool: ImageDataset,
    *,
    sigma: Sigma,
    perturbation: str | Perturbation = PIXEL_NOISE,
    steps: int = 1,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> PromptSet:
    """Lower the entropy on a pool of unlabelled images that will not be certified: a standard guarantee.

    One noisy copy of each image is predicted, and the entropy of the predictions averaged over images.

    Parameters
    ----------
    model : DualEncoder
    start : PromptSet
    pool : ImageDataset
        Its labels are not looked at.
    sigma : float or tuple of float
        Noise level, > 0, in the units of the perturbation.
    perturbation : str or Perturbation
        As in `certify_dataset`.
    steps : int
        AdamW steps over the whole pool. One, as for the per-image prompt: every further step makes answers surer,
        right or wrong.
    learning_rate : float
    seed : int
        Of the noise.

    Returns
    -------
    PromptSet
        To be used with `FixedPrompts`.
    """
    family = find_perturbation(perturbation)
    levels = check_levels([sigma], family, model.image_size, clean=False)
    check_steps(steps, learning_rate)
    if start.learned_on not in (None, family.name):
        raise ValueError(f"prompts learned on {start.learned_on!r} cannot be adapted to a pool under {family.name!r}")
    choose = np.random.default_rng(seed)
    bank = noisy_bank(model, pool, sigmas=levels, draws=1, seed=seed, choose=choose, perturbation=family)
    context = start.context.to(model.device)
    context = sharpen(model, start.frame(model), context, bank, steps=steps, learning_rate=learning_rate)
    provenance = start.provenance | {
        "pool": {"dataset": pool.id, "split": pool.split, "images": [int(index) for index in pool.indices],
                 "sigma": sigma, "steps": steps, "learning_rate": learning_rate, "seed": seed},
        "perturbation": family.name,
    }  # fmt: skip
    return replace(start, context=context.cpu(), provenance=provenance)


def prompt_methods(
    model: DualEncoder,
    data: ImageDataset,
    methods: Sequence[PaperMethod | str],
    *,
    sigma: Sigma,
    perturbation: str | Perturbation = PIXEL_NOISE,
    train: ImageDataset | None = None,
    pool: ImageDataset | None = None,
    seed: int = 0,
    kept: Path | None = None,
) -> list[PromptMethod]:
    """Make the papers' methods ready; what several of them need is learned once.

    Parameters
    ----------
    model : DualEncoder
    data : ImageDataset
        What will be certified; gives classes and templates.
    methods : sequence of PaperMethod or str
        In the order of the table's rows; a text is the name of a method with the papers' settings.
    sigma : float or tuple of float
        Noise level of the certificates, > 0, in the units of the perturbation; the pool is adapted to it.
    perturbation : str or Perturbation
        As in `certify_dataset`. Where it is another than pixel noise, prompts are learned at `sigma`, if the method has
        no ``sigmas`` of its own.
    train : ImageDataset, optional
        Labelled images for the methods of `LEARNED_METHODS`, none of them in `data`.
    pool : ImageDataset, optional
        Unlabelled images for "few-shot + pool", none of them in `data`.
    seed : int
        Of methods that have none of their own.
    kept : Path, optional
        Folder for the learned prompts: what is there already is not learned again, so that a run which was killed goes
        on with the very same prompts. A file is named after the model, the images and all settings, so that several
        noise levels, and several calls, can share the folder.

    Returns
    -------
    list of PromptMethod
        For `certify_dataset`; each states its guarantee.

    Raises
    ------
    ValueError
        Unknown or repeated names, or images to learn from are missing; as `learn_prompts`.
    FileNotFoundError
        No denoiser for this data set.
    """
    family = find_perturbation(perturbation)
    (sigma,) = check_levels([sigma], family, model.image_size, clean=False)
    asked = [PaperMethod(one) if isinstance(one, str) else one for one in methods]
    if repeated := [name for name, count in Counter(one.name for one in asked).items() if count > 1]:
        raise ValueError(f"two methods are called {repeated[0]!r}; give each a name of its own")
    for one in asked:
        if "denoiser" in READS[one.method] and family != PIXEL_NOISE:
            raise ValueError(f"{one.name} removes noise from pixels, and {family.name!r} adds none; leave it out")
        if one.method == RETRAINED:
            raise ValueError(f"{RETRAINED!r} is another image tower: certify the model that `retrain_on_noise` makes")
        needed = "pool" if one.method == "few-shot + pool" and pool is None else "train"
        if (one.learns and train is None) or needed == "pool":
            raise ValueError(f"method {one.method!r} needs {needed}=, images to learn from that are not certified")
    # Before anything is learned: what is wrong with tokens, with the model, or with a file.
    ready = {
        one.name: text_prompts(model, data.classes, one.template or data.start_template, tunable=one.tunable)
        for one in asked
        if one.method == "zero-shot PromptSmooth"
    }
    denoisers = {
        one.name: load_denoiser(one.denoiser or find_denoiser(one.method, data.id))
        for one in asked
        if one.method in ("denoised", "diffusion")
    }

    def kept_or(words: dict[str, Any], learn: Callable[[], PromptSet]) -> PromptSet:
        """The prompts of a file that is named after what they were learned with."""
        if kept is None:
            return learn()
        images = [None if data is None else [data.id, data.split, data.indices.tolist()] for data in (train, pool)]
        told = json.dumps([model.id, images, words], sort_keys=True, default=asdict)
        path = kept / f"{hashlib.sha256(told.encode()).hexdigest()[:12]}.safetensors"
        if not path.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            learn().save(path)
        try:
            return PromptSet.load(path)
        except ValueError as error:
            raise ValueError(f"{error} It was learned here: delete it, and it is learned again.") from error

    @cache
    def learned(one: PaperMethod, number: int = 0) -> PromptSet:
        if one.checkpoint:
            return load_coop_context(one.checkpoint, model, data.classes)
        own = one.learning() if family == PIXEL_NOISE else one.learning((sigma,)) | {"perturbation": family.name}
        words = own | {"seed": number + (seed if one.seed is None else one.seed)}
        return kept_or(words, lambda: learn_prompts(model, train, **words | {"perturbation": family}))

    def few_shot(one: PaperMethod, number: int = 0) -> PromptSet:
        # Methods that differ in what happens afterwards share what was learned.
        same = {name: getattr(one, name) for name in READS["few-shot PromptSmooth"]}
        return learned(PaperMethod("few-shot PromptSmooth", **same), number)

    def pooled(one: PaperMethod) -> PromptSet:
        start, own = few_shot(one), seed if one.seed is None else one.seed
        moves = {"sigma": sigma, "steps": one.steps, "seed": own}
        words = {"start": start.provenance, **moves}
        if family != PIXEL_NOISE:  # a start from a file does not tell
            words["perturbation"] = family.name
        return kept_or(words, lambda: adapt_to_pool(model, start, pool, perturbation=family, **moves))

    def fixed(one: PaperMethod, prompt: PromptSet) -> PromptMethod:
        return FixedPrompts(one.name, prompt.class_features(model, data.classes), learned_on=prompt.learned_on)

    def candidates(one: PaperMethod) -> PromptMethod:
        prompts = [few_shot(one, number) for number in range(CANDIDATES)]
        features = tuple(prompt.class_features(model, data.classes) for prompt in prompts)
        return CandidatePrompts(one.name, features, learned_on=prompts[0].learned_on)

    def written(one: PaperMethod, templates: Sequence[str]) -> PromptMethod:
        features = model.class_features(data.classes, [one.template] if one.template else templates)
        return FixedPrompts(one.name, features, denoiser=denoisers.get(one.name))

    made: dict[str, Callable[[PaperMethod], PromptMethod]] = {
        "zero-shot": lambda one: written(one, data.templates[:1]),
        "zero-shot ensemble": lambda one: written(one, data.templates),
        "CoOp": lambda one: fixed(one, learned(one)),
        "few-shot PromptSmooth": lambda one: fixed(one, few_shot(one)),
        "few-shot + pool": lambda one: fixed(one, pooled(one)),
        "candidate set": candidates,
        "zero-shot PromptSmooth": lambda one: AdaptedPrompts(one.name, model, ready[one.name], steps=one.steps),
        "PromptSmooth": lambda one: AdaptedPrompts(one.name, model, few_shot(one), steps=one.steps),
        "denoised": lambda one: written(one, data.templates[:1]),
        "diffusion": lambda one: written(one, data.templates[:1]),
    }
    return [made[one.method](one) for one in asked]

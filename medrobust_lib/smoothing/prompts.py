"""Prompts and how they are learned on noisy features: CoOp, Few-Shot and Zero-Shot PromptSmooth.

A prompt is a few context vectors among the word embeddings of "... {class}.". Their places are counted in tokens, not
words, for any tokenizer (`PromptFrame`). The image tower never sees a prompt, so prompts are learned on features of
noisy images that were encoded once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medrobust_lib.checks import check_choice, check_keywords, check_positive, check_whole
from medrobust_lib.data.dataset import ImageDataset, draw_shots
from medrobust_lib.files import parsed, read_tensors, write_tensors
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens
from medrobust_lib.models.geometry import CropAndFlip
from medrobust_lib.models.text_frame import TextFrame, find_text_frame, why_not_learned
from medrobust_lib.smoothing.noise import noisy_bank
from medrobust_lib.smoothing.perturbations import PIXEL_NOISE, Sigma, check_levels, find_perturbation

TRAINING_SIGMAS = (0.25, 0.5, 0.75, 1.0)
"""Noise levels that the authors of PromptSmooth train few-shot prompts with (issue 3 of their repository)."""

_INITIAL_STD = 0.02  # of randomly initialised context, as in CoOp
_FORMAT = 1

Position = Literal["end", "middle", "front"]


@dataclass(frozen=True, eq=False)
class PromptFrame:
    """The tokens of K prompts with places for context vectors.

    Attributes
    ----------
    tokens : Tokens
        [K, L]; placeholders where the context goes.
    embeddings : float32 [K, L, w]
        Word embeddings of the tokens, frozen.
    places : int64 [K, n_context]
        Positions of the context in each prompt.
    """

    tokens: Tokens
    embeddings: Tensor = field(repr=False)
    places: Tensor

    def features(self, model: DualEncoder, context: Tensor) -> Tensor:
        """Unit-norm text features of the prompts with a context put in; differentiable in the context.

        Parameters
        ----------
        model : DualEncoder
        context : float32 [n_context, w] shared by the classes, or [K, n_context, w]

        Returns
        -------
        float32 [K, d]
        """
        shape = (*self.places.shape, self.embeddings.shape[2])
        filled = self.embeddings.scatter(1, self.places[..., None].expand(shape), context.float().expand(shape))
        return model.encode_embeddings(filled, self.tokens)

    @property
    def text_context(self) -> Tensor:
        """float32 [n_context, w]: the embeddings that stand at the places of the first prompt."""
        return self.embeddings[0, self.places[0]].clone()


def empty_frame(
    model: DualEncoder, classes: Sequence[str], *, n_context: int, position: Position = "end", suffix: str = "."
) -> PromptFrame:
    """Prompts with `n_context` empty places before, around or after the class name, and a frozen suffix.

    The position is where the class name stands; in the middle, half of the context (rounded down) precedes it.

    Raises
    ------
    ValueError
        No context, an unknown position, or prompts longer than the model reads.
    """
    check_whole("n_context", n_context, hint=": a learned prompt needs at least one context token")
    check_choice("position", position, get_args(Position))
    before = {"end": n_context, "middle": n_context // 2, "front": 0}[position]
    frame = find_text_frame(model)
    (filler,) = _inner(model, frame, ["x"])[0][:1]
    names, wholes = _inner(model, frame, classes), _inner(model, frame, [noun + suffix for noun in classes])
    first = len(frame.start)
    rows, places = [], []
    for name, whole in zip(names, wholes, strict=True):
        if before < n_context and whole[: len(name)] != name:
            raise ValueError(f"the tokenizer joins a class name and the text {suffix!r} after it; use position 'end'")
        body = len(name) if before < n_context else len(whole)
        rows.append([filler] * before + whole[:body] + [filler] * (n_context - before) + whole[body:])
        places.append([*range(first, first + before), *range(first + before + body, first + body + n_context)])
    return _framed(model, frame, rows, places)


def frame_from_template(
    model: DualEncoder, classes: Sequence[str], template: str, *, tunable: int | None = None
) -> PromptFrame:
    """Hand-written prompts whose tokens before the class name, or the first `tunable` of them, are places of context.

    Filled with its own `PromptFrame.text_context` the frame gives exactly the features of the written text.

    Raises
    ------
    ValueError
        A template without ``{}`` or without text before it, or no such number of tokens before it.
    """
    prefix, found, _ = template.partition("{}")
    if not found or not prefix.strip():
        raise ValueError(f"the template {template!r} needs text before the class name {{}}, which becomes the context")
    frame = find_text_frame(model)
    start = _inner(model, frame, [prefix.strip()])[0]
    rows = _inner(model, frame, [template.replace("{}", noun) for noun in classes])
    for noun, row in zip(classes, rows, strict=True):
        if row[: len(start)] != start:
            raise ValueError(f"the tokenizer joins {prefix!r} and {noun!r}; end the text before {{}} with a space")
    hint = f": {prefix.strip()!r} has {len(start)} tokens for {model.id}; None tunes all of them"
    n_context = len(start) if tunable is None else check_whole("tunable", tunable, most=len(start), hint=hint)
    first = len(frame.start)
    return _framed(model, frame, rows, [range(first, first + n_context)] * len(rows))


def _inner(model: DualEncoder, frame: TextFrame, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without those of the frame."""
    tokens = model.tokenize(list(texts))
    return [frame.content(ids[mask].tolist()) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _framed(
    model: DualEncoder, frame: TextFrame, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> PromptFrame:
    """Put rows of ids into their frame and pad them as the model's tokenizer does."""
    rows = [frame.row(row) for row in rows]
    longest = max(map(len, rows))
    if longest > model.context_length:
        raise ValueError(
            f"prompts of {longest} tokens (start and end included) do not fit {model.id}, which reads at most "
            f"{model.context_length}; use fewer context tokens or shorter class names"
        )
    # A tokenizer that pads to a fixed width (MedCLIP's 25) does so because its features depend on the width.
    reference = model.tokenize([""])
    length = max(longest, reference.ids.shape[1])
    pad = int(reference.ids[0, -1]) if not reference.mask[0, -1] else 0
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    tokens = Tokens(ids, mask=torch.arange(length) < torch.tensor([[len(row)] for row in rows]))
    embeddings = model.embed_tokens(tokens).detach().float()
    return PromptFrame(tokens, embeddings, torch.tensor([list(row) for row in places], device=embeddings.device))


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Context vectors for the classes of one data set and one model.

    Attributes
    ----------
    context : float32 [n_context, w] or [K, n_context, w]
        Shared by all classes, or one per class.
    classes : tuple of str
        Prompt nouns, in label order.
    model : str
        Id of the model whose word embeddings the context lives among.
    position : {"end", "middle", "front"}
        Where the class name stands.
    template : str
        Hand-written prompt whose first tokens the context replaces; empty for random initialisation.
    suffix : str
        Frozen text after the class name, where there is no template.
    provenance : dict
        JSON values: data set, shots, sigmas, seed, optimiser and whatever made the prompts.

    Raises
    ------
    ValueError
        A context that is not finite.
    """

    context: Tensor = field(repr=False)
    classes: tuple[str, ...]
    model: str
    position: Position = "end"
    template: str = ""
    suffix: str = "."
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        broken = int((~self.context.isfinite()).sum())
        if broken:
            raise ValueError(
                f"prompts for {self.model}: {broken} of {self.context.numel()} context values are not finite: learning "
                "diverged (lower learning_rate), or the text tower broke (load it in float32)"
            )

    @property
    def learned_on(self) -> str | None:
        """Name of the perturbation they were learned on; None where there was none, so that they suit any."""
        clean = "pool" not in self.provenance and not any(self.provenance.get("sigmas", ()))
        return None if clean else self.provenance.get("perturbation", PIXEL_NOISE.name)

    def frame(self, model: DualEncoder) -> PromptFrame:
        """Build the prompts' tokens for a model.

        Raises
        ------
        ValueError
            The prompts belong to another model.
        """
        if model.id != self.model:
            raise ValueError(
                f"these prompts were learned for the model {self.model!r} and mean nothing to {model.id!r}; "
                "learn prompts for it, or load the other model"
            )
        if self.template:
            return frame_from_template(model, self.classes, self.template, tunable=self.context.shape[-2])
        return empty_frame(
            model, self.classes, n_context=self.context.shape[-2], position=self.position, suffix=self.suffix
        )

    def class_features(self, model: DualEncoder, classes: Sequence[str] | None = None) -> Tensor:
        """Unit-norm text features [K, d] of the prompts.

        Parameters
        ----------
        model : DualEncoder
        classes : sequence of str, optional
            Class nouns of the data they will be used on: checked to be those of the prompts, in this order.

        Raises
        ------
        ValueError
            Another model, or another list of classes.
        """
        if classes is not None and tuple(classes) != self.classes:
            raise ValueError(
                f"these prompts were learned for the classes {list(self.classes)}, not for {list(classes)}; "
                "learn prompts for these classes"
            )
        with torch.no_grad():
            return self.frame(model).features(model, self.context.to(model.device))

    def save(self, path: Path | str) -> Path:
        """Write the prompts as one safetensors file; everything but the vectors is JSON in its header."""
        header = {"format": _FORMAT} | vars(self)
        write_tensors(Path(path), {"context": header.pop("context")}, key="prompts", header=header)
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> "PromptSet":
        """Read prompts that `save` wrote.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            The file holds no prompts of this format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no prompts at {path}; PromptSet.save writes them")
        tensors, header = read_tensors(path, key="prompts", kind="a readable file of prompts", advice="Copy it anew.")
        if header.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} holds no prompts of format {_FORMAT}; PromptSet.save writes them")
        with parsed(f"{path} holds no prompts that fit together", "Learn them again."):
            context, classes = tensors["context"], tuple(header.pop("classes"))
            if context.ndim not in (2, 3) or (context.ndim == 3 and len(context) != len(classes)) or not classes:
                raise ValueError(f"a context of shape {tuple(context.shape)} for {len(classes)} classes")
            return cls(context=context, classes=classes, **header)


def text_prompts(model: DualEncoder, classes: Sequence[str], template: str, *, tunable: int | None = None) -> PromptSet:
    """Hand-written prompt as a `PromptSet`, for instance as the start of per-image adaptation.

    Learned or adapted are the first `tunable` tokens, 1 to all before ``{}``; None takes all, the others are frozen.
    The authors' code counts words where it tunes tokens: 5 of "An H&E image patch of", of which CLIP makes 7, and 4 of
    the 7 of "a histopathology slide showing".
    """
    check_learns(model)
    context = frame_from_template(model, classes, template, tunable=tunable).text_context
    return PromptSet(context, tuple(classes), model.id, template=template, provenance={"method": "hand-written"})


@torch.enable_grad()  # notebooks often switch gradients off as a whole
def learn_prompts(
    model: DualEncoder,
    dataset: ImageDataset,
    *,
    sigmas: Sequence[Sigma] | None = None,
    shots: int = 16,
    epochs: int = 50,
    batch_size: int = 16,
    learning_rate: float = 0.002,
    draws_per_image: int = 16,
    augmentation: CropAndFlip | None = None,
    seed: int = 0,
    **form: Any,
) -> PromptSet:
    """Few-Shot PromptSmooth: cross-entropy over noisy copies of a few labelled images.

    With ``sigmas=(0.0,)`` this is naive prompt learning (CoOp). The features of ``draws_per_image`` noisy
    copies of every shot are computed once and used in turn, epoch after epoch; with as many draws as epochs each
    epoch has noise (and crops) of its own, as in the recipe of the paper.

    Parameters
    ----------
    model : DualEncoder
        Frozen.
    dataset : ImageDataset
        Labelled images, never those that will be certified.
    sigmas : sequence of float, or of tuples of float
        Noise levels, >= 0, in the units of the perturbation; each noisy copy draws one of them. Default:
        `TRAINING_SIGMAS` for pixel noise, otherwise the perturbation's ``usual_sigma``.
    shots : int
        Images per class, drawn with the seed; a class with fewer gives all it has.
    epochs, batch_size, learning_rate
        SGD with momentum .9 and weight decay 5e-4; the first epoch at 1e-5, then a cosine to 0.
    draws_per_image : int
        Noisy copies of each shot.
    augmentation : CropAndFlip, optional
        Cut out and mirror every copy at random before its noise, as CoOp does (a crop of 0.08); None shows it whole.
    seed : int
        Of shots, noise, initialisation and order.
    **form
        ``n_context`` (5) context tokens; ``class_specific`` (False): one context per class instead of a shared one;
        ``position`` ("end", "middle", "front"): where the class name stands; ``template``: start from this hand-written
        prompt, whose tokens are the context, instead of from random vectors (standard deviation 0.02); ``tunable``:
        learn only the first so many of its tokens; ``perturbation`` ("pixel-noise"): what makes the copies, as in
        `certify_dataset`, which certifies the prompts for no other.

    Returns
    -------
    PromptSet

    Raises
    ------
    ValueError
        A parameter out of range, a class without images, or a model for which `why_not_learned` has an answer.

    References
    ----------
    Zhou et al. 2022 (CoOp), arXiv:2109.01134; PromptSmooth, Eq. 1.
    """
    known = ("perturbation", "n_context", "class_specific", "position", "template", "tunable")
    check_keywords(learn_prompts, form, known)
    check_learns(model)
    family = find_perturbation(form.pop("perturbation", PIXEL_NOISE))
    if sigmas is None:
        sigmas = TRAINING_SIGMAS if family == PIXEL_NOISE else (family.usual_sigma,)
    sigmas = check_levels(sigmas, family, model.image_size)
    for name, value in {"epochs": epochs, "batch_size": batch_size, "draws_per_image": draws_per_image}.items():
        check_whole(name, value)
    check_positive("learning_rate", learning_rate)
    draw = np.random.default_rng(seed)
    chosen = draw_shots(dataset, shots, draw)
    generator = torch.Generator().manual_seed(seed)
    start = _start(model, dataset.classes, generator, **form)
    frame = start.frame(model)
    copies = {"sigmas": sigmas, "draws": draws_per_image, "augmentation": augmentation, "perturbation": family}
    bank = noisy_bank(model, chosen, **copies, seed=seed, choose=draw)
    labels = torch.from_numpy(chosen.labels).to(bank.device)
    # In float32 whatever the model computes in.
    context = start.context.detach().float().to(model.device).clone().requires_grad_(True)
    optimiser = torch.optim.SGD([context], lr=learning_rate, momentum=0.9, weight_decay=5e-4)

    def rate(epoch: int) -> float:
        return 1e-5 / learning_rate if epoch == 0 else (1 + math.cos(math.pi * epoch / epochs)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for epoch in range(epochs):
        order = torch.randperm(len(bank), generator=generator).to(bank.device)
        for rows in order.split(batch_size):
            optimiser.zero_grad()
            logits = model.logit_scale * bank[rows, epoch % draws_per_image] @ frame.features(model, context).T
            functional.cross_entropy(logits, labels[rows]).backward()
            optimiser.step()
        schedule.step()
    provenance = {
        "method": "CoOp" if sigmas == (0.0,) else "Few-Shot PromptSmooth",
        "dataset": dataset.id, "split": dataset.split, "images": [int(index) for index in chosen.indices],
        "shots": shots, "sigmas": list(sigmas), "epochs": epochs, "batch_size": batch_size,
        "learning_rate": learning_rate, "draws_per_image": draws_per_image,
        "class_specific": start.context.ndim == 3, "seed": seed, "perturbation": family.name,
        **({} if augmentation is None else {"crop": augmentation.crop, "flip": augmentation.flip}),
    }  # fmt: skip
    return replace(start, context=context.detach().cpu(), provenance=provenance)


def _start(
    model: DualEncoder,
    classes: Sequence[str],
    generator: torch.Generator,
    *,
    n_context: int = 5,
    class_specific: bool = False,
    position: Position = "end",
    template: str = "",
    tunable: int | None = None,
) -> PromptSet:
    """Prompts to start learning from."""
    if tunable is not None and not template:
        raise ValueError(f"tunable={tunable!r} counts tokens of a template, and none is given; use n_context")
    if template:
        start = text_prompts(model, classes, template, tunable=tunable)
    else:
        width = model.embed_tokens(model.tokenize(["x"])).shape[2]
        vectors = torch.empty(n_context, width).normal_(0, _INITIAL_STD, generator=generator)
        start = PromptSet(context=vectors, classes=tuple(classes), model=model.id, position=position)
    if class_specific:
        start = replace(start, context=start.context.expand(len(classes), -1, -1).clone())
    return start


def mean_prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction over noisy copies; at least the mean of their entropies, by concavity.

    Parameters
    ----------
    logits : float [..., T, K]

    Returns
    -------
    float [...], in nats

    References
    ----------
    PromptSmooth, Eq. 2; Shu et al. 2022 (TPT), arXiv:2209.07511.
    """
    log_mean = functional.log_softmax(logits, dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])
    return -(log_mean.exp() * log_mean).sum(dim=-1)


def sharpen(
    model: DualEncoder,
    frame: PromptFrame,
    context: Tensor,
    features: Tensor,
    *,
    steps: int = 1,
    learning_rate: float = 5e-3,
) -> Tensor:
    """Zero-Shot PromptSmooth: take steps that lower the entropy of the mean prediction over noisy copies.

    Parameters
    ----------
    model : DualEncoder
    frame : PromptFrame
    context : float32 [n_context, w] or [K, n_context, w]
        Where the steps start; not changed.
    features : float32 [T, d] or [n, T, d]
        Unit-norm features of noisy copies of one image, or of n images whose entropies are averaged.
    steps : int
        AdamW steps (weight decay .01); the optimiser starts anew at every call.
    learning_rate : float

    Returns
    -------
    float32, shape of context
    """
    check_steps(steps, learning_rate)
    features = features.detach().float()
    with torch.enable_grad():
        learned = context.detach().float().clone().requires_grad_(True)
        optimiser = torch.optim.AdamW([learned], lr=learning_rate)
        for _ in range(steps):
            optimiser.zero_grad()
            logits = model.logit_scale * features @ frame.features(model, learned).T
            mean_prediction_entropy(logits).mean().backward()
            optimiser.step()
    return learned.detach()


def check_steps(steps: int, learning_rate: float) -> None:
    """Refuse an adaptation without steps, or with steps of no size."""
    check_whole("steps", steps, hint=": adaptation takes at least one step; FixedPrompts takes none")
    check_positive("learning_rate", learning_rate)


def check_learns(model: DualEncoder) -> None:
    """Refuse to learn prompts for a model that takes none."""
    if reason := why_not_learned(model):
        raise ValueError(f"{reason}; hand-written prompts work with it (class_features)")

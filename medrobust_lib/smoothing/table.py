"""Certify a whole data set: one bank of noisy features per image and noise level serves every method."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from medrobust_lib.checks import check_keywords
from medrobust_lib.data.dataset import ABSTAINED, ImageDataset
from medrobust_lib.experiments import map_items, open_store, progress
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.models.own import Classifier
from medrobust_lib.models.weights import fingerprint
from medrobust_lib.places import VERSION
from medrobust_lib.smoothing.bounds import maximum_radius
from medrobust_lib.smoothing.certificate import ABSTAIN, GUARANTEES
from medrobust_lib.smoothing.certify import (
    Answers,
    Plan,
    Rules,
    agreement,
    answers_to_copies,
    check_not_training,
    checked_answers,
    take_votes,
)
from medrobust_lib.smoothing.methods import (
    AdaptationFeatures,
    Member,
    PromptMethod,
    denoised,
    zero_shot_methods,
)
from medrobust_lib.smoothing.noise import Batches, NoiseStream, make_batches
from medrobust_lib.smoothing.perturbations import (
    PIXEL_NOISE,
    Perturbation,
    Sigma,
    check_levels,
    find_perturbation,
    level_in_words,
)
from medrobust_lib.smoothing.sequential import plan_constants


@dataclass(frozen=True, eq=False)
class _Study:
    """Everything a worker needs; it travels to each worker once."""

    model: DualEncoder
    data: ImageDataset
    methods: tuple[PromptMethod, ...]
    rules: Rules
    plans: dict[tuple[Sigma, int], Plan]  # by sigma and by the number of candidates that share alpha
    perturbation: Perturbation
    seed: int
    batches: Batches


def certify_dataset(
    model: DualEncoder | Callable[[Tensor], Any],
    data: ImageDataset,
    methods: Sequence[PromptMethod] | None = None,
    *,
    sigmas: Sequence[Sigma] | None = None,
    perturbation: str | Perturbation = PIXEL_NOISE,
    seed: int = 0,
    store: Path | str | None = None,
    jobs: int = 1,
    backend: str = "loky",
    batch_size: int | None = None,
    **rules: Any,
) -> pd.DataFrame:
    """Certify every image at every noise level with every prompt method.

    The image tower never sees a prompt, so the features of one noisy copy are computed once and scored by all
    methods: five methods cost hardly more than one, and their certificates are compared on the same noise.
    Memory does not grow with n.

    Parameters
    ----------
    model : DualEncoder or callable
        A callable is a classifier of pixels float32 [b, 3, H, W] in [0, 1], which gives labels, whole numbers [b], or
        scores, float [b, K]: class k is the k-th of `data`. H = W is its attribute ``image_size``, or the side of the
        images of `data`; `Classifier` takes more settings.
    data : ImageDataset
    methods : sequence of PromptMethod, optional
        Default: `zero_shot_methods`; of a classifier the one that has its name. Names must differ, or what the methods
        are ``about``.
    sigmas : sequence of float, or of tuples of float
        Standard deviations of the noise, > 0, in the units of the perturbation: for pixel noise in [0, 1] pixel units
        at the model's input size; tuples for a perturbation with several parameters. Default: its ``usual_sigma``.
    perturbation : str or Perturbation
        What is smoothed over: "pixel-noise", "contrast", "brightness", "contrast-brightness", "gamma", "blur", or an
        object of your own. Sigmas, radii and the radii of the table are in the units of its parameter.
    seed : int
        Of the noise.
    store : Path, optional
        Folder that keeps finished rows: a run that was killed resumes there and ends with the same table,
        byte for byte in ``table.csv``. Images and sigmas may be added later; any other change is refused.
    jobs : int
        Worker processes; -1 for one per core.
    backend : {"loky", "dask"}
        "dask" uses the active dask.distributed client.
    batch_size : int, optional
        Noisy copies at a time. Default: from the free memory; halved when memory runs out.
    **rules
        Fields of `Rules`: ``n0`` (100) and ``n`` (10,000) draws, ``alpha`` (0.001), ``sampling`` ("sequential"), \
``mode`` ("predict"), ``radii`` (those of the perturbation: for pixel noise of PromptSmooth's tables), ``bounds`` \
("two"; "one" to evaluate).

    Returns
    -------
    DataFrame
        One row per image, sigma and method, in this order, with columns dataset, image (index in the full split), file,
        patient (where the data know it), label, class_name, model, method, guarantee, n_classes, perturbation, sigma (a
        text for a tuple), predicted (-1: abstain), predicted_name ("abstain"), confidence (k / n: the share of votes,
        no probability of being right), radius, radius_tested (the largest that was asked for and can be certified),
        radius_reach (the largest that n draws can certify), p_lower, p_upper, bounds, k, n, n0, draws, alpha, sampling,
        mode, seed, what the methods are about, and seconds (of the image at this sigma, all methods together; the same
        in every row of it).

    Raises
    ------
    ValueError
        A parameter out of range; two methods of one name; a store that holds another study, with the
        differing parameters named.

    Notes
    -----
    Counts do not depend on batch size, number of workers or resumption, up to votes that are tied to
    within the rounding of floating-point sums.
    """
    check_keywords(certify_dataset, rules, Rules.__dataclass_fields__)
    model = _checked_model(model, data)
    methods = tuple(zero_shot_methods(model, data) if methods is None else methods)
    perturbation = find_perturbation(perturbation)
    sigmas = [perturbation.usual_sigma] if sigmas is None else sigmas
    sigmas = check_levels(sigmas, perturbation, model.image_size, clean=False)
    _check_methods(methods, data, perturbation)
    if not methods:
        raise ValueError("nothing to certify: no method was given")
    asked = Rules(**{"radii": perturbation.radii} | rules)
    shares = {method.n_candidates for method in methods}
    study = _Study(
        model=model, data=data, methods=methods, rules=asked, seed=seed,
        plans={
            (sigma, share): asked.plan(perturbation.unit(sigma), share=share, law=perturbation.law)
            for sigma in sigmas
            for share in shares
        },
        perturbation=perturbation,
        batches=make_batches(batch_size, model.device, (3, model.image_size, model.image_size)),
    )  # fmt: skip
    _warn_of_unreachable_radii(study)
    items = {_key(data, position, sigma): (position, sigma) for position in range(len(data)) for sigma in sigmas}
    finished: dict[str, tuple[list[dict[str, Any]], float]] = {}
    with ExitStack() as stack:
        kept = None
        if store is not None:
            kept = stack.enter_context(open_store(Path(store), parameters=_manifest(study)))
        done = kept.done if kept else frozenset()
        missing = [key for key in items if key not in done]
        results = map_items(_certify_item, [items[key] for key in missing], context=study, jobs=jobs, backend=backend)
        shown = progress(
            results,
            total=len(items), done=len(items) - len(missing), resumes=kept is not None,
            description=f"certify {data.id}", unit="images" if len(sigmas) == 1 else "images x sigmas",
        )  # fmt: skip
        for place, (rows, seconds) in shown:
            if kept:
                kept.append(missing[place], rows, seconds=seconds)
            else:
                finished[missing[place]] = (rows, seconds)
        if kept:
            kept.finish(items)
            return kept.table(items, with_seconds=True)
    return pd.DataFrame([{**row, "seconds": finished[key][1]} for key in items for row in finished[key][0]])


def _certify_item(study: _Study, item: tuple[int, Sigma]) -> tuple[list[dict[str, Any]], float]:
    """Certify one image at one noise level with every method."""
    started = time.perf_counter()
    position, sigma = item
    rules = study.rules
    index, label, classes = int(study.data.indices[position]), int(study.data.labels[position]), study.data.classes
    image = {"dataset": study.data.id, "image": index, "file": study.data.files[position]}
    image |= {"patient": study.data.groups[position]} if study.data.groups else {}
    pixels = study.model.prepare(study.data.images[position : position + 1])[0].to(study.model.device)
    # Classifiers are complete before any noise of a certificate exists.
    stream = NoiseStream(study.seed, study.data.id, index, sigma, "adapt", study.perturbation)
    classifiers = _classifiers(study, pixels, stream)
    answers = _bank(study, [member for members in classifiers for member in members], pixels, stream)
    plans = [study.plans[sigma, len(members)] for members in classifiers for _ in members]
    tested = label if rules.mode == "evaluate" else None
    verdicts = iter(take_votes(answers, plans, n0=rules.n0, label=tested, bounds=rules.bounds))
    rows = []
    for method, members in zip(study.methods, classifiers, strict=True):
        found = [next(verdicts) for _ in members]
        verdict = agreement(found)
        plan = study.plans[sigma, len(members)]
        rows.append({
            **image, "label": label, "class_name": classes[label], "model": study.model.id, "method": method.name,
            "guarantee": method.guarantee, "n_classes": len(classes),
            "perturbation": study.perturbation.name,
            "sigma": level_in_words(sigma) if isinstance(sigma, tuple) else sigma,
            "predicted": verdict.predicted,
            "predicted_name": ABSTAINED if verdict.predicted == ABSTAIN else classes[verdict.predicted],
            "confidence": min((one.k / one.n for one in found if one.n), default=None),
            "radius": verdict.radius, "radius_tested": plan.largest_radius,
            "radius_reach": maximum_radius(plan.n, plan.alpha, plan.sigma, law=plan.law), "p_lower": verdict.p_lower,
            "p_upper": verdict.p_upper, "bounds": verdict.bounds, "k": verdict.k, "n": verdict.n,
            "n0": rules.n0, "draws": rules.n0 + verdict.n, "alpha": rules.alpha,
            "sampling": rules.sampling, "mode": rules.mode, "seed": study.seed, **method.about,
        })  # fmt: skip
    return rows, time.perf_counter() - started


def _classifiers(study: _Study, pixels: Tensor, stream: NoiseStream) -> list[list[Member]]:
    """Classifiers of every method for one image; methods that adapt to the same noisy copies share them."""
    adaptations: dict[tuple[int, int], AdaptationFeatures] = {}
    classifiers = []
    for method in study.methods:
        key = (method.n_adapt, id(method.denoiser))
        if method.n_adapt and key not in adaptations:
            adaptations[key] = AdaptationFeatures.draw(
                study.model, pixels, stream, count=method.n_adapt, denoiser=method.denoiser, batches=study.batches
            )
        found = method.classifiers(adaptations.get(key))
        classifiers.append([(classifier, method.denoiser) for classifier in found])
    return classifiers


def _bank(study: _Study, members: Sequence[Member], pixels: Tensor, stream: NoiseStream) -> Answers:
    """Noisy features of one image: drawn in batches, encoded once per denoiser, scored by every classifier."""
    n_classes = len(study.data.classes)

    def label(positions: Sequence[int], copies: Tensor) -> list[Tensor]:
        asked = [members[place] for place in positions]
        denoisers = {id(denoiser): denoiser for _, denoiser in asked}
        features = {
            key: study.model.encode_image(denoised(denoise, copies, stream.sigma)) for key, denoise in denoisers.items()
        }
        labels = [classify(features[id(denoiser)]) for classify, denoiser in asked]
        return [checked_answers(found, len(copies), n_classes=n_classes) for found in labels]

    return answers_to_copies(label, pixels, stream, study.batches)


def _manifest(study: _Study) -> dict[str, Any]:
    """Everything that shapes the rows, but images and sigmas: those are in the keys, so more can be added."""
    model, data, rules = study.model, study.data, study.rules
    sequential = rules.sampling == "sequential"
    named = sequential and rules.radii is not None
    return {
        "medrobust_lib": VERSION, "model": model.id, "weights": model.identity()["weights"],
        "preprocessing": asdict(model.preprocessing), "dtype": model.precision,
        "device": model.device.type, "dataset": data.id, "split": data.split, "classes": list(data.classes),
        "methods": [method.record() for method in study.methods], "perturbation": study.perturbation.name,
        "n0": rules.n0, "n": rules.n, "alpha": rules.alpha, "sampling": rules.sampling, "mode": rules.mode,
        "bounds": rules.bounds,
        "radii": [float(radius) for radius in rules.radii] if named else None,
        "boundaries": plan_constants() if sequential else None, "seed": study.seed,
    }  # fmt: skip


def _key(data: ImageDataset, position: int, sigma: Sigma) -> str:
    # The content is part of the name: a folder of images may change between two runs.
    # Copies, because torch takes neither read-only arrays nor mirrored views.
    content = [torch.from_numpy(np.array(data.images[position])), torch.tensor(int(data.labels[position]))]
    return f"image {int(data.indices[position])} ({fingerprint(content)}), sigma {sigma!r}"


def _checked_model(model: Any, data: Any) -> DualEncoder:
    """The model, or a classifier in the form of one; raises for what is neither, and for data of another kind."""
    if not isinstance(data, ImageDataset):
        raise TypeError(f"data must be an ImageDataset (`load_dataset` gives one), not {type(data).__name__}")
    check_not_training(model)
    if isinstance(model, DualEncoder):
        return model
    if not callable(model):
        raise TypeError(
            "certify_dataset takes a DualEncoder (`load_model` gives one) or a function from pixels to labels, not "
            f"{type(model).__name__}"
        )
    sides = {model.image_size} if hasattr(model, "image_size") else {*data.images.shape[1:3]}
    if len(sides) > 1:
        raise ValueError(
            f"the images of {data.id} are {data.images.shape[1]} x {data.images.shape[2]} px: give the classifier an "
            "attribute image_size, the side of the square that it reads, or make it with Classifier(image_size=...)"
        )
    return Classifier(model, n_classes=len(data.classes), image_size=sides.pop())


def _warn_of_unreachable_radii(study: _Study) -> None:
    radii = study.rules.radii
    if study.rules.sampling == "fixed" or radii is None or not any(radius > 0 for radius in radii):
        return
    for (sigma, _), plan in study.plans.items():
        if plan.largest_radius == 0:
            reach = maximum_radius(plan.n, plan.alpha, plan.sigma, law=plan.law)
            warnings.warn(
                f"at sigma {level_in_words(sigma)} {plan.n} draws reach radius {reach:.3g}, so none of the radii asked "
                "for can be certified there and every radius will be 0; ask for smaller radii or for more draws",
                stacklevel=3,
            )


def _check_methods(methods: tuple[PromptMethod, ...], data: ImageDataset, perturbation: Perturbation) -> None:
    """Raise for what is no method, for two that could not be told apart, and for prompts made for something else."""
    for method in methods:
        if not isinstance(method, PromptMethod):
            raise TypeError(
                f"{method!r} is no PromptMethod; `FixedPrompts(name, model.class_features(classes, templates))` is one"
            )
        if method.guarantee not in GUARANTEES:
            raise ValueError(
                f"method {method.name!r} states the guarantee {method.guarantee!r}; choose one of "
                f"{', '.join(GUARANTEES)}"
            )
        method.check_classes(data.classes, data.id)
        if method.learned_on not in (None, perturbation.name):
            raise ValueError(
                f"method {method.name!r} has prompts that were learned on {method.learned_on!r} and is to be "
                f"certified for {perturbation.name!r}; learn them with perturbation={perturbation.name!r}"
            )
        if method.denoiser is not None and perturbation != PIXEL_NOISE:
            raise ValueError(f"method {method.name!r} removes noise from pixels, and {perturbation.name!r} adds none")
    told = [(method.name, *sorted(method.about.items())) for method in methods]
    repeated = sorted({name for name, *about in told if told.count((name, *about)) > 1})
    if repeated:
        raise ValueError(f"methods need distinct names, {', '.join(map(repr, repeated))} occurs more than once")

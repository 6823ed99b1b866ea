"""Images to learn from, images to choose by or adapt to, and test images, of a data set with splits or without."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from medrobust_lib.checks import check_choice, check_keywords, check_positive, check_whole
from medrobust_lib.data.dataset import (
    Draw,
    ImageDataset,
    balanced_positions,
    check_draw,
    drawn_of_each_class,
    stratified_positions,
)
from medrobust_lib.data.inspection import learned_too
from medrobust_lib.data.registry import OpenSplit, SplitOptions, open_split

Positions = NDArray[np.int64]
LearnFrom = Literal["train", "val"]

_HELD_OUT = 0.2  # of each class of the train images, for validation, where there is no val split


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
    """What a method may learn from and what it is judged on.

    Attributes
    ----------
    train : ImageDataset
        Labelled images to learn from, none of them in ``test``.
    test : ImageDataset
    divided : bool
        Whether the data set itself keeps ``train`` and ``test`` apart. If not, both come out of one split:
        with images of one patient on both sides, results look better than they are.
    notes : tuple of str
        Sentences for the reader: where the images come from, which classes are short of them, and the caveats of
        all parts but ``test``.
    """

    train: ImageDataset
    test: ImageDataset
    divided: bool
    notes: tuple[str, ...]

    @property
    def copies(self) -> list[str]:
        """A sentence where test images are nearly identical to train images; see `learned_too`."""
        test, train = self.test, self.train
        return learned_too(test.images, train.images, names=test.files, learned_names=train.files)


@dataclass(frozen=True, eq=False, kw_only=True)
class LearningSplits(Splits):
    """What `learning_splits` draws; its notes also say how many test images are copies of learned ones.

    Attributes
    ----------
    pool : ImageDataset
        Images whose labels a method does not look at, none of them in ``test``; other images than those of
        ``train`` as far as there are any.
    pool_note : str
        The one of the notes that is about the pool alone; empty where there is none.
    """

    pool: ImageDataset
    pool_note: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class FractionSplits(Splits):
    """What `fraction_splits` draws; no image is in two of the three.

    Attributes
    ----------
    val : ImageDataset
        To choose among check points or settings.
    fraction : float
        The share that ``train`` is of the train images, or of the val split where that is learned from.
    """

    val: ImageDataset
    fraction: float


def learning_splits(
    dataset: str,
    *,
    shots: int,
    n_test: int,
    n_pool: int,
    seed: int = 0,
    draw: Draw = "stratified",
    **options: Unpack[SplitOptions],
) -> LearningSplits:
    """Draw labelled images to learn from, an unlabelled pool and test images, reproducibly and disjoint.

    A data set with the splits train and test keeps them; its pool is the split val. Without a train split
    (a folder or table that is not divided, or one with test images only) each class is divided: half of its
    images at most, and one at least, are learned from. Without a val split the pool is drawn from images
    that are neither learned from nor tested, and where these are too few, from the learned ones too.
    Only the images drawn are decoded.

    Parameters
    ----------
    dataset : str
        As in `load_dataset`.
    shots : int
        Images per class that a method will learn from. ``train`` has up to twice as many of each class, so
        that a learner with another seed draws partly other images.
    n_test, n_pool : int
        Numbers of images; all where there are fewer. The pool is stratified by class.
    seed : int
    draw : {"stratified", "balanced"}
        How the test images are drawn, as in `load_dataset`.
    **options
        root, image_size, wording, like, class_names, templates, bit_depth and fit, as in `load_dataset`.

    Returns
    -------
    LearningSplits

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_dataset`.
    ValueError
        A number below 1, or no image is left to test.
    """
    check_keywords(learning_splits, options, SplitOptions.__annotations__)
    for name, value in {"shots": shots, "n_test": n_test, "n_pool": n_pool}.items():
        check_whole(name, value)
    check_whole("seed", seed, least=0)
    check_draw(draw, n=n_test)
    sides = _sides(dataset, most=2 * shots, seed=seed, **options)
    learning, learned = sides.learning, sides.learnable
    train = learning.read(learned, n=len(learned), seed=seed, drawn=f"at most {2 * shots} of each class")
    test = _drawn(sides.testing, sides.testable, n=n_test, seed=seed, draw=draw)
    notes, pool_note = [sides.note, *_class_notes(learning, learned, shots=shots, divided=sides.divided)], ""
    if sides.validating is not None:
        pool = _drawn(sides.validating, np.arange(len(sides.validating.labels)), n=n_pool, seed=seed)
    else:
        used = learned if sides.divided else np.union1d(learned, test.indices)
        others = _apart(len(learning.labels), sides.patients, used=used)
        drawn = _among(learning.labels, others, n=n_pool, seed=seed)
        again = _among(learning.labels, learned, n=n_pool - len(drawn), seed=seed)
        pool = learning.read(np.union1d(drawn, again), n=len(drawn) + len(again), seed=seed)
        shared = f"; {len(again)} of its {len(pool)} images are learned from too" if len(again) else ""
        pool_note = f"no val split: the pool comes from the split {pool.split!r}{shared}"
        notes.append(pool_note)
    copies = learned_too(test.images, train.images, names=test.files, learned_names=train.files)
    notes += [*_part_notes(test, train=train, pool=pool), *copies]
    told = {"notes": tuple(notes), "pool_note": pool_note}
    return LearningSplits(train=train, pool=pool, test=test, divided=sides.divided, **told)


def fraction_splits(
    dataset: str,
    *,
    fraction: float,
    n_val: int,
    n_test: int,
    seed: int = 0,
    test_seed: int = 0,
    learn_from: LearnFrom = "train",
    **options: Unpack[SplitOptions],
) -> FractionSplits:
    """Draw a stratified fraction of the train split, and validation and test images, reproducibly and disjoint.

    Every class that the train split has gives at least one image, so a small fraction of a small split may be
    more images than it says; otherwise classes keep their shares as `stratified_positions` rounds them. For one
    ``seed`` a larger fraction contains the smaller one, but for a rare image where that rounding takes one from
    a class. Validation and test images depend on ``test_seed`` alone, so that draws with other seeds or fractions
    are judged on the same images.

    Without a train split (a folder or table that is not divided, or one with test images only) each class is
    divided by ``test_seed``: half of its images at most, and one at least, are train images. Without a val split
    a fifth of the train images of each class, at least one where there are two or more, is set aside before the
    fraction is drawn, and at most ``n_val`` of those are used, so that ``n_val`` changes no train image. The
    fraction is always one of all train images, those set aside among them; a fraction near 1 then takes all that
    are left. Only the images drawn are decoded.

    RobustMedCLIP's code draws its fractions from the val split; with ``learn_from="val"`` so does this, and the two
    splits change places: validation images come from the train split, so that a fraction of 1 is the whole val split
    and no test image is needed to choose by. Without a train split a fifth of the val split is set aside, as above.

    Parameters
    ----------
    dataset : str
        As in `load_dataset`.
    fraction : float
        Of the train images, or of the val split where that is learned from, in (0, 1].
    n_val, n_test : int
        Numbers of images, stratified by class; all where there are fewer.
    seed : int
        Which images to learn from.
    test_seed : int
        Which validation and test images.
    learn_from : {"train", "val"}
        Split that the fraction is one of (the paper's, or that of its authors' code).
    **options
        root, image_size, wording, like, class_names, templates, bit_depth and fit, as in `load_dataset`.

    Returns
    -------
    FractionSplits
        ``train.provenance`` holds fraction, of (the number of images it is a fraction of), seed and test_seed;
        ``train.split`` names the split learned from, ``train.indices`` are the images chosen.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_dataset`.
    ValueError
        ``fraction`` outside (0, 1], a number below 1, an unknown ``learn_from``, no val split to learn from, or no
        image is left to test or to validate.

    References
    ----------
    Imam et al. 2025 (RobustMedCLIP), arXiv:2505.15425, and its code.
    """
    check_keywords(fraction_splits, options, SplitOptions.__annotations__)
    check_choice("learn_from", learn_from, get_args(LearnFrom))
    check_positive("fraction", fraction, most=1, hint=f": give a share of the {learn_from} images, such as 0.1")
    fraction = float(fraction)
    check_whole("n_val", n_val)
    check_whole("n_test", n_test)
    check_whole("seed", seed, least=0)
    check_whole("test_seed", test_seed, least=0)
    sides = _sides(dataset, most=None, seed=test_seed, learn_from=learn_from, **options)
    learning, learnable, other = sides.learning, sides.learnable, _other(learn_from)
    notes = [sides.note]
    if sides.validating is not None:
        free = learnable
        if learn_from == "val":
            notes.append("learned from are images of the split 'val', validation images come from the split 'train'")
        val = _drawn(sides.validating, np.arange(len(sides.validating.labels)), n=n_val, seed=test_seed)
    else:
        held = _held_out(learning.labels, sides.patients, learnable, seed=test_seed, dataset=dataset, other=other)
        free = np.intersect1d(learnable, _apart(len(learning.labels), sides.patients, used=held))
        val = _drawn(learning, held, n=n_val, seed=test_seed)
        used = "" if len(val) == len(held) else f", {len(val)} of them used,"
        notes.append(
            f"no {other} split: {len(held)} of the {len(learnable)} {learn_from} images are kept for validation{used} "
            "and not learned from"
        )
    asked = round(fraction * len(learnable))
    wanted = max(asked, len(np.unique(learning.labels[learnable])))
    learned = _among(learning.labels, free, n=wanted, seed=seed)
    train = learning.read(
        learned, n=len(learned), seed=seed, test_seed=test_seed, fraction=fraction, of=len(learnable),
        drawn=f"stratified fraction of the {learn_from} images, at least one of each class",
    )  # fmt: skip
    if len(learned) != asked:
        reason = "one of each class" if len(learned) > asked else "all but those for validation"
        notes.append(
            f"{len(learned)} of {len(learnable)} {learn_from} images are learned from, where {100 * fraction:.3g} % "
            f"would be {asked}: {reason}"
        )
    notes += _class_notes(learning, learned, shots=0, divided=sides.divided)
    if missing := [learning.classes[label] for label in np.setdiff1d(train.labels, val.labels)]:
        notes.append(f"no image for validation: {', '.join(missing)}")
    test = _drawn(sides.testing, sides.testable, n=n_test, seed=test_seed)
    notes += _part_notes(test, train=train, val=val)
    return FractionSplits(train=train, val=val, test=test, fraction=fraction, divided=sides.divided, notes=tuple(notes))


@dataclass(frozen=True)
class _Sides:
    """The splits of a data set, and which of their images may be learned from and tested."""

    testing: OpenSplit
    learning: OpenSplit
    validating: OpenSplit | None
    learnable: Positions
    testable: Positions
    patients: Positions | None  # of the images among which those to learn from are found

    @property
    def divided(self) -> bool:
        return self.learning is not self.testing

    @property
    def note(self) -> str:
        """Whether the data set itself keeps images to learn from and test images apart, in a sentence."""
        if self.divided:
            said = f"{self.learning.listed.split} and test are the data set's own splits"
            parts = [part for part in (self.learning, self.testing, self.validating) if part]
            shared = [
                f"; {len(one.patients & other.patients)} patients are in both {one.listed.split} and "
                f"{other.listed.split}, so results look better than they are"
                for one, other in itertools.combinations(parts, 2)
                if one.patients & other.patients
            ]
            return said + "".join(shared)
        splits = self.testing.splits
        has = f"has no train split ({', '.join(splits)} only)" if splits else "has no splits"
        said = "patients may be on both sides" if self.patients is None else "all images of a patient on one side"
        return f"the data set {has}: its images were divided class by class, {said}"


def _other(learn_from: LearnFrom) -> LearnFrom:
    """The split beside the one to learn from: where validation images come from."""
    return "train" if learn_from == "val" else "val"


def _sides(
    dataset: str, *, most: int | None, seed: int, learn_from: LearnFrom = "train", **options: Unpack[SplitOptions]
) -> _Sides:
    """Tell the images to learn from, at most so many of a class, from those to test; divide where no split does."""
    testing = open_split(dataset, split="test", **options)
    divided = learn_from in testing.splits
    if learn_from == "val" and not divided:
        has = f"its splits: {', '.join(testing.splits)}" if testing.splits else "it has no splits"
        raise ValueError(
            f"{dataset}: no val split to learn from ({has}); ask for learn_from='train', or keep images apart in a "
            "split 'val' beside 'test'"
        )
    learning = open_split(dataset, split=learn_from, **options) if divided else testing
    patients, share = _numbered(learning.groups), 1.0 if divided else 0.5
    learnable = _of_each_class(learning.labels, None if divided else patients, most=most, share=share, seed=seed)
    testable = np.arange(len(testing.labels)) if divided else _apart(len(learning.labels), patients, used=learnable)
    if not len(testable):
        one, all_of = ("image", "") if patients is None else ("patient", " images")
        raise ValueError(
            f"{dataset}: each class has one {one}, {len(learnable)}{all_of} in all, which is needed to learn from, and "
            "none is left to test; add images, or keep test images apart in a split 'test' beside 'train'"
        )
    other = _other(learn_from)
    validating = open_split(dataset, split=other, **options) if other in testing.splits else None
    return _Sides(testing, learning, validating, learnable, testable, patients)


def _numbered(groups: Sequence[str]) -> Positions | None:
    """Number of each image's patient; None where nobody knows it or no patient has two images."""
    numbers = np.unique(groups, return_inverse=True)[1] if groups else None
    return numbers if numbers is not None and numbers.max() + 1 < len(numbers) else None


def _apart(size: int, patients: Positions | None, *, used: Positions) -> Positions:
    """All positions but the used ones and those of the same patients."""
    everyone = np.arange(size) if patients is None else patients
    return np.flatnonzero(~np.isin(everyone, everyone[used]))


def _of_each_class(
    labels: Positions, patients: Positions | None, *, share: float, seed: int, most: int | None = None
) -> Positions:
    """Draw at most ``most`` images, and a share of the images, of each class; one at least, and of whole patients."""
    counts = np.unique_counts(labels).counts
    wanted = np.clip((share * counts).astype(np.int64), 1, most)
    if patients is None:
        return drawn_of_each_class(labels, wanted, seed=seed)
    whole = _whole_patients(labels, patients, wanted, seed=seed)
    kept = np.clip(np.unique_counts(labels[whole]).counts, None, most)
    return whole[drawn_of_each_class(labels[whole], kept, seed=seed)]


def _whole_patients(labels: Positions, patients: Positions, wanted: Positions, *, seed: int) -> Positions:
    """Draw patients until each class has the images wanted, and leave one of each class that has two, if need be fewer.

    Rare classes choose first. A patient with images of several classes counts for all of them.
    """
    classes, places = np.unique(labels, return_inverse=True)
    images = np.zeros((patients.max() + 1, len(classes)), np.int64)
    np.add.at(images, (patients, places), 1)
    has = images > 0
    several, taken = has.sum(axis=0) > 1, np.zeros(len(images), bool)
    order = np.random.default_rng([seed, len(classes)]).permutation(np.flatnonzero(has.any(axis=1)))
    for place in np.argsort(images.sum(axis=0), kind="stable"):
        for patient in order[has[order, place]]:
            if images[taken, place].sum() >= wanted[place]:
                break
            left = has[~taken].sum(axis=0) - has[patient]
            taken[patient] |= bool((left[several & has[patient]] > 0).all())
    return np.flatnonzero(taken[patients])


def _among(labels: Positions, among: Positions, *, n: int, seed: int) -> Positions:
    """Draw at most n of the positions ``among`` by `stratified_positions`; none for n = 0."""
    n = min(n, len(among))
    return among[stratified_positions(labels[among], n=n, seed=seed)] if n > 0 else among[:0]


def _drawn(opened: OpenSplit, among: Positions, *, n: int, seed: int, draw: Draw = "stratified") -> ImageDataset:
    """Read at most n of the positions ``among``."""
    if draw == "balanced":
        drawn = among[balanced_positions(opened.labels[among], n=min(n, len(among)), seed=seed)]
        return opened.read(drawn, n=len(drawn), seed=seed, draw=draw)
    drawn = _among(opened.labels, among, n=n, seed=seed)
    return opened.read(drawn, n=len(drawn), seed=seed)


def _held_out(
    labels: Positions, patients: Positions | None, pool: Positions, *, seed: int, dataset: str, other: LearnFrom
) -> Positions:
    """Positions for validation, none from a class with one image, or one patient, only."""
    members = np.arange(len(labels)) if patients is None else patients
    pairs = np.unique(np.stack([members[pool], labels[pool]]), axis=1)
    alone = pairs[0, np.isin(pairs[1], np.flatnonzero(np.bincount(pairs[1]) < 2))]  # the only ones of a class
    shared = pool[~np.isin(members[pool], alone)]
    if not len(shared):
        one = "images" if patients is None else "patients"
        raise ValueError(
            f"{dataset}: no class has two {one} to learn from, so none is left for validation; add images, or keep "
            f"validation images apart in a split {other!r} beside 'test'"
        )
    these = None if patients is None else np.unique(patients[shared], return_inverse=True)[1]
    return shared[_of_each_class(labels[shared], these, share=_HELD_OUT, seed=seed)]


def _class_notes(learning: OpenSplit, learned: Positions, *, shots: int, divided: bool) -> list[str]:
    """Name the classes with nothing to learn from, with fewer images than ``shots`` and, if divided here, with one."""
    counts = np.bincount(learning.labels, minlength=len(learning.classes))
    kept = np.bincount(learning.labels[learned], minlength=len(learning.classes))
    classes = list(zip(learning.classes, counts, kept, strict=True))
    short = {
        "no image to learn from": [name for name, _, few in classes if few == 0],
        f"fewer than {shots} images to learn from": [f"{name} {few}" for name, _, few in classes if 0 < few < shots],
        "one image only, learned from and not tested": [name for name, n, _ in classes if n == 1 and not divided],
    }
    return [f"{what}: {', '.join(names)}" for what, names in short.items() if names]


def _part_notes(test: ImageDataset, **parts: ImageDataset) -> list[str]:
    """Caveats of the parts that no card tells beside those of the test images; each names its part."""
    return [
        f"{name} images: {said}" for name, part in parts.items() for said in part.caveats if said not in test.caveats
    ]

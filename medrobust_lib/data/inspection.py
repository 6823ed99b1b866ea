"""What must be known of images before anything is measured on them: sentences for warnings and result cards."""

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import KDTree

from medrobust_lib.data.wording import folded

_DIM = 64  # of 255: an image without a value above it leaves two bits or more of the eight empty
_FLAT = 32  # of 255: gray levels of an image that no window fits; chest films and phantoms have 50 or more
_LEAST_CROP = 0.05  # share of an image's area
_VERY_FEW = 5  # images of a class
_SHOWN = 3  # names of files in a sentence

_HOT = 0.001  # share of an image's pixels that may lie outside a range: markers, dead and hot pixels
_MANY = 5  # times as many images
_CLOSE = 0.8  # difflib's ratio
_THUMBNAIL = 8  # px
# Grey levels of 255 that a pixel of the thumbnail may differ by: saved again as JPEG or resized, an image of 64 px or
# more moves by less; different images of blood cells, chests, breasts and fundi lie 5 or more apart, phantoms 10.
_SAME = 4.0
_ALIKE = 0.9  # correlation of the pixels, for images that are dark but for a few of them


def seen_in(
    images: NDArray[np.uint8], labels: NDArray[np.int64], *, names: Sequence[str], shapes: Sequence[tuple[int, int]]
) -> list[str]:
    """Say what is wrong with the images of a set as a whole, in sentences for its card.

    Parameters
    ----------
    images : uint8 [n, H, W, 3]
    labels : int64 [n]
    names : sequence of n str
        What to call each image.
    shapes : sequence of (height, width)
        Of the images as they came, as far as a centre crop will or did cut them; empty where nothing is cut off.

    Returns
    -------
    list of str
        Values that do not fill their range, what a centre crop throws away, and images that are there twice.
    """
    return [*_dim(images, names), *_cropped(shapes), *_twice(images, labels, names)]


def ignored_in(files: Iterable[Sequence[str]], names: Sequence[str]) -> list[str]:
    """Count what was ignored in reading files (see `decoding.left_out`), in a sentence for a card; none if nothing.

    Parameters
    ----------
    files : iterable of sequences of str
        What was ignored in each file; empty where the images are not files.
    names : sequence of str
        What to call each file.
    """
    found: dict[str, list[str]] = {}
    for whats, name in zip(files, names, strict=False):
        for what in whats:
            found.setdefault(what, []).append(name)
    most_first = sorted(found.items(), key=lambda item: -len(item[1]))
    told = ", ".join(f"{what} of {len(where)} ({first_of(where)})" for what, where in most_first)
    advice = "Where it matters, rotate, flatten or convert them as a viewer shows them, and save them again."
    return [f"Ignored in reading image files: {told}. {advice}"] if told else []


def close_names(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Name each class of very few images that is spelled nearly like a class of many, in sentences for a card.

    Parameters
    ----------
    names : sequence of str
    counts : sequence of int
        Images of each.
    """
    found = []
    for (rare, few), (name, count) in product(zip(names, counts, strict=True), repeat=2):
        if 0 < few <= _VERY_FEW and few * _MANY <= count and _misspelt(folded(rare), folded(name)):
            found.append(
                f"Class {rare!r} ({few} image{'s' * (few > 1)}) is spelled nearly like {name!r} ({count}). If one is a "
                "misspelling, rename it, or give both one noun with class_names."
            )
    return found


def _misspelt(one: str, other: str) -> bool:
    """Whether two names differ in one letter, or in two that changed places, behind the first one of a longer word."""
    matcher = difflib.SequenceMatcher(None, one, other)
    edits = [(one[a:b], other[c:d]) for what, a, b, c, d in matcher.get_opcodes() if what != "equal"]
    removed, added = ("".join(parts) for parts in zip(*edits, strict=True)) if edits else ("", "")
    small = max(len(removed), len(added)) <= 1 and (len(edits) < 2 or removed == added)
    # abnormal is no misspelling of normal, nor atypical of typical; grade 1 none of grade 2, nor stage II of stage I.
    marks = [re.findall(r"\d+|(?<![^\W_])[^\W_]{1,3}(?![^\W_])|\+", text) for text in (one, other)]
    return small and matcher.ratio() >= _CLOSE and one[:1] == other[:1] and marks[0] == marks[1]


def first_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def prevalence_changed(drawn: NDArray[np.int64], split: NDArray[np.int64]) -> str:
    """Say what one answer for all images scores on a class-balanced draw, and in its split, in a sentence for a card.

    Parameters
    ----------
    drawn, split : int64 [n], int64 [N]
        Labels of the images drawn, and of all among which they were drawn.
    """
    most, whole = np.bincount(drawn).max(), np.bincount(split).max() / len(split)
    told = (
        f"Class-balanced draw: the best constant answer is right on {most} of {len(drawn)} images "
        f"({100 * most / len(drawn):.1f} %; in the whole split {100 * whole:.1f} %)"
    )
    if len(set(np.unique_counts(split).counts.tolist())) == 1:
        return f"{told}; the split is balanced itself."
    return f"{told}, and accuracy on the draw is no estimate of accuracy at the data set's own prevalence."


def tell(set_name: str, caveats: Sequence[str]) -> None:
    """Give one warning for a set, in the place of the first caller outside this package; none without caveats."""
    if not caveats:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("medrobust_lib."):
        frame, level = frame.f_back, level + 1
    warnings.warn("\n- ".join([f"{set_name}, before anything is measured:", *caveats]), UserWarning, stacklevel=level)


def _dim(images: NDArray[np.uint8], names: Sequence[str]) -> list[str]:
    channels = np.array([np.reshape(Image.fromarray(image).histogram(), (3, 256)) for image in images])
    shares = channels.sum(1).cumsum(1) / channels[0].sum()
    low, high = (shares < _HOT).sum(1), (shares < 1 - _HOT).sum(1)
    peaks = images.max(axis=(1, 2, 3))
    dim = np.flatnonzero(high <= _DIM)
    # White background of stained tissue is flat too, but coloured.
    gray = (channels == channels[:, :1]).all((1, 2))
    flat = np.flatnonzero((high > _DIM) & (high - low < _FLAT) & gray)
    found = []
    if len(dim):
        peak = int(np.where(peaks > _DIM, high, peaks)[dim].max())
        # The fewest bits that hold the least 16-bit value shown as `peak`.
        deep, shallow = (257 * peak - 128).bit_length(), peak.bit_length()
        bits = f": folder:PATH?bit_depth={deep} of 16, or ?bit_depth={shallow} of 8" if peak else ""
        hot = dim[peaks[dim] > _DIM]
        found.append(
            f"{len(dim)} of {len(images)} images do not fill their range and are nearly black to any model: values "
            f"from {int(images[dim].min())} to {peak} of 255 ({first_of([names[k] for k in dim])}). Where files hold "
            f"fewer bits than they have room for, say how many{bits}; scale arrays to 0..255."
        )
        if len(hot):
            found[-1] += (
                f" {len(hot)} of them hold a few brighter pixels, up to {int(peaks[hot].max())} "
                f"({first_of([names[k] for k in hot])}): bit_depth refuses values above it, so set these pixels to 0 "
                "first."
            )
    if len(flat):
        found.append(
            f"{len(flat)} of {len(images)} images are nearly flat gray to any model: "
            f"{int((high - low)[flat].max()) + 1} gray levels or fewer in each, from {int(low[flat].min())} to "
            f"{int(high[flat].max())} of 255 ({first_of([names[k] for k in flat])}). Where files hold values "
            "with an offset, such as Hounsfield units plus 32768, save them with a window that brings the tissue to "
            "the full range; bit_depth cannot."
        )
    return found


def _cropped(shapes: Sequence[tuple[int, int]]) -> list[str]:
    lost = [1 - min(shape) / max(shape) for shape in shapes]
    if max(lost, default=0) < _LEAST_CROP:
        return []
    return [
        f"A centre crop throws away up to {100 * max(lost):.0f} % of an image's area ({100 * np.median(lost):.0f} % in "
        'the median), which no model sees then. fit="pad" of load_dataset, or folder:PATH?fit=pad, keeps all of it.'
    ]


def near_copies(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Find images that are nearly identical to one of the others: copies, also resized or saved again as JPEG.

    Parameters
    ----------
    images, others : uint8 [n, H, W, 3], [m, H, W, 3]
        For copies within one set, the same array twice: an image is then no copy of itself.

    Returns
    -------
    int64 [k, 2]
        Pairs of positions in ``images`` and in ``others``, at most two or three for an image.
    """
    small, small_others = _thumbnails(images, _THUMBNAIL), _thumbnails(others, _THUMBNAIL)
    tolerance = _SAME * max(1.0, small.max(), small_others.max()) / 255  # dark images differ by less
    neighbours = np.arange(min(3, len(others))) + 1
    distances, found = KDTree(small_others).query(small, k=neighbours, p=np.inf, distance_upper_bound=tolerance)
    pairs = np.array([(k, found[k, rank]) for k, rank in np.argwhere(np.isfinite(distances))], np.int64).reshape(-1, 2)
    if images is others:
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return pairs[[_alike(images[k], others[other]) for k, other in pairs]]


def learned_too(
    tested: NDArray[np.uint8],
    learned: NDArray[np.uint8],
    *,
    names: Sequence[str] = (),
    learned_names: Sequence[str] = (),
) -> list[str]:
    """Say which tested images are nearly identical to one that is learned from, in a sentence for a card or in none.

    Parameters
    ----------
    tested, learned : uint8 [n, H, W, 3], [m, H, W, 3]
    names, learned_names : sequence of n and of m str
        What to call each; default: the position, from 0.
    """
    pairs = near_copies(tested, learned)
    if not len(pairs):
        return []
    names = names or [f"test image {k}" for k in range(len(tested))]
    learned_names = learned_names or [f"train image {k}" for k in range(len(learned))]
    return [
        f"{len(np.unique(pairs[:, 0]))} of {len(tested)} test images are nearly identical to images that are learned "
        f"from ({_alike_in_words(pairs, names, learned_names)}): results are better than they should be. Keep each in "
        "one of the two only."
    ]


def _alike_in_words(pairs: NDArray[np.int64], names: Sequence[str], others: Sequence[str]) -> str:
    return first_of([f"{names[k]} = {others[other]}" for k, other in pairs])


def _thumbnails(images: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """Mean luma of side x side blocks, [n, side * side]."""
    luma = (Image.fromarray(image).convert("L").convert("F") for image in images)
    return np.stack([np.asarray(picture.resize((side, side), Image.Resampling.BOX)).ravel() for picture in luma])


def _alike(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    first, second = (_thumbnails(one[None], 4 * _THUMBNAIL)[0] for one in (image, other))
    first, second = first - first.mean(), second - second.mean()
    # A correlation, but with the larger variance: a blank image is like a blank one only. The 1 is for rounding.
    return float(first @ second) + 1 >= _ALIKE * max(float(first @ first), float(second @ second))


def _twice(images: NDArray[np.uint8], labels: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    pairs = near_copies(images, images) if len(images) > 1 else ()
    if not len(pairs):
        return []
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    contrary = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
    found = [
        f"{len(np.unique(pairs))} of {len(images)} images are nearly identical to another one "
        f"({_alike_in_words(pairs, names, names)}): each has a row of its own in tables, and they count twice in every "
        "share. Remove one file of each pair; data.inspection.near_copies(images, images) finds them all."
    ]
    if len(contrary):
        found.append(
            f"{len(np.unique(contrary))} images are nearly identical to one with another label "
            f"({_alike_in_words(contrary, names, names)}): one of the two labels is wrong, or the images do not show "
            "what the label says. Look at both, then mend the label or remove both."
        )
    return found

"""Instrument of notebook 01: an image against sentences of one's own."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from medrobust_lib.data.dataset import ImageDataset
from medrobust_lib.explore.encoded import EncodedImages
from medrobust_lib.explore.instrument import Instrument, image_slider
from medrobust_lib.models.dual_encoder import DualEncoder
from medrobust_lib.plots import MOST_CLASSES, leading, shorten
from medrobust_lib.plots.panels import add_panel, add_picture, fixed_figure, plot_dots, plot_named_bars, write_names

_ROW = 0.3  # inches


@torch.no_grad()
def similarity_view(
    model: DualEncoder,
    dataset: ImageDataset,
    *,
    index: int,
    prompts: Sequence[str],
    limits: tuple[float, float] | None = None,
    encoded: EncodedImages | None = None,
) -> Figure:
    """Draw one image, its cosine similarity with each prompt, and the softmax probabilities over these prompts.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    index : int
        Position in the data set, 0 to n-1.
    prompts : sequence of str
        Whole sentences, one or more. All take part in the softmax; of more than 24 the closest are shown.
    limits : (float, float), optional
        Range of the cosines shown; values beyond widen it. Default: that of these prompts.
    encoded : EncodedImages, optional
        Of the same model and data set; keeps features from one call to the next.

    Raises
    ------
    ValueError
        No prompt.
    """
    if not prompts:
        raise ValueError("no prompt: give at least one, one a line")
    encoded = encoded or EncodedImages(model, dataset)
    texts = encoded.texts(prompts)
    cosine = (encoded.clean(index)[None] @ texts.T)[0].cpu()
    probabilities = model.probabilities(encoded.clean(index)[None], texts)[0].cpu().numpy()
    kept = leading(cosine.numpy())
    left_out = f"; the {len(kept)} closest of {len(prompts)}" if len(kept) < len(prompts) else ""
    values, probabilities, prompts = cosine.numpy()[kept], probabilities[kept], [prompts[k] for k in kept]
    closest = int(values.argmax())
    height = max(2.4, _ROW * len(prompts))
    figure = fixed_figure(10.2, height + 1.05)
    truth = dataset.classes[dataset.labels[index]]
    add_picture(figure, (0.1, 0.45, 2.3, 2.3), dataset.images[index], f"image {index}: {shorten(truth, 26)}")
    left = add_panel(figure, (5.9, 0.45, 2.0, height), "cosine similarity")
    plot_dots(values, left, chosen=closest, limits=limits or (float(values.min()), float(values.max())))
    write_names(prompts, left, truth=closest, width=48)
    right = add_panel(figure, (8.2, 0.45, 1.6, height), "softmax over these prompts")
    plot_named_bars(probabilities, prompts, right, total=1, truth=closest, show_names=False)
    left.set_xlabel(f"blue: the closest prompt{left_out}", fontsize=8)
    right.set_xlabel("probability", fontsize=8)
    return figure


@torch.no_grad()
def explore_similarity(model: DualEncoder, dataset: ImageDataset, *, template: str = "") -> Instrument:
    """Build the instrument of notebook 01: pick an image, edit the prompts, see similarities and probabilities move.

    Parameters
    ----------
    model : DualEncoder
    dataset : ImageDataset
    template : str
        Of the prompts to begin with, with ``{}`` for the class; default: the data set's first.
    """
    import ipywidgets as widgets

    encoded = EncodedImages(model, dataset)
    first = [(template or dataset.templates[0]).replace("{}", name) for name in dataset.classes]
    # One scale for all images, so that a dot that moves is a similarity that moves.
    some = torch.stack([encoded.clean(index) for index in range(min(len(dataset), 2 * min(len(first), MOST_CLASSES)))])
    cosines = some @ encoded.texts(first).T
    limits = float(cosines.min()), float(cosines.max())
    controls = {
        "index": image_slider(len(dataset)),
        "prompts": widgets.Textarea(
            "\n".join(first),
            description="prompts",
            rows=min(12, len(first) + 1),
            layout=widgets.Layout(width="95%"),
            continuous_update=False,
        ),
    }

    def draw(index: int, prompts: str) -> Figure:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        return similarity_view(model, dataset, index=index, prompts=lines or first, limits=limits, encoded=encoded)

    hint = "One prompt a line. Leave the box (Tab, or a click beside it) to see the effect; empty it to begin again."
    return Instrument(draw, controls, hint=hint)

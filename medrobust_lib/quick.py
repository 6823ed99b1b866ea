"""A first look in a terminal: an image that gets worse, what can be proved about it, and two models compared."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.text import Text

from medrobust_lib import metrics
from medrobust_lib.corruptions.suites import corrupted
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.evaluation import Candidate, accuracy_table, corruption_answers
from medrobust_lib.experiments.report import NOTICE, show
from medrobust_lib.models.loading import load_model
from medrobust_lib.smoothing.certify import certify
from medrobust_lib.smoothing.methods import PromptClassifier

MODELS = ("demo-clip", "demo-clip-vit")
DATASET = "phantom/blood"
CORRUPTION, SEVERITY = "zoom_blur", 3
SIGMA, N = 0.1, 1000
IMAGES = 48
_RAMP = " .:-=+*#%@"


def quick_look() -> None:
    """Print a clean and a corrupted image with the model's answers, a certificate and a small leaderboard."""
    console = Console(highlight=False)
    console.print(f"[bold]medrobust, a first look.[/] The images are synthetic phantoms. {NOTICE}")
    models = [load_model(id) for id in MODELS]
    data = load_dataset(DATASET, n=IMAGES)
    model = models[0]
    texts = model.class_features(data.classes, data.templates[:1])
    blurred = corrupted(data, CORRUPTION, severity=SEVERITY)
    answers = [_answers(model, part.images, texts) for part in (data, blurred)]
    # The first image that shows the point: named rightly as it is, wrongly when it is blurred.
    shown = int(np.argmax((answers[0] == data.labels) & (answers[1] != data.labels)))

    console.print(f"\n[bold]1. An image, clean and corrupted[/] ({data.id}, {CORRUPTION} at severity {SEVERITY} of 5)")
    console.print(picture([data.images[shown], blurred.images[shown]], console))
    console.print(f"it is: {data.classes[data.labels[shown]]}; {model.id} says: ", end="")
    console.print(", then ".join(data.classes[answer[shown]] for answer in answers))

    console.print("\n[bold]2. A certificate: what no small change of this image can do[/]")
    pixels = model.prepare(data.images[shown : shown + 1])[0]
    address = {"dataset": data.id, "index": int(data.indices[shown])}
    certificate = certify(PromptClassifier(model, texts), pixels, sigma=SIGMA, n=N, **address)
    console.print(f"{model.id}, {data.classes[certificate.predicted]}: " if not certificate.abstained else "", end="")
    console.print(str(certificate))

    console.print(f"\n[bold]3. Two models[/] on {IMAGES} such images, clean and under seven corruptions")
    candidates = {m.id: Candidate(m, m.class_features(data.classes, data.templates[:1])) for m in models}
    cells = accuracy_table(corruption_answers(candidates, data, severities=[SEVERITY]), data)
    errors = metrics.corruption_error_table(cells, reference=model.id).sort_values("mce")
    errors["clean"], errors["chance"] = 1 - errors.clean_error, 1 / len(data.classes)
    errors = errors.rename(columns={"average_accuracy": "corrupted", "mce": "mCE"})
    columns = ["model", "clean", "corrupted", "mCE", "chance", "n"]
    show(errors[columns].round(3), title=f"accuracy; mCE in percent of {model.id}'s errors")
    console.print(
        "Next: [bold]make run[/] tells the whole story and writes runs/demo/index.html, [bold]make lab[/] opens the "
        "notebooks, [bold]medrobust run 07 -p images=folder:PATH[/] looks at your own images; see README.md."
    )


@torch.inference_mode()
def _answers(model: object, images: NDArray[np.uint8], texts: torch.Tensor) -> NDArray[np.int64]:
    return model.probabilities(model.encode_image(model.prepare(images)), texts).argmax(1).cpu().numpy()


def picture(images: list[NDArray[np.uint8]], console: Console) -> Text:
    """Images uint8 [H, W, 3] side by side as characters: two pixels each in colour, or their lightness without."""
    side = min(32, (console.width - 2 * len(images)) // len(images)) // 2 * 2
    small = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in images]
    gap = np.zeros((side, 2, 3), np.uint8)
    strip = np.concatenate([part for image in small for part in (image, gap)][:-1], axis=1)
    text = Text()
    for upper, lower in zip(strip[::2], strip[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            if console.color_system:
                text.append("▀", style="rgb({},{},{}) on rgb({},{},{})".format(*above, *below))
            else:
                light = (above.mean() + below.mean()) / 2 / 255
                text.append(_RAMP[round(light * (len(_RAMP) - 1))])
        text.append("\n")
    return text

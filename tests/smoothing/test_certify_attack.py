"""An attack on the smoothed classifier: it must fail inside the certified ball, and be known to work outside."""

import pytest
import torch

from medrobust_lib.smoothing.certificate import ABSTAIN, Certificate
from medrobust_lib.smoothing.certify import certify, predict
from medrobust_lib.smoothing.methods import PromptClassifier
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies

SIGMA = 0.1
POSITIONS = (0, 3, 4, 15)
STEPS, COPIES = 10, 16


@pytest.fixture(scope="module")
def data(phantoms):
    return phantoms("blood", n=16).subset(POSITIONS)


@pytest.fixture(scope="module")
def classifier(model, data):
    return PromptClassifier(model, model.class_features(data.classes, data.templates[:1]))


@pytest.fixture(scope="module")
def pixels(classifier, data):
    return classifier.model.prepare(data.images)


@pytest.fixture(scope="module")
def certificates(classifier, data, pixels) -> list[Certificate]:
    addresses = [{"dataset": data.id, "index": int(index)} for index in data.indices]
    return [
        certify(classifier, image, sigma=SIGMA, n0=50, n=400, **address)
        for image, address in zip(pixels, addresses, strict=True)
    ]


def attacked(classifier: PromptClassifier, image: torch.Tensor, label: int, *, budget: float) -> torch.Tensor:
    """Projected gradient ascent in an L2 ball on the cross-entropy, averaged over noisy copies of the image.

    The average over noise, fresh at every step, is what makes it an attack on the smoothed classifier
    (expectation over transformation; Salman et al. 2019, arXiv:1906.04584, section 3).
    """
    model, stream = classifier.model, NoiseStream(1, "attack", 0, SIGMA, "adapt")
    change = torch.zeros_like(image)
    for step in range(STEPS):
        noisy = noisy_copies(image, stream, first=step * COPIES, count=COPIES)
        change.requires_grad_(True)
        probabilities = model.probabilities(model.encode_image(noisy + change), classifier.class_features)
        (gradient,) = torch.autograd.grad(-probabilities[:, label].log().mean(), change)
        with torch.no_grad():
            change = change + 2.5 * budget / STEPS * gradient / gradient.norm()
            change = change * min(1.0, budget / float(change.norm()))
            # An image stays one; the projection onto [0, 1] only shortens the change.
            change = (image + change).clamp(0, 1) - image
    return image + change.detach()


def answer(classifier, image, *, n):
    return predict(classifier, image, sigma=SIGMA, n=n, dataset="attacked")


@pytest.mark.parametrize("place", range(len(POSITIONS)))
def test_no_attack_inside_the_certified_ball_changes_the_answer(classifier, pixels, certificates, place):
    certificate = certificates[place]
    assert certificate.radius > 0.02
    image = attacked(classifier, pixels[place], certificate.predicted, budget=certificate.radius)
    distance = float((image - pixels[place]).norm())
    assert 0.8 * certificate.radius < distance <= certificate.radius * (1 + 1e-5)
    assert answer(classifier, image, n=1000) in (certificate.predicted, ABSTAIN)


def test_the_same_attack_succeeds_outside(classifier, pixels, certificates):
    flips = 0
    for image, certificate in zip(pixels, certificates, strict=True):
        changed = attacked(classifier, image, certificate.predicted, budget=8 * certificate.radius)
        flips += answer(classifier, changed, n=100) not in (certificate.predicted, ABSTAIN)
    assert flips >= 2

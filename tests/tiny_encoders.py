"""Encoders of a few thousand numbers with random weights, for runs of whole notebooks in seconds."""

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medrobust_lib.models.dual_encoder import DualEncoder, Preprocessing, Tokens
from medrobust_lib.models.own import Classifier, wrap

SIDE, WIDTH, CONTEXT, VOCABULARY = 28, 8, 48, 512


class Tiny(DualEncoder):
    """Two convolutions for images; for texts, the mean of word embeddings and a matrix."""

    def __init__(self, id: str) -> None:
        geometry = Preprocessing(SIDE, "squash", "bicubic", (0.5,) * 3, (0.5,) * 3)
        sizes = {"embed_dim": WIDTH, "context_length": CONTEXT, "logit_scale": 20.0}
        super().__init__(id=id, preprocessing=geometry, provenance={"source": "random weights"}, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 2, 2))
            self.words, self.text = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.image(pixels).mean((2, 3))

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        ids = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in re.findall(r"\w+|[^\w\s]", text)]
            row[: len(words) + 2] = torch.tensor([1, *words, 2])
        return Tokens(ids, ids > 0)

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        return self.words(tokens.ids.to(self.device))

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        mask = tokens.mask[..., None].to(embeddings.dtype)
        return self.text((embeddings * mask).sum(1) / mask.sum(1))


class Least(Tiny):
    """A wrapper of something that answers with features of whole texts and keeps its words to itself."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            tokens = super().tokenize([texts] if isinstance(texts, str) else list(texts))
            return self.encode_embeddings(super().embed_tokens(tokens), tokens)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        raise NotImplementedError

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        raise NotImplementedError


class NoGradient(Tiny):
    """Text features come from elsewhere, without a gradient."""

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        return super()._text_features(embeddings, tokens).detach()


class NoStart(Tiny):
    """Texts end in one token and begin with none."""

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        whole = super().tokenize(texts)
        return Tokens(whole.ids[:, 1:], whole.mask[:, 1:])


class Filled(NoStart):
    """As SigLIP: no start token, and every position is real; a text is read off the last one."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.places = nn.Embedding(CONTEXT - 1, WIDTH)
        self.context_length = CONTEXT - 1

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        ids = super().tokenize(texts).ids
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        placed = embeddings + self.places.weight
        return self.text(torch.softmax(placed @ placed[:, -1:].mT, dim=1).mul(placed).sum(1))


class PadsInFront(Tiny):
    """Its padding comes before the text."""

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        whole = super().tokenize(texts)
        return Tokens(whole.ids.flip(1), whole.mask.flip(1))


class Sure(Tiny):
    """Tells red from blue without an error, whatever its weights: ``class 000`` is red."""

    def _image_features(self, pixels: Tensor) -> Tensor:
        redder = (pixels[:, 0] - pixels[:, 2]).mean((1, 2))
        learned = 1e-4 * self.image(pixels).mean((2, 3))
        return nn.functional.pad(torch.stack((redder, -redder), 1), (0, WIDTH - 2)) + learned

    def _text_features(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        (red,) = {int(number) for number in self.tokenize(["000"]).ids[0]} - {0, 1, 2}
        red = (tokens.ids == red).any(1).to(embeddings)
        return nn.functional.pad(torch.stack((red, 1 - red), 1), (0, WIDTH - 2)) + 0 * embeddings.sum()


def load_tiny(entry: object, *, weights_dir: object, offline: bool) -> Tiny:
    return Tiny("tiny")


def load_least(entry: object, *, weights_dir: object, offline: bool) -> DualEncoder:
    """Nothing but two functions is known of it."""
    inner = Least("least").eval()
    functions = {"image_features": inner._image_features, "text_features": inner.encode_text}
    return wrap(**functions, image_size=SIDE, mean=0.5, std=0.5, id="least", geometry="squash", logit_scale=20.0)


def load_sure(entry: object, *, weights_dir: object, offline: bool) -> Sure:
    return Sure("sure")


def load_resnet(entry: object, *, weights_dir: object, offline: bool) -> Classifier:
    """One of torchvision's architectures with random weights: it changes its mind between dark and bright middles."""
    from torchvision.models.resnet import BasicBlock, ResNet  # after medrobust_lib, which lets it import

    torch.manual_seed(0)
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    middles = torch.full((2, 3, 64, 64), 0.25)
    middles[1, :, 20:44, 20:44] += 0.45
    middles = (middles - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        head, network.fc = network.fc, nn.Identity()
        dark, bright = network(middles)  # [512]
        network.fc = head
        head.weight[0], head.weight[1] = dark - bright, bright - dark
        head.bias.copy_(-head.weight @ (dark + 2 * bright) / 3)
    return Classifier(network, n_classes=2, image_size=64, mean=mean, std=std)


def load_filled(entry: object, *, weights_dir: object, offline: bool) -> Filled:
    return Filled("filled")

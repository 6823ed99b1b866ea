"""Texts as a back end takes them apart: what stands around their words, and whether prompts can be learned there."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from medrobust_lib.models.dual_encoder import DualEncoder


@torch.no_grad()
def check_text_path(encoder: DualEncoder, own: Callable[[list[str]], Tensor]) -> None:
    """Raise unless walking through the parts of a text tower gives what the library's own forward pass gives.

    A back end has to take the pass apart to let prompts be learned; this is where a setting of the tower or of its
    tokenizer would show that the walk does not follow.

    Parameters
    ----------
    encoder : DualEncoder
    own : callable
        The library's features [k, d], of any norm, of k texts.

    Raises
    ------
    ValueError
        The features differ by more than rounding does.
    """
    texts = ["x", "x x x"]
    tokens = encoder.tokenize(texts).to(encoder.device)
    walked = functional.normalize(encoder._text_features(encoder.embed_tokens(tokens), tokens).float(), dim=-1)
    expected = functional.normalize(own(texts).float(), dim=-1)
    rounding = 1e-3 if encoder.dtype == torch.float32 else 0.05
    if not torch.allclose(walked, expected, rtol=0, atol=rounding, equal_nan=True):
        raise ValueError(
            f"{encoder.id}: text features differ by {(walked - expected).abs().max():.2g} from those of the library's "
            "own forward pass: a setting of its text tower or tokenizer is not supported; wrap the model in a "
            "DualEncoder of your own"
        )


def given_embeddings(layer: nn.Module, embeddings: Tensor) -> RemovableHandle:
    """Context in which a layer of word embeddings gives these, whatever the tokens, to this thread alone."""
    thread = threading.get_ident()
    return layer.register_forward_hook(lambda *_: embeddings if threading.get_ident() == thread else None)


class TextFrame(NamedTuple):
    """The tokens that stand around those of a text, whatever the text.

    Attributes
    ----------
    start : tuple of int
        Before it: the start token of CLIP and BERT, nothing of SigLIP.
    end : tuple of int
        After it: the end token, and with a fixed width all that fills it up behind an empty text.
    width : int or None
        Number of tokens of every text, all of them real, as SigLIP reads them; None where padding is masked.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    width: int | None

    def content(self, ids: Sequence[int]) -> list[int]:
        """Real tokens of a text without the frame: up to the longest beginning of `end` with which they end."""
        inner = list(ids)[len(self.start) :]
        lengths = range(min(len(self.end), len(inner)), -1, -1)
        return inner[: -next(n for n in lengths if tuple(inner[len(inner) - n :]) == self.end[:n]) or None]

    def row(self, content: Sequence[int]) -> list[int]:
        """The content in its frame again; longer than the width where it does not fit with an end token."""
        room = len(self.end) if self.width is None else max(1, self.width - len(self.start) - len(content))
        return [*self.start, *content, *self.end[:room]]


def find_text_frame(model: DualEncoder) -> TextFrame:
    """Frame of a model's tokenizer, found by what an empty and two short texts have in common.

    Raises
    ------
    ValueError
        Padding in front, or tokens of a text that do not come back from their frame.
    """
    tokens = model.tokenize(["", "x", "x x x"])
    empty, *others = (ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True))
    n_start = next((n for n, pair in enumerate(zip(empty, others[0], strict=False)) if pair[0] != pair[1]), len(empty))
    frame = TextFrame(
        tuple(empty[:n_start]), tuple(empty[n_start:]), tokens.ids.shape[1] if bool(tokens.mask.all()) else None
    )
    whole = all(frame.content(ids) and frame.row(frame.content(ids)) == ids for ids in others)
    if not whole or not tokens.mask[:, 0].all():
        raise ValueError(
            f"{model.id} does not frame every text by the same tokens with its padding at the end, so that there is no "
            "place among its words where prompts are learned"
        )
    return frame


def why_not_learned(model: DualEncoder) -> str:
    """Why no prompt can be learned for a model; empty where one can.

    Learning puts vectors among the word embeddings of a text, so a model must embed tokens of its own, in the same
    frame whatever the text, and pass a gradient from the text's features back to them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            tokens = model.tokenize(["x"])
            embeddings = model.embed_tokens(tokens).detach().float().requires_grad_(True)
            features = model.encode_embeddings(embeddings, tokens)
        except NotImplementedError as error:
            return (
                str(error)
                or f"{model.id} reads whole texts only: prompts are learned among word embeddings (embed_tokens)"
            )
    try:
        find_text_frame(model)
    except ValueError as error:
        return str(error)
    if not features.requires_grad:
        return f"{model.id} passes no gradient from the features of a text back to its word embeddings"
    return ""

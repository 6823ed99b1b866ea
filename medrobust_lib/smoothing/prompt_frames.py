"""The tokens of prompts, with places where context vectors go: by tokens, not words, for any tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from medrobust_lib.checks import check_choice, check_whole
from medrobust_lib.models.dual_encoder import DualEncoder, Tokens

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


def why_not_learned(model: DualEncoder) -> str:
    """Why no prompt can be learned for a model; empty where one can.

    Learning puts vectors among the word embeddings of a text, so a model must embed tokens of its own, between one
    start and one end token, and pass a gradient from the text's features back to them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            tokens = model.tokenize([""])
            embeddings = model.embed_tokens(tokens).detach().float().requires_grad_(True)
            features = model.encode_embeddings(embeddings, tokens)
        except NotImplementedError:
            return f"{model.id} reads whole texts only: prompts are learned among word embeddings (embed_tokens)"
    if int(tokens.mask.sum()) != 2:
        return f"{model.id} does not frame a text by one start and one end token, between which prompts are learned"
    if not features.requires_grad:
        return f"{model.id} passes no gradient from the features of a text back to its word embeddings"
    return ""


def empty_frame(
    model: DualEncoder, classes: Sequence[str], *, n_context: int, position: Position = "end", suffix: str = "."
) -> PromptFrame:
    """Prompts with `n_context` empty places before, around or after the class name.

    Parameters
    ----------
    model : DualEncoder
    classes : sequence of str
        K prompt nouns.
    n_context : int
        Context tokens, >= 1.
    position : {"end", "middle", "front"}
        Where the class name stands. In the middle, half of the context (rounded down) precedes it.
    suffix : str
        Frozen text at the end.

    Raises
    ------
    ValueError
        No context, an unknown position, or prompts longer than the model reads.
    """
    check_whole("n_context", n_context, hint=": a learned prompt needs at least one context token")
    check_choice("position", position, get_args(Position))
    before = {"end": n_context, "middle": n_context // 2, "front": 0}[position]
    (filler,) = _inner(model, ["x"])[0][:1]
    rows, places = [], []
    for name, whole in zip(_inner(model, classes), _inner(model, [noun + suffix for noun in classes]), strict=True):
        if before < n_context and whole[: len(name)] != name:
            raise ValueError(f"the tokenizer joins a class name and the text {suffix!r} after it; use position 'end'")
        body = len(name) if before < n_context else len(whole)
        rows.append([filler] * before + whole[:body] + [filler] * (n_context - before) + whole[body:])
        after = range(before + body, body + n_context)
        places.append([1 + place for place in (*range(before), *after)])
    return _frame(model, rows, places)


def frame_from_template(model: DualEncoder, classes: Sequence[str], template: str) -> PromptFrame:
    """Hand-written prompts whose tokens before the class name are the places of the context.

    Filled with its own `PromptFrame.text_context` the frame gives exactly the features of the written text.

    Raises
    ------
    ValueError
        A template without ``{}`` or without text before it.
    """
    prefix, found, _ = template.partition("{}")
    if not found or not prefix.strip():
        raise ValueError(f"the template {template!r} needs text before the class name {{}}, which becomes the context")
    start = _inner(model, [prefix.strip()])[0]
    rows = _inner(model, [template.replace("{}", noun) for noun in classes])
    for noun, row in zip(classes, rows, strict=True):
        if row[: len(start)] != start:
            raise ValueError(f"the tokenizer joins {prefix!r} and {noun!r}; end the text before {{}} with a space")
    return _frame(model, rows, [range(1, 1 + len(start))] * len(rows))


def _inner(model: DualEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without its start and end token."""
    tokens = model.tokenize(list(texts))
    return [ids[mask].tolist()[1:-1] for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _frame(model: DualEncoder, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> PromptFrame:
    """Put start and end tokens around rows of ids and pad them as the model's tokenizer does."""
    reference = model.tokenize([""])
    start, end = reference.ids[0, reference.mask[0]].tolist()
    longest = max(len(row) for row in rows) + 2
    if longest > model.context_length:
        raise ValueError(
            f"prompts of {longest} tokens (start and end included) do not fit {model.id}, which reads at most "
            f"{model.context_length}; use fewer context tokens or shorter class names"
        )
    # A tokenizer that pads to a fixed width (MedCLIP's 25) does so because its features depend on the width.
    length = max(longest, reference.ids.shape[1])
    pad = int(reference.ids[0, -1]) if not reference.mask[0, -1] else 0
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row) + 2] = torch.tensor([start, *row, end])
        mask[number, : len(row) + 2] = True
    tokens = Tokens(ids, mask)
    embeddings = model.embed_tokens(tokens).detach().float()
    return PromptFrame(tokens, embeddings, torch.tensor([list(row) for row in places], device=embeddings.device))

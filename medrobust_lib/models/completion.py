"""What a generative model writes, and how its tokens are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """One generated text.

    Attributes
    ----------
    text : str
        Without special tokens and surrounding white space; may be empty.
    finished : bool
        Whether the model ended it; otherwise it was cut at the largest number of tokens.
    """

    text: str
    finished: bool


class RowSampler:
    """Makes greedy decoding draw from the softmax: the largest of logits plus Gumbel noise is such a draw.

    A processor of logits for transformers' ``generate``. Every row has a generator of its own, so what it draws does
    not depend on the batch, and torch's global random state stays untouched.

    Parameters
    ----------
    temperature : float
        Above 0.
    seeds : sequence of int
        One a row.
    device : torch.device
        Where the logits are.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(int(seed) % 2**63) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [n, vocabulary] over the temperature plus Gumbel noise."""
        scores = scores.float()
        waits = [
            torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self.generators, strict=True)
        ]
        return scores / self.temperature - torch.stack(waits).log()

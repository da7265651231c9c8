"""The canary's prompt, and what a profile makes of it where it was made.

A profile is for the text that it was calibrated on, and may store other text much worse: one of prose stores the canary's
code with twice the error that its spectra predict, and nothing is wrong. So no limit serves all profiles. But when a profile
is made, the canary's keys and values are at hand, and what becomes of them is written into it; a server finds the same
figures again, or something was damaged since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import Codebooks
from vllm_spectral.profile.schema import Expectation, LayerProfile
from vllm_spectral.stats.probe import head_figures

TEXT = """\
The lighthouse keeper wrote in his journal every evening, even when nothing had happened. On the ninth of March he noted \
the wind (north-east, rising), the state of the lamp, and the names of two ships: Aurora and Saint Brendan. "The sea is \
like glass," he wrote, "and the gulls will not fly." Three days later the storm came.

def mean(values: list[float]) -> float:
    \"\"\"Arithmetic mean; raises ValueError for an empty list.\"\"\"
    if not values:
        raise ValueError("mean() of an empty list")
    return sum(values) / len(values)

Question: A train leaves at 14:05 and arrives at 16:50. How long is the journey?
Answer: From 14:05 to 16:05 are two hours, and from 16:05 to 16:50 are 45 minutes, so the journey takes 2 hours and 45 \
minutes. The lighthouse keeper wrote in his journal every evening, even when nothing had happened. On the ninth of March he \
noted the wind (north-east, rising), the state of the lamp, and the names of two ships: Aurora and Saint Brendan.
"""
MOST_TOKENS = 160
_DECIMALS = 4


def tokens_digest(ids: Sequence[int]) -> str:
    """Hex SHA-256 of token ids: figures of other tokens are other figures."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def expect(
    layers: Sequence[LayerProfile],
    slot_bytes: int,
    codebooks: Codebooks,
    ids: Sequence[int],
    vectors: Sequence[tuple[Tensor, Tensor]],
) -> Expectation:
    """What becomes of the canary's tokens in the slots of a profile.

    Args:
        layers, slot_bytes, codebooks: the profile's.
        ids: the canary's tokens.
        vectors: of every layer, exact keys and values, ``[num_tokens, num_heads, head_dim]`` each.
    """
    positions = torch.arange(len(ids))
    figures = []
    for layer, of_layer in zip(layers, vectors, strict=True):
        codec = layer.codec(slot_bytes, codebooks)
        keys, values = (vector.float() for vector in of_layer)
        figures.append(head_figures(keys, values, codec.encode(keys, values), positions, codec))
    # Rounded far below what arithmetic changes.
    return Expectation(tokens_digest(ids), torch.stack(figures).double().round(decimals=_DECIMALS).float())

"""Per-position fidelity of one next-token distribution to another."""

from __future__ import annotations

import torch
from torch import Tensor


def compare_logits(reference: Tensor, candidate: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compare two predictions of the same tokens.

    Args:
        reference: ``[num_positions, vocab]`` logits of the exact cache.
        candidate: ``[num_positions, vocab]`` logits of the compressed cache.
        targets: ``[num_positions]`` int, the tokens that really follow.

    Returns:
        ``[num_positions]`` float32 each: ``nll_reference`` and ``nll_candidate`` (nats), ``kl`` (nats,
        from reference to candidate), ``top1`` (1 where the most likely token is the same), ``hit_reference`` and ``hit``
        (1 where the most likely token is the target).
    """
    p, q = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
    index = targets.unsqueeze(-1)
    likeliest, chosen = p.argmax(-1), q.argmax(-1)
    return {
        "nll_reference": -p.gather(-1, index).squeeze(-1),
        "nll_candidate": -q.gather(-1, index).squeeze(-1),
        "kl": torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1),
        "top1": (likeliest == chosen).float(),
        "hit_reference": (likeliest == targets).float(),
        "hit": (chosen == targets).float(),
    }

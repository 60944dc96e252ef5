"""The loss of AVQA. Its head is `reference.avqa`'s for both models: beside the backbone it takes no time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def avqa_loss(
    answers: Tensor, match_positive: Tensor, match_negative: Tensor | None, label: Tensor, *, match_weight: float = 0.5
) -> Tensor:
    """Cross-entropy of the answers, and half of that of the matches: the published loss.

    Args:
        answers: logits ``[B, answers]``.
        match_positive, match_negative: logits ``[B * T, 2]``; the classes are 1 and 0.
        label: ``[B]``, integers.
        match_weight: of the second term, a mean over both kinds of match; 0 leaves it out, and what it is made of may be None.

    Raises:
        ValueError: ``match_negative`` is None, as a model gives it that was called without negative frames.
    """
    if not match_weight:
        return F.cross_entropy(answers, label)
    if match_negative is None:
        raise ValueError("match_negative: got None, expected logits [B * T, 2] of a call with negative frames")
    matches = torch.stack([match_positive, match_negative], 1).flatten(0, 1)  # positive, negative, positive, ...
    wanted = 1 - torch.arange(len(matches), device=label.device) % 2
    return F.cross_entropy(answers, label) + match_weight * F.cross_entropy(matches, wanted)

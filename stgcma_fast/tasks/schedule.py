"""The published learning rates, one for each step."""

from __future__ import annotations

import math


def learning_rates(base: float, minimum: float, warmup: int, steps: int) -> list[float]:
    """A linear warm-up, both ends included, then half a cosine that would reach ``minimum`` one step after the last.

    Args:
        base: the highest rate.
        minimum: the rate that the cosine falls towards.
        warmup: steps of the warm-up; the first has the rate 0.
        steps: of the whole training.

    Raises:
        ValueError: rates or counts out of range.
    """
    if not 0 <= minimum <= base:
        raise ValueError(f"learning rates: got minimum {minimum} and base {base}, expected 0 <= minimum <= base")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warm-up: got {warmup} of {steps} steps, expected at most all of them")
    rising = [base * step / (warmup - 1) for step in range(warmup)] if warmup > 1 else [0.0] * warmup
    rest = steps - warmup
    return rising + [minimum + 0.5 * (base - minimum) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)]

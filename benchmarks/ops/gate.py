"""No speed of what is wrong: a provider's results beside the plain form's, both against the plain form in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.problem import Problem
from benchmarks.ops.providers import with_impl
from benchmarks.shapes import Case

# Fresh values and upstream gradients of which the errors are added up: one gate's gradient may be right by luck.
DRAWS = 8


class Errors:
    """Squared distances from the exact results, added up by name; what is one number goes into one pool."""

    def __init__(self) -> None:
        self.squares: dict[str, float] = defaultdict(float)
        self.sizes: dict[str, float] = defaultdict(float)

    def add(self, got: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]) -> None:
        for name, hi in exact.items():
            if hi is None:
                continue
            x = torch.zeros_like(hi) if got[name] is None else got[name].double()
            pool = name if hi.numel() > 1 else "gradients of one number"
            self.squares[pool] += (x - hi).square().sum().item()
            self.sizes[pool] += hi.square().sum().item()

    def against(self, reference: Errors) -> dict[str, Any]:
        """The tensor that is worst beside the reference: relative errors of both, and what is wrong if it is too far off."""

        def ratio(name: str) -> float:
            mine, low = self.squares[name] ** 0.5, reference.squares[name] ** 0.5
            return 0.0 if mine == 0 else mine / low if low and math.isfinite(mine) else math.inf

        worst = max(self.squares, key=ratio)
        size = self.sizes[worst] ** 0.5 or 1.0
        error, low = self.squares[worst] ** 0.5 / size, reference.squares[worst] ** 0.5 / size
        # JSON has no NaN.
        row = {"tensor": worst, "error": error if math.isfinite(error) else None, "error_reference": low}
        if not ratio(worst) <= 2:
            row["failed"] = f"{worst}: error {error:.3g}, the reference's is {low:.3g}"
        return row


def compare(case: Case, dtype: torch.dtype, device: str, call: Callable, mode: str) -> dict[str, Any]:
    """The errors of ``call`` over some draws, the same for every provider.

    Returns:
        A row's "tensor", "error" and "error_reference"; "failed" with the reason where the error is more than twice the plain
        form's in the same dtype.
    """
    mine, low = Errors(), Errors()
    reference = with_impl(case, "reference")
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        problem = Problem(case, dtype, device)
        exact = problem.results(reference, mode, exact=True)
        mine.add(problem.results(call, mode), exact)
        low.add(problem.results(reference, mode), exact)
    return mine.against(low)

"""No speed of what is wrong: a provider's results beside the plain form's, both against the plain form in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

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
        for name, result in got.items():
            hi = exact[name]
            if hi is None:
                continue
            x = torch.zeros_like(hi) if result is None else result.double()
            pool = name if hi.numel() > 1 else "gradients of one number"
            self.squares[pool] += (x - hi).square().sum().item()
            self.sizes[pool] += hi.square().sum().item()

    def against(self, reference: Errors, rounding: float = 0.0) -> dict[str, Any]:
        """The tensor that is worst beside the reference: relative errors of both, and what is wrong if it is too far off.

        Args:
            reference: the errors of the plain form.
            rounding: what may be added to twice its error, relative to the exact results.
        """

        def ratio(name: str) -> float:
            mine = self.squares[name] ** 0.5
            limit = 2 * reference.squares[name] ** 0.5 + rounding * self.sizes[name] ** 0.5
            return 0.0 if mine == 0 else mine / limit if limit and math.isfinite(mine) else math.inf

        worst = max(self.squares, key=ratio)
        size = self.sizes[worst] ** 0.5 or 1.0
        error, low = self.squares[worst] ** 0.5 / size, reference.squares[worst] ** 0.5 / size
        # JSON has no NaN.
        row = {"tensor": worst, "error": error if math.isfinite(error) else None, "error_reference": low}
        if not ratio(worst) <= 1:
            row["failed"] = f"{worst}: error {error:.3g}, the reference's is {low:.3g}"
        return row


class Judged(NamedTuple):
    """What was called of a case, by provider, and what `compare` found."""

    calls: dict[str, Callable]
    found: dict[tuple[str, str], dict[str, Any]]


def compare(
    case: Case, dtype: torch.dtype, device: str, calls: Mapping[str, Callable], kinds: Collection[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Errors over some draws, the same for all.

    Args:
        case: the operator and its shape.
        dtype: of the values.
        device: "cpu" or "cuda".
        calls: what to call, by provider.
        kinds: "fwd" for the outputs without gradients, "fwdbwd" for outputs and gradients.

    Returns:
        By kind and provider a row's "tensor", "error" and "error_reference"; "failed" with the reason where a call raises, or
        where the error is more than twice the plain form's in the same dtype and more than a float32 sum over the rows, in any
        order, would account for.
    """
    low = Errors()
    sums: dict[tuple[str, str], Errors] = defaultdict(Errors)
    broken: dict[tuple[str, str], str] = {}
    reference = with_impl(case, "reference")
    most = "fwdbwd" if "fwdbwd" in kinds else "fwd"
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        problem = Problem(case, dtype, device)
        exact = problem.results(reference, most, exact=True)
        low.add(problem.results(reference, most), exact)
        for kind in kinds:
            for provider, call in calls.items():
                if (kind, provider) not in broken:
                    try:
                        sums[kind, provider].add(problem.results(call, kind), exact)
                    except Exception as error:  # whatever stops a provider is that row's failure
                        broken[kind, provider] = f"{type(error).__name__}: {error}"
    rounding = torch.finfo(torch.float32).eps * problem.rows() ** 0.5
    found = {key: errors.against(low, rounding) for key, errors in sums.items() if key not in broken}
    return found | {key: {"failed": text} for key, text in broken.items()}

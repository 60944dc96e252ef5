"""Speed and memory of each operator, on a GPU or on the CPU, at the shapes of the models and at odd ones.

    python -m pytest benchmarks/ops --device cuda --json auto

Every provider gets the same values. It is first compared with the operator's plain form in float64: one that errs more than
twice as much as the plain form in the same dtype is not timed, and its test fails. A library that cannot serve an operator is
skipped; -rs tells the reasons. A row is saved as soon as it is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.ops.gate import Judged
from benchmarks.ops.instruments import Instruments, Machine, kernels, rates, times
from benchmarks.ops.problem import Problem
from benchmarks.ops.providers import PROVIDERS, refusals
from benchmarks.shapes import Case


def test_operator(
    case: Case,
    dtype: torch.dtype,
    provider: str,
    mode: str,
    device: str,
    machine: Machine,
    instruments: Instruments,
    comparison: Judged,
    keep: Callable[[dict[str, Any]], None],
    benchmark: BenchmarkFixture,
) -> None:
    """One row: host_ms, gpu_cold_ms and graph_ms are the times of a step at 20, 50 and 80 percent of its rounds."""
    problem = Problem(case, dtype, device)
    reasons = refusals(provider, case, problem.arguments)
    if reasons:
        pytest.skip("; ".join(reasons))
    row = {"op": case.op, "provider": provider, "mode": mode, "shape": case.label}
    row |= {"dtype": str(dtype).removeprefix("torch."), **problem.sizes()}
    row |= comparison.found["fwd" if mode == "fwd" else "fwdbwd", provider]
    if "failed" not in row and not benchmark.disabled:
        # A backward alone is compiled to be run again and again.
        call = PROVIDERS[provider](case) if mode == "bwd" else comparison.calls[provider]
        try:
            row |= times(lambda: problem.step(call, mode), device, instruments, benchmark)
            row |= rates(row, problem.work(mode), machine)
            if provider == "fast":
                row["kernels"] = kernels(problem.step(call, mode))
        except torch.OutOfMemoryError as error:
            row["failed"] = f"out of memory: {error}"
    benchmark.extra_info |= row
    if "failed" in row or "host_ms" in row:
        keep(row)
    if "failed" in row:
        pytest.fail(row["failed"], pytrace=False)

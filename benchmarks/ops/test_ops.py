"""Speed and memory of each operator, on a GPU or on the CPU, at the shapes of the models and at odd ones.

    python -m pytest benchmarks/ops --device cuda --json auto

Every provider gets the same values. It is first compared with the operator's plain form in float64: one that errs more than
twice as much as the plain form in the same dtype is not timed, and its test fails. A library that cannot serve an operator is
skipped; -rs tells the reasons. A row is saved as soon as it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import quantiles, timed
from benchmarks.ops.gate import compare
from benchmarks.ops.instruments import Instruments, Machine, device_row, kernels, rates
from benchmarks.ops.problem import Problem
from benchmarks.ops.providers import PROVIDERS, refusals
from benchmarks.shapes import Case

CUDA_ROUNDS = 50
# As many rounds on the CPU as fit into this, but a few at least.
CPU_SECONDS, FEWEST_ROUNDS = 0.4, 5


def test_operator(
    case: Case,
    dtype: torch.dtype,
    provider: str,
    mode: str,
    device: str,
    machine: Machine,
    instruments: Instruments,
    keep: Callable[[Mapping[str, Any]], None],
    benchmark: BenchmarkFixture,
) -> None:
    """One row: host_ms, gpu_cold_ms and graph_ms are the times of a step at 20, 50 and 80 percent of its rounds."""
    problem = Problem(case, dtype, device)
    reasons = refusals(provider, case, problem.arguments)
    if reasons:
        pytest.skip("; ".join(reasons))
    row = {"op": case.op, "provider": provider, "mode": mode, "shape": case.label}
    row |= {"dtype": str(dtype).removeprefix("torch."), **problem.sizes()}
    try:
        call = PROVIDERS[provider](case)
        row |= compare(case, dtype, device, call, mode)
        if "failed" not in row and not benchmark.disabled:
            row |= times(lambda: problem.step(call, mode), device, instruments, benchmark)
            row |= rates(row, problem.work(mode), machine)
            if provider == "fast":
                row["kernels"] = kernels(problem.step(call, mode))
    except Exception as error:  # whatever stops a provider is that row's failure
        row["failed"] = f"{type(error).__name__}: {error}"
    benchmark.extra_info |= row
    if "failed" in row or "host_ms" in row:
        keep(row)
    if "failed" in row:
        pytest.fail(row["failed"], pytrace=False)


def times(build: Callable[[], Callable], device: str, instruments: Instruments, benchmark: BenchmarkFixture) -> dict[str, Any]:
    """A row's times and memory; the host's is what it takes to issue the step, the device idle at its start."""
    step = build()
    seconds, _ = timed(step, device)
    rounds = CUDA_ROUNDS if device == "cuda" else min(CUDA_ROUNDS, max(FEWEST_ROUNDS, int(CPU_SECONDS / seconds)))
    idle = torch.cuda.synchronize if device == "cuda" else None
    benchmark.pedantic(step, setup=idle, rounds=rounds, warmup_rounds=1)
    row = {"host_ms": [1e3 * x for x in quantiles(benchmark.stats.stats.data)], "rounds": rounds}
    return row | device_row(build, step, instruments)

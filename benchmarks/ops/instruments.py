"""What a step costs: time on the host and on the device, memory, and how near it comes to what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import QUANTILES, Meter, quantiles, timed
from benchmarks.ops.problem import Step, Work
from stgcma_fast.kernels import launch

ROUNDS = 50
# On the CPU as many rounds as fit into this, but a few at least.
CPU_SECONDS, FEWEST_ROUNDS = 0.4, 5
GRAPH_WARMUP = 3


class Machine(NamedTuple):
    """The ceilings that this machine reaches itself: of a large copy and of a large product."""

    bytes_per_s: float
    flops: float

    def floor(self, work: Work) -> float:
        """The seconds that work takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bytes_per_s)


class Instruments:
    """What a step costs beyond the host's time; milliseconds at `QUANTILES`, bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.meter = Meter(device)

    def cold(self, step: Callable[[], Any]) -> list[float]:
        """From the step's first kernel to its last, the L2 cache cold; where kernels are short, gaps between them included."""
        return list(triton.testing.do_bench(step, quantiles=list(QUANTILES)))

    def graph(self, build: Callable[[], Step]) -> list[float]:
        """`cold`, of a step's replay as a CUDA graph: without the gaps.

        Args:
            build: makes the step, on the stream that is captured: a backward runs where its forward ran.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step = build()
            for _ in range(GRAPH_WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=side):
            results = step()
        ms = self.cold(captured.replay)
        del results
        return ms

    def memory(self, step: Callable[[], Any]) -> int | None:
        """The most that the step holds beyond what is held before it; None where the system does not tell."""
        if not self.meter.known:
            return None
        step()
        before = self.meter.used()
        self.meter.reset()
        step()
        return self.meter.peak() - before


def times(build: Callable[[], Step], device: str, instruments: Instruments, benchmark: BenchmarkFixture) -> dict[str, Any]:
    """A row's times, those of the device None on the CPU, and its memory in 1e6 bytes.

    The host's time is what it takes to issue the step, the device idle at its start; on the CPU to run it.
    """
    step = build()
    seconds, _ = timed(step, device)
    rounds = ROUNDS if device == "cuda" else min(ROUNDS, max(FEWEST_ROUNDS, int(CPU_SECONDS / seconds)))
    benchmark.pedantic(step, setup=torch.cuda.synchronize if device == "cuda" else None, rounds=rounds, warmup_rounds=1)
    row: dict[str, Any] = {"host_ms": [1e3 * x for x in quantiles(benchmark.stats.stats.data)], "rounds": rounds}
    row |= {"gpu_cold_ms": None, "graph_ms": None}
    if instruments.cuda:
        row["gpu_cold_ms"] = instruments.cold(step)
        try:
            row["graph_ms"] = instruments.graph(build)
        except RuntimeError as error:
            row["graph_error"] = str(error)
    extra = instruments.memory(step)
    return row | {"peak_extra_mb": None if extra is None else extra / 1e6}


def best(row: dict[str, Any]) -> float:
    """Median milliseconds: of the graph's replay if there is one, else on the device, else, on the CPU, of the call."""
    return (row["graph_ms"] or row["gpu_cold_ms"] or row["host_ms"])[1]


def rates(row: dict[str, Any], work: Work, machine: Machine) -> dict[str, Any]:
    """How near a timed row comes to what the machine can do."""
    seconds = best(row) / 1e3
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "gbps": work.bytes / seconds / 1e9,
        "tflops": work.flops / seconds / 1e12,
        "roof_pct": 100 * machine.floor(work) / seconds,
        "copy_gbps": machine.bytes_per_s / 1e9,
        "matmul_tflops": machine.flops / 1e12,
    }


def kernels(step: Step) -> dict[str, dict[str, int]]:
    """The Triton kernels of a step and their configurations."""
    with launch.record(None) as recorded:
        step()
    return {one.kernel.__name__: dict(one.config) for one in recorded}

"""Speed and memory of each operator on a GPU: forward alone, and forward with backward, at the shapes of the models.

Three providers get the same values: the operator in plain PyTorch, the same under torch.compile, and what FastSTGCMA runs. They
are first compared with the plain form in float64: one that errs more than twice as much as the plain form in the same dtype is
not timed, and the command fails. A row is saved as soon as it is measured.

Without --op and --shape the cases are those that count most; with either, all cases that fit.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from harness import DTYPES, Meter, json_file, matmul_peak, origin, progress_bar, timed
from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shapes import CASES, Case, tensors
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only
from tune import label

from stgcma_fast import report
from stgcma_fast.kernels import launch

# What is timed, in this order, where nothing else is asked for.
DEFAULT = (
    ("av_adapter", "swin_l stage 1"),
    ("av_adapter", "swin_l stage 1 windows shift 0"),
    ("av_adapter", "swin_l stage 1 windows shift 3"),
    ("temporal_attention", "swin_l stage 1"),
    ("window_attention", "swin_l stage 1 shift 0"),
    ("window_attention", "swin_l stage 1 shift 3"),
    ("adapter", "swin_l stage 1"),
    ("layer_norm", "swin_l stage 1 both streams"),
    ("gelu", "swin_l stage 1 both streams"),
    ("spatial_attention", "clip_l14 visual"),
)
MODES = ("fwd", "fwdbwd")
# Each takes an operator and returns what to call.
PROVIDERS: dict[str, Callable[[Callable], Callable]] = {
    "reference": lambda function: _with(function, "reference"),
    "compiled": lambda function: torch.compile(_with(function, "reference"), dynamic=False),
    "fast": lambda function: _with(function, "auto"),
}
# Fresh values and upstream gradients of which the errors are added up: one gate's gradient may be right by luck.
DRAWS = 8
HOST_CALLS = 50
GRAPH_WARMUP = 3
QUANTILES = (0.2, 0.5, 0.8)

Step = Callable[[], Any]


def _with(function: Callable, impl: str) -> Callable:
    return lambda *args, **kwargs: function(*args, **kwargs, impl=impl)


class Instruments:
    """What a step costs on the current CUDA device; milliseconds at `QUANTILES`, bytes."""

    def host(self, step: Step) -> list[float]:
        """What the host takes to issue the step, the device idle at its start."""
        step()
        ms = []
        for _ in range(HOST_CALLS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            ms.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
        return torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()

    def cold(self, step: Step) -> list[float]:
        """From the step's first kernel to its last, the L2 cache cold; where kernels are short, gaps between them included."""
        return list(triton.testing.do_bench(step, quantiles=list(QUANTILES)))

    def graph(self, step: Step) -> list[float]:
        """`cold`, of the step's replay as a CUDA graph: without the gaps.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = step()
        ms = self.cold(captured.replay)
        del results
        return ms

    def memory(self, step: Step) -> int:
        """The most that the step holds beyond what is held before it."""
        step()
        meter = Meter("cuda")
        before = meter.used()
        meter.reset()
        step()
        return meter.peak() - before


class Machine(NamedTuple):
    """The ceilings that this machine reaches itself."""

    bytes_per_s: float
    flops: float


def copy_peak(device: str) -> float:
    """Bytes per second, read and written, of the fastest large copy."""
    x = torch.randn(2**28, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(timed(lambda: y.copy_(x), device)[0] for _ in range(10))


class Work(NamedTuple):
    """What a call has to do at least; products alone count as operations."""

    flops: int
    bytes: int

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops, self.bytes / machine.bytes_per_s)


def _products(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """FLOP of the products, forward and backward, by the operators' cards."""
    x = args[0]
    if op == "temporal_attention":
        return 4 * x.numel() // 3 * x.shape[1], 8 * x.numel() // 3 * x.shape[1]
    if op == "spatial_attention":
        return 4 * x.numel() // 3 * x.shape[1], 10 * x.numel() // 3 * x.shape[1]
    if op == "window_attention":
        length = kwargs["window"] ** 2
        return 4 * x.numel() // 3 * length, 10 * x.numel() // 3 * length
    if op == "adapter":
        rank = args[1].down_bias.numel()
        return 4 * x.numel() * rank, 8 * x.numel() * rank
    if op == "cross_modal_attention":
        pairs = x.numel() * args[1].shape[1]
        return 8 * pairs, 14 * pairs
    if op == "av_adapter":
        audio, params, window = args[1], args[2], kwargs["window"]
        rank = params.down_bias.numel()
        adapters = (x.numel() + audio.numel()) * rank
        pairs = math.prod(x.shape[:2]) * (audio.shape[1] if window is None else window.size**2) * rank
        return 4 * adapters + 8 * pairs, 8 * adapters + 14 * pairs
    return 0, 0


def work(case: Case, mode: str, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> Work:
    """The floor of a case: its products; each input read and each output written once; in the backward inputs and upstream
    gradients read and gradients written once, but for residuals, whose gradient is the upstream one."""
    forward, backward = _products(case.op, args, kwargs)
    # The mask says nothing that window and shift do not.
    inputs = [x for name, part in [*enumerate(args), *kwargs.items()] if name != "mask" for x in tensors(part)]
    moved = sum(x.nbytes for x in (*inputs, *outputs))
    if mode == "fwd":
        return Work(forward, moved)
    residuals = args[2:] if case.op == "adapter" else [kwargs.get("residual_visual"), kwargs.get("residual_audio")]
    kept = [x for x in inputs if all(x is not residual for residual in residuals)]
    moved += sum(x.nbytes for x in outputs) + sum(x.nbytes * (1 + x.requires_grad) for x in kept)
    return Work(forward + backward, moved)


class Problem:
    """A case's values, and an upstream gradient for each output."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case = case
        self.arguments = case.fill(dtype, device)
        with torch.no_grad():
            outputs = self._outputs(_with(case.function, "reference"), self.arguments)
        self.upstream = [torch.randn_like(y) for y in outputs]
        self.work = {mode: work(case, mode, *self.arguments, outputs) for mode in MODES}

    @staticmethod
    def _outputs(call: Callable, arguments: tuple) -> list[Tensor]:
        args, kwargs = arguments
        return list(tensors(call(*args, **kwargs)))

    def run(self, call: Callable, mode: str, exact: bool = False) -> dict[str, Tensor | None]:
        """Outputs and gradients by name; with ``exact`` from the same values in float64."""
        arguments, upstream = self.arguments, self.upstream
        if exact:
            arguments = tree_map_only(Tensor, lambda x: x.detach().double().requires_grad_(x.requires_grad), arguments)
            upstream = [x.double() for x in upstream]
        if mode == "fwd":
            with torch.no_grad():
                outputs = self._outputs(call, arguments)
            return {f"output {i}": y for i, y in enumerate(outputs)}
        leaves = {
            keystr(path): x for path, x in tree_flatten_with_path(arguments)[0] if isinstance(x, Tensor) and x.requires_grad
        }
        outputs = self._outputs(call, arguments)
        gradients = torch.autograd.grad(outputs, [*leaves.values()], upstream, allow_unused=True)
        results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        return results | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


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


def compare(
    case: Case, dtype: torch.dtype, device: str, calls: dict[str, Callable]
) -> tuple[Problem, dict[tuple[str, str], dict[str, Any]]]:
    """A problem to time, and for each mode and provider the errors over some draws, or why it does not run."""
    sums: dict[tuple[str, str], Errors] = defaultdict(Errors)
    broken: dict[tuple[str, str], str] = {}
    exact_call = _with(case.function, "reference")
    for _ in range(DRAWS):
        problem = Problem(case, dtype, device)
        for mode in MODES:
            exact = problem.run(exact_call, mode, exact=True)
            for provider, call in calls.items():
                key = mode, provider
                if key not in broken:
                    try:
                        sums[key].add(problem.run(call, mode), exact)
                    except Exception as error:  # whatever stops a provider is that row's failure
                        broken[key] = f"{type(error).__name__}: {error}"
    found = {}
    for mode in MODES:
        for provider in calls:
            key = mode, provider
            found[key] = {"failed": broken[key]} if key in broken else sums[key].against(sums[mode, "reference"])
    return problem, found


def _launches(step: Step) -> dict[str, str]:
    """The Triton kernels of the step and their configurations."""
    with launch.record(None) as recorded:
        step()
    return {one.kernel.__name__: label(one.config) for one in recorded}


def best(row: Mapping[str, Any]) -> float | None:
    """Median milliseconds: of the graph's replay if there is one."""
    ms = row.get("graph_ms") or row.get("gpu_cold_ms")
    return ms and ms[1]


def times(step: Step, done: Work, machine: Machine, instruments: Instruments) -> dict[str, Any]:
    """A row's timings, its memory, and how near it comes to what the machine can do."""
    row = {"host_ms": instruments.host(step), "gpu_cold_ms": instruments.cold(step), "graph_ms": None}
    try:
        row["graph_ms"] = instruments.graph(step)
    except RuntimeError as error:
        row["graph_error"] = str(error)
    row["peak_extra_mb"] = instruments.memory(step) / 1e6
    seconds = best(row) / 1e3
    row |= {"flops": done.flops, "bytes": done.bytes, "gbps": done.bytes / seconds / 1e9}
    row |= {"tflops": done.flops / seconds / 1e12, "copy_share": done.bytes / seconds / machine.bytes_per_s}
    row |= {"matmul_share": done.flops / seconds / machine.flops, "floor_share": done.seconds(machine) / seconds}
    return row


def speedup(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> float | None:
    """How often ``row`` runs while ``other`` runs once, both as graphs or neither; None where one was not timed."""
    if other is None or "gpu_cold_ms" not in row or "gpu_cold_ms" not in other:
        return None
    kind = "graph_ms" if row["graph_ms"] and other["graph_ms"] else "gpu_cold_ms"
    return other[kind][1] / row[kind][1]


def measure(
    cases: Iterable[Case], dtype: torch.dtype, device: str, machine: Machine, instruments: Instruments, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The rows, one by one as they are measured."""
    cases = list(cases)
    task = progress.add_task("operators", total=len(cases) * len(MODES) * len(PROVIDERS))
    for case in cases:
        progress.update(task, description=case.op)
        # Every case is compiled as if it were the only one.
        torch._dynamo.reset()
        calls = {name: provider(case.function) for name, provider in PROVIDERS.items()}
        problem, errors = compare(case, dtype, device, calls)
        for mode in MODES:
            timed_rows: dict[str, dict[str, Any]] = {}
            for provider, call in calls.items():
                row = {"op": case.op, "provider": provider, "mode": mode, "shape": case.label}
                row |= {"dtype": str(dtype).removeprefix("torch."), **errors[mode, provider]}
                if "failed" not in row:

                    def step(call: Callable = call, mode: str = mode, problem: Problem = problem) -> Any:
                        return problem.run(call, mode)

                    try:
                        row |= times(step, problem.work[mode], machine, instruments)
                        if provider == "fast":
                            row["kernels"] = _launches(step)
                        timed_rows[provider] = row
                    except torch.OutOfMemoryError as error:
                        row["failed"] = f"out of memory: {error}"
                row |= {f"speedup_over_{name}": speedup(row, timed_rows.get(name)) for name in ("reference", "compiled")}
                progress.advance(task)
                yield row
        del problem, calls
        gc.collect()
        torch.cuda.empty_cache()


def save(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the file, whole or not at all."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    os.replace(written, path)


def chosen(op: Sequence[str] | None, shape: Sequence[str] | None) -> list[Case]:
    """The cases that the command line asks for; without a wish those of `DEFAULT`, in its order."""
    if op is None and shape is None:
        by_name = {(case.op, case.label): case for case in CASES}
        return [by_name[name] for name in DEFAULT]
    return [c for c in CASES if (op is None or c.op in op) and (shape is None or c.label.startswith(tuple(shape)))]


def print_table(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """The rows, for people: a table a case."""
    console.print(title)
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(f"{row['op']}, {row['shape']}", []).append(row)
    for name, same in cases.items():
        table = Table(title=name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading in ("mode", "provider"):
            table.add_column(heading, no_wrap=True)
        headings = (
            "host\nms",
            "cold\nms",
            "graph\nms",
            "over\nref.",
            "over\ncomp",
            "extra\nMB",
            "GB\n/s",
            "TFL\n/s",
            "of\nfloor",
        )
        for heading in (*headings, "err.\nratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in same:
            if "failed" in row:
                table.add_row(row["mode"], row["provider"], "failed", style="bold red")
            else:
                table.add_row(row["mode"], row["provider"], *_numbers(row))
        console.print(table)
    console.print(
        "p50; host: to issue a call; cold: on the device, L2 cache cold, with the gaps between kernels; graph: the same as a "
        "CUDA graph, without gaps; speedups over reference and compiled, and what follows, by graph where there is one; floor: "
        "the least bytes at this machine's copy rate, or the products at its matmul rate if they take longer; error: over the "
        "reference's, at most 2"
    )


def _numbers(row: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("host_ms", "gpu_cold_ms", "graph_ms"):
        yield "-" if row[kind] is None else f"{row[kind][1]:.3g}"
    for other in ("reference", "compiled"):
        times_over = row[f"speedup_over_{other}"]
        yield "-" if times_over is None else f"{times_over:.2f}"
    yield f"{row['peak_extra_mb']:.0f}"
    yield f"{row['gbps']:.0f}"
    yield f"{row['tflops']:.0f}" if row["flops"] else "-"
    yield f"{row['floor_share']:.0%}"
    yield f"{row['error'] / row['error_reference']:.2f}" if row["error_reference"] else "0"


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="operators.py", description=__doc__)
    p.add_argument("--op", choices=tuple(dict.fromkeys(case.op for case in CASES)), nargs="+", default=None, help="operators")
    p.add_argument("--shape", nargs="+", default=None, metavar="PREFIX", help="shapes whose names begin so")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="dtype of all tensors")
    p.add_argument("--json", type=str, metavar="FILE", help="write the rows here; the folder must exist")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    json_file(p, args.json, "cpu")
    if not torch.cuda.is_available():
        p.error("PyTorch finds no CUDA device here, and operators are timed on one")
    if launch.INTERPRETED:
        p.error("TRITON_INTERPRET is set: kernels would run in the interpreter; run this without it")
    cases = chosen(args.op, args.shape)
    if not cases:
        p.error("no shape of these operators begins so")
    dtype = DTYPES[args.dtype]
    return run(cases, dtype, "cuda", Machine(copy_peak("cuda"), matmul_peak("cuda", dtype)), Instruments(), args.json)


def run(
    cases: Sequence[Case], dtype: torch.dtype, device: str, machine: Machine, instruments: Instruments, file: str | None
) -> int:
    """Measure, save, print. Returns the exit status: 1 if a provider is wrong or does not run."""
    console = Console()
    header = origin(device) | {"driver": report.driver(), "copy_gbps": machine.bytes_per_s / 1e9}
    header |= {"matmul_tflops": machine.flops / 1e12}
    rows = []
    try:
        with progress_bar(console) as progress:
            for row in measure(cases, dtype, device, machine, instruments, progress):
                rows.append(row)
                if file is not None:
                    save(Path(file), header, rows)
    finally:
        title = f"{str(dtype).removeprefix('torch.')} on {header['versions']['device']}: copy {header['copy_gbps']:.0f} GB/s, "
        print_table(rows, f"{title}matmul {header['matmul_tflops']:.0f} TFLOP/s", console)
    wrong = [row for row in rows if "failed" in row]
    for row in wrong:
        console.print(
            f"{row['op']}, {row['shape']}, {row['mode']}, {row['provider']} failed: {row['failed']}", style="bold red"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

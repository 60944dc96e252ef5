"""Measure the launch configurations of the Triton kernels on this GPU and pin the fastest.

Every candidate of every kernel is timed at the models' shapes, with a cold L2 cache. The one with the least time, as the
geometric mean over the shapes, enters kernels/configs/<gpu>.json, provided that the operators give the same bits 100 times
with it. What a table already holds is kept, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from harness import DTYPES, origin, progress_bar
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import Progress
from shapes import CASES, Case, tensors
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from stgcma_fast import report
from stgcma_fast.kernels import launch
from stgcma_fast.ops import dispatch

REPEATS = 100
# Milliseconds of a call.
Timer = Callable[[Callable[[], Any]], float]


def label(config: launch.Config) -> str:
    """A configuration in one line, as the table's timings name it."""
    return " ".join(f"{name}={value}" for name, value in sorted(config.items()))


class Call:
    """An operator at one shape, forward and backward, with values and upstream gradients that stay."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case = case
        self.args, self.kwargs = case.fill(dtype, device)
        self.leaves = [x for x in tensors((self.args, self.kwargs)) if x.requires_grad]
        with torch.no_grad():
            self.upstream = [torch.randn_like(y) for y in self._forward()]

    def _forward(self) -> list[Tensor]:
        return list(tensors(self.case.function(*self.args, **self.kwargs, impl="triton")))

    def run(self) -> list[Tensor]:
        """Outputs and gradients."""
        outputs = self._forward()
        gradients = torch.autograd.grad(outputs, self.leaves, self.upstream, allow_unused=True)
        return [x.detach() for x in (*outputs, *gradients) if x is not None]

    def launches(self) -> list[launch.Launch]:
        """Everything that is launched, with the data it works on."""
        with launch.record(None) as recorded:
            self.run()
        return recorded


def same_bits(call: Call) -> bool:
    """Whether every repeat of the call gives the bits of the first."""
    # As integers, so that a NaN equals itself and zero differs from minus zero.
    first = [_bits(x) for x in call.run()]
    return all(torch.equal(x, _bits(y)) for _ in range(REPEATS - 1) for x, y in zip(first, call.run(), strict=True))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def measure(call: Call, key: str, config: launch.Config, timer: Timer) -> float | None:
    """Milliseconds of all launches of ``key`` in the call; None where the GPU cannot run the configuration."""
    with launch.override({key: config}):
        try:
            mine = [one for one in call.launches() if one.key == key]
        except (OutOfResources, PTXASError):
            return None

        def step() -> None:
            for one in mine:
                launch.run(one.kernel, lambda _, one=one: one.grid, *one.args, candidates=one.candidates, **one.constants)

        return timer(step)


def tune_key(key: str, candidates: Iterable[launch.Config], calls: Sequence[Call], timer: Timer, step: Callable) -> dict | None:
    """The table's row of a key: the fastest configuration whose results are always the same; None if there is none."""
    configs = {label(config): dict(config) for config in candidates}
    ms: dict[str, dict[str, float | None]] = {}
    for name, config in configs.items():
        ms[name] = {}
        for call in calls:
            ms[name][call.case.label] = measure(call, key, config, timer)
            step()
    runnable = [name for name in configs if None not in ms[name].values()]
    for name in sorted(runnable, key=lambda name: statistics.geometric_mean(ms[name].values())):
        with launch.override({key: configs[name]}):
            if all(same_bits(call) for call in calls):
                return {"key": key, "config": configs[name], "ms": ms}
    return None


class Tuned:
    """A table of measured configurations and its file.

    Args:
        path: the file; it may not exist yet.
        header: GPU, versions, commit and date of this run.
        fresh: measure again what the file holds.
    """

    # Rows measured with another of these say nothing about this run.
    SAME = ("gpu", "driver", "torch", "triton")

    def __init__(self, path: Path, header: Mapping[str, Any], fresh: bool) -> None:
        self.path, self.header, self.fresh = path, header, fresh
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            table = json.loads(path.read_text())
            if all(table[name] == header[name] for name in self.SAME):
                self.rows = {row["key"]: row for row in table["rows"]}

    def has(self, key: str, candidates: Iterable[launch.Config], calls: Iterable[str]) -> bool:
        """Whether these very candidates were measured at these very shapes."""
        ms = self.rows[key]["ms"] if key in self.rows and not self.fresh else {}
        return set(ms) == set(map(label, candidates)) and all(set(shapes) == set(calls) for shapes in ms.values())

    def put(self, row: Mapping[str, Any]) -> None:
        """Add a row, or replace it, and write the file, whole or not at all."""
        self.rows[row["key"]] = {**row, "commit": self.header["commit"], "date": self.header["date"]}
        self.path.parent.mkdir(exist_ok=True)
        written = self.path.with_suffix(".tmp")
        rows = [self.rows[key] for key in sorted(self.rows)]
        written.write_text(json.dumps({**self.header, "rows": rows}, indent=1) + "\n")
        os.replace(written, self.path)


def header() -> dict[str, Any]:
    """What the table says of this machine."""
    source = origin("cuda")
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver": report.driver(),
        "torch": source["versions"]["torch"],
        "triton": source["versions"]["triton"],
        "commit": source["commit"],
        "date": source["date"],
    }


def plan(cases: Iterable[Case], dtype: torch.dtype, device: str, progress: Progress) -> dict[str, tuple[list, list[Case]]]:
    """Every key that the cases launch: its candidates and the cases that launch it."""
    cases = list(cases)
    found: dict[str, tuple[list, list[Case]]] = {}
    task = progress.add_task("record", total=len(cases))
    for case in cases:
        try:
            recorded = Call(case, dtype, device).launches()
        except NotImplementedError as refused:
            progress.console.print(f"not measured: {case.label}: {refused}")
            recorded = []
        for key, offered in {one.key: one.candidates for one in recorded}.items():
            candidates, same = found.setdefault(key, ([], []))
            candidates += [config for config in offered if config not in candidates]
            same.append(case)
        progress.advance(task)
    return found


def tune(
    cases: Iterable[Case], dtype: torch.dtype, device: str, table: Tuned, timer: Timer, progress: Progress
) -> tuple[list[str], list[str]]:
    """Fill the table. Returns the keys measured, and those for which no candidate may be pinned."""
    keys = plan(cases, dtype, device, progress)
    todo = {k: v for k, v in keys.items() if not table.has(k, v[0], [case.label for case in v[1]])}
    progress.console.print(f"{len(keys)} keys, {len(keys) - len(todo)} of them measured before")
    task = progress.add_task("measure", total=sum(len(candidates) * len(same) for candidates, same in todo.values()))
    failed = []
    for key, (candidates, same) in todo.items():
        calls = [Call(case, dtype, device) for case in same]
        row = tune_key(key, candidates, calls, timer, lambda: progress.advance(task))
        if row is None:
            failed.append(key)
        else:
            table.put(row)
    return list(todo), failed


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="tune.py", description=__doc__)
    served = sorted(op for op, implementations in dispatch.REGISTRY.items() if "triton" in implementations)
    p.add_argument("--op", choices=tuple(served), nargs="+", default=served, help="operators, in this order")
    p.add_argument("--shape", default="", metavar="PREFIX", help="shapes whose names begin so, such as swin_l; default: all")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="dtype of all tensors")
    p.add_argument("--fresh", action="store_true", help="measure again what the table already holds")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.error("PyTorch finds no CUDA device here, and configurations are measured on the GPU they are for")
    if launch.INTERPRETED:
        p.error("TRITON_INTERPRET is set: kernels would run in the interpreter; run this without it")
    console = Console()
    table = Tuned(launch.CONFIGS / f"{launch.gpu_slug(torch.cuda.get_device_name())}.json", header(), args.fresh)
    cases = [case for op in args.op for case in CASES if case.op == op and case.label.startswith(args.shape)]
    # A GPU may be there for minutes only: what the largest model launches comes first.
    cases.sort(key=lambda case: not case.label.startswith("swin_l"))
    if not cases:
        p.error(f"--shape {args.shape}: no shape of {', '.join(args.op)} begins so")
    with progress_bar(console) as progress:
        measured, failed = tune(cases, DTYPES[args.dtype], "cuda", table, _do_bench, progress)
    console.print(f"{len(measured)} keys measured; the table: {table.path}")
    for key in failed:
        console.print(f"nothing is pinned, no candidate runs here with the same bits every time: {key}", style="bold red")
    return 1 if failed else 0


def _do_bench(step: Callable[[], Any]) -> float:
    return triton.testing.do_bench(step, return_mode="median")


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks share: timers, memory, the machine's ceilings, and the files that results are kept in."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# torch.compile imports cProfile, which imports `profile`: the standard library's is meant, not benchmarks/profile.py.
_path, sys.path = sys.path, [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT / "benchmarks"]
import cProfile  # noqa: E402, F401

sys.path = _path

import torch  # noqa: E402
from jsonargparse import ArgumentParser  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from stgcma_fast import report  # noqa: E402
from stgcma_fast.config import ADAPTER_SIZES, BACKBONES  # noqa: E402
from stgcma_fast.ops.linear import linear  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTILES = (0.2, 0.5, 0.8)


class Meter:
    """Bytes in use and their peak: the process's resident set on the CPU, the allocator's count on CUDA."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        try:
            self._trim = ctypes.CDLL("libc.so.6").malloc_trim
            self.reset()
            self.known = self.cuda or self.peak() > 0
        except (OSError, AttributeError, StopIteration):
            self.known = self.cuda

    @staticmethod
    def _status(name: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def used(self) -> int:
        """Bytes held now. On the CPU, free memory is given back first: left in the heap it would hide the next peak."""
        if self.cuda:
            return torch.cuda.memory_allocated()
        gc.collect()
        if not self.known:
            return 0
        self._trim(0)
        return self._status("VmRSS")

    def reset(self) -> None:
        """Start looking for a new peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The largest number of bytes held since `reset`."""
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")


def timed(step: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds and result of one call, begun and ended with an idle device."""
    if device == "cpu":
        start = time.perf_counter()
        result = step()
        return time.perf_counter() - start, result
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    result = step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result


def quantiles(values: Sequence[float]) -> list[float]:
    """The values at `QUANTILES`."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large square product, by PyTorch's own route or by the one `stgcma_fast` takes."""
    best = 0.0
    for size in (4096, 8192, 16384) if device == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for product in (torch.matmul, linear):
            for _ in range(3):
                best = max(best, 2 * size**3 / timed(lambda product=product, a=a, b=b: product(a, b), device)[0])
    return best


def copy_peak(device: str) -> float:
    """Bytes per second, read and written, of the fastest large copy."""
    x = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(timed(lambda: y.copy_(x), device)[0] for _ in range(10))


@cache
def commit() -> str | None:
    """The checkout's commit when a run begins to ask, marked where files differ from it; outside a checkout what the variable
    COMMIT says, or None."""
    if not (ROOT / ".git").exists():
        return os.environ.get("COMMIT") or None
    described = ("git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7")
    try:
        return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def green_file(device: str) -> Path:
    """Where a run of all tests for a device leaves the commit that they passed at."""
    return ROOT / ".pytest_cache" / f"green_{device}"


def tests_green(device: str) -> bool | None:
    """Whether all tests for the device passed at this very commit; None where they were not run at it."""
    try:
        at, passed = green_file(device).read_text().split()
    except FileNotFoundError:
        return None
    return passed == "passed" if at == commit() and not at.endswith("-dirty") else None


def origin(device: str) -> dict[str, Any]:
    """On what, with what and when something was measured."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "device": report.device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "clocks_mhz": _clocks() if device == "cuda" else None,
        "versions": report.versions(),
        "commit": commit(),
        "tests_green": tests_green(device),
        "date": now,
    }


def _clocks() -> dict[str, int] | None:
    """The GPU's clock now and at most: equal under load where it is locked there."""
    try:
        query = ("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits")
        now, most = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0].split(",")
        return {"now": int(now), "max": int(most)}
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def results_file(device: str) -> Path:
    """benchmarks/results/<device>_<torch>_<commit>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", report.device_name(device).split(",")[0].lower()).strip("-")
    return RESULTS / f"{name}_{torch.__version__.split('+')[0]}_{commit() or 'unknown'}.json"


def save(file: Path, part: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str], device: str) -> None:
    """Put rows into a part of a results file, beside what other commands measured at the same commit.

    Args:
        file: made if missing; replaced as a whole, so that a crash leaves the old one.
        part: the command, as "throughput".
        rows: measurements; each replaces the row of the part that has the same values under ``keys``.
        keys: what identifies a row.
        device: "cpu" or "cuda".

    Raises:
        ValueError: the file holds results of another machine, version or commit.
    """
    source = origin(device)
    results = json.loads(file.read_text()) if file.exists() else {}
    for key in ("device", "versions", "commit") if results else ():
        if results["origin"][key] != source[key]:
            raise ValueError(f"{file} was measured with {key} {results['origin'][key]}, this is {source[key]}")
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in results.get(part, []) if tuple(row.get(key) for key in keys) not in new]
    results |= {"origin": source, part: [*kept, *rows]}
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)


def progress_bar(console: Console) -> Progress:
    """Description, bar, count and time of each task."""
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def add_model(p: ArgumentParser) -> None:
    """The options ``--arch`` and ``--adapters``."""
    p.add_argument("--arch", choices=tuple(BACKBONES), required=True, help="backbone")
    p.add_argument("--adapters", choices=ADAPTER_SIZES, default="base", help="size of the adapters")


def add_device(p: ArgumentParser) -> None:
    """The option ``--device``, which `chosen_device` reads."""
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is a device")


def chosen_device(p: ArgumentParser, device: str) -> str:
    """The device of ``--device``, "cpu" or "cuda"; ends the command if it is not there."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        p.error("--device cuda: PyTorch finds no CUDA device here")
    return device if device != "auto" else "cuda" if there else "cpu"


def refuse_graph(p: ArgumentParser, impls: Sequence[str], device: str, dtypes: Sequence[str]) -> None:
    """End the command if a whole step shall be one CUDA graph where it can not."""
    if "fast_graph" in impls and (device == "cpu" or "float16" in dtypes):
        p.error("--impl fast_graph: a CUDA graph needs --device cuda, and a dtype without loss scaling: float32 or bfloat16")


def add_json(p: ArgumentParser) -> None:
    """The option ``--json``."""
    p.add_argument(
        "--json",
        type=str,
        metavar="FILE",
        help="keep the rows here, beside what other commands measured at this commit; the folder must exist. auto: "
        "benchmarks/results/<device>_<torch>_<commit>.json",
    )


def json_file(p: ArgumentParser, file: str | None, device: str) -> Path | None:
    """The file of ``--json``; ends the command before any work is done if there is no folder for it."""
    if file is None:
        return None
    path = results_file(device) if file == "auto" else Path(file).absolute()
    if not path.parent.is_dir():
        p.error(f"--json: there is no folder {path.parent}")
    return path

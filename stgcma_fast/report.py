"""Versions, devices, the implementation that serves each operator here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from .ops import linear
from .ops.dispatch import REGISTRY, Impl, refusals, select


def _installed(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def versions() -> dict[str, str | None]:
    """Versions of everything that can change speed or numbers; None for what is not installed."""
    return {
        "stgcma_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
        "xformers": _installed("xformers"),
        "flash-attn": _installed("flash-attn"),
        "dali": _installed("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    }


def device_name(device: str) -> str:
    """The model of the processor ("cpu") or of the GPU and its driver ("cuda")."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, driver {_driver() or 'unknown'}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _driver() -> str | None:
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def operators() -> list[tuple[str, str, str]]:
    """For each operator: its name, the implementation that "auto" takes here, and why not the others."""
    rows = []
    for op in sorted(REGISTRY):
        chosen = select(op, "auto")
        serving = next(name for name, function in REGISTRY[op].items() if function is chosen)
        others = [name for name in get_args(Impl) if name not in ("auto", serving)]
        why = (f"{name}: {'; '.join(refusals(op, name)) or 'can serve, but only if asked for'}" for name in others)
        rows.append((op, serving, "\n".join(why)))
    probe = torch.zeros(1, 1)
    onednn = linear.served_by_onednn(probe, probe)
    why = "MKL: slower where it was measured, on an AMD processor" if onednn else "oneDNN: this build of PyTorch lacks it"
    return [*rows, ("frozen linear layers,\nfloat32 on the CPU", "oneDNN" if onednn else "MKL", why)]


def main() -> int:
    """Print the report. Returns the command's exit status."""
    console = Console()
    table = Table("package", "version")
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    console.print(table)
    table = Table("device", "what it is")
    capability = torch.backends.cpu.get_cpu_capability()
    table.add_row("cpu", f"{device_name('cpu')}; PyTorch uses {capability} and {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        table.add_row("cuda", "PyTorch finds no device")
    console.print(table)
    table = Table("operator", "served by", "why not the others", show_lines=True)
    for row in operators():
        table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

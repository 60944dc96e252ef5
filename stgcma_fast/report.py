"""Versions, devices, the implementation that serves each operator here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from .ops import linear
from .ops.dispatch import OLDEST_GPU, REGISTRY, refusals, select
from .ops.fp8 import fp8_refusals
from .ops.spatial_attention import BACKENDS, backend_refusals


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
        return f"{torch.cuda.get_device_name()}, driver {driver() or 'unknown'}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _triton_refusals(op: str) -> list[str]:
    """Why "auto" does not take Triton on CUDA here, whatever the arguments."""
    reasons = refusals(op, "triton")
    if not torch.cuda.is_available():
        return [*reasons, "its kernels need a CUDA device, and PyTorch finds none"]
    gpu = torch.cuda.get_device_properties(0)
    if (gpu.major, gpu.minor) < OLDEST_GPU:
        reasons.append(f"its kernels need compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, got {gpu.major}.{gpu.minor}")
    return reasons


def operators() -> list[tuple[str, str, str, str]]:
    """For each operator: its name, what "auto" takes here on the CPU and on CUDA, and why not the others."""
    rows = []
    probe = torch.zeros(1, 1)
    cuda = torch.cuda.is_available()
    for op in sorted(REGISTRY):
        chosen = select(op, "auto", probe)
        on_cpu = next(name for name, implementation in REGISTRY[op].items() if implementation.function is chosen)
        reasons = _triton_refusals(op)
        why = [f"triton: {'; '.join(reasons) or 'on the CPU its kernels run in tests alone'}"]
        others = [name for name in ("torch", "reference") if name != on_cpu]
        why.extend(f"{name}: {'; '.join(refusals(op, name)) or 'can serve, but only if asked for'}" for name in others)
        if op == "spatial_attention":
            why.append("all three are attention of libraries; these can be asked for by name:")
            why.extend(f"  {name}: {'; '.join(backend_refusals(name)) or 'can serve'}" for name in BACKENDS)
        on_cuda = "torch" if reasons else "triton"
        rows.append((op, on_cpu, on_cuda if cuda else "no device", "\n".join(why)))
    fp8 = [*fp8_refusals(torch.device("cuda", 0))] if cuda else ["it needs a CUDA device, and PyTorch finds none"]
    onednn = linear.served_by_onednn(probe, probe)
    why = "MKL: slower where it was measured, on an AMD processor" if onednn else "oneDNN: this build of PyTorch lacks it"
    return [
        *rows,
        (
            "frozen linear layers,\nfloat32",
            "oneDNN" if onednn else "MKL",
            "cuBLAS" if cuda else "no device",
            f"on the CPU {why}",
        ),
        (
            "frozen linear layers,\nfp8-frozen",
            "none",
            ("none" if fp8 else "PyTorch") if cuda else "no device",
            f"on CUDA {'; '.join(fp8) or 'it can serve, but only if asked for'}",
        ),
    ]


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
    table = Table("operator", "CPU", "CUDA", "why not the others", show_lines=True)
    for row in operators():
        table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

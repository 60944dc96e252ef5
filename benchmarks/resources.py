"""What every Triton kernel takes of a GPU, without one: registers, spills, shared memory, tensor cores, occupancy.

The kernels are compiled ahead of time as a run at the models' shapes would compile them. A kernel that spills registers, takes
more shared memory than the card has, or multiplies matrices without tensor cores, fails the command.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from harness import DTYPES, json_file, origin, progress_bar
from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shapes import CASES, INSIDE, Case, tensors
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from stgcma_fast.kernels import launch
from stgcma_fast.ops import dispatch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Limits(NamedTuple):
    """What a streaming multiprocessor has (CUDA C++ Programming Guide, compute capabilities)."""

    block_shared: int
    shared: int
    blocks: int
    warps: int
    registers: int = 65536
    # Columns of the tensor memory that tcgen05 instructions accumulate in.
    tensor_columns: int = 0


KB = 1024
LIMITS = {
    "sm_80": Limits(163 * KB, 164 * KB, 32, 64),
    "sm_86": Limits(99 * KB, 100 * KB, 16, 48),
    "sm_89": Limits(99 * KB, 100 * KB, 24, 48),
    "sm_90": Limits(227 * KB, 228 * KB, 32, 64),
    "sm_100": Limits(227 * KB, 228 * KB, 32, 64, tensor_columns=512),
}
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100")


@dataclass(frozen=True)
class Job:
    """One compilation, in a form that goes to another process."""

    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, Any], ...]


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def job(recorded: launch.Launch, arch: str) -> Job:
    """What Triton would compile for this launch: its own rules on divisible and constant arguments decide."""
    kernel = recorded.kernel
    backend = make_backend(GPUTarget("cuda", _capability(arch), 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**recorded.constants, **recorded.config}
    arguments, specialization, options = bind(*recorded.args, **keywords)
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, arguments, specialization, options)
    parts = (tuple((k, _frozen(v)) for k, v in x.items()) for x in (signature, constants, attributes, options))
    return Job(kernel.__module__, kernel.__name__, arch, *parts)


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list) else x


def compile_job(job: Job) -> dict[str, Any]:
    """Compile, disassemble and count."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    attributes = {path: list(map(list, values)) for path, values in job.attributes}
    source = ASTSource(kernel, dict(job.signature), dict(job.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", _capability(job.arch), 32), options=dict(job.options))
    matrix = "tt.dot" in compiled.asm["ttir"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(TOOLS / "cuobjdump", "-res-usage", cubin)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        # Half of the time goes into this text, and a kernel without a stack has nowhere to spill to.
        sass = _output(TOOLS / "nvdisasm", "-c", "-ndf", cubin) if matrix or stack else ""
    meta = compiled.metadata
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared_bytes": meta.shared,
        "mma": "+".join(sorted(set(re.findall(r"\b[A-Z]+MMA\b", sass)))) or None,
        "matrix": matrix,
        "num_warps": meta.num_warps,
        "num_stages": meta.num_stages,
        **occupancy(job.arch, registers, meta.shared, meta.num_warps, meta.tmem_size),
    }


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> dict[str, int | float]:
    """How many blocks and warps a multiprocessor holds at once; an estimate, as the driver alone knows."""
    limits = LIMITS[arch]
    # Registers are given out in units of 256 a warp, warps to the multiprocessor's four parts; a block reserves 1 KB.
    warp_registers = -(-registers * 32 // 256) * 256
    bounds = [
        limits.blocks,
        limits.warps // warps,
        limits.registers // warp_registers // 4 * 4 // warps,
        limits.shared // (shared + KB),
    ]
    if tensor_columns:
        bounds.append(limits.tensor_columns // tensor_columns)
    blocks = min(bounds)
    return {"blocks_per_sm": blocks, "warps_per_sm": blocks * warps, "occupancy": blocks * warps / limits.warps}


def launches(case: Case, dtype: torch.dtype, arch: str) -> tuple[list[launch.Launch], list[launch.Launch]]:
    """What a call's forward, with and without gradients, and its backward launch on a GPU of this architecture.

    Raises:
        NotImplementedError: its kernels do not serve this call.
    """
    args, kwargs = case.build(dtype, "cpu")
    with launch.record(divmod(_capability(arch), 10)) as recorded, kernels_on_cpu():
        with torch.no_grad():
            case.function(*args, **kwargs, impl="triton")
        outputs = [y for y in tensors(case.function(*args, **kwargs, impl="triton")) if y.requires_grad]
        split = len(recorded)
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return recorded[:split], recorded[split:]


@contextlib.contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """While launches are only recorded, tensors may lie where no kernel could run."""
    dispatch.INTERPRETED = True
    try:
        yield
    finally:
        dispatch.INTERPRETED = False


def pinned_tables() -> list[dict[str, Any]]:
    """The tables of measured configurations."""
    return [json.loads(path.read_text()) for path in sorted(launch.CONFIGS.glob("*.json"))]


def collect(
    cases: Sequence[Case], dtype: torch.dtype, archs: Iterable[str], tables: Iterable[Mapping[str, Any]], progress: Progress
) -> tuple[dict[tuple[str, str, str, Job], dict[str, Any]], list[str]]:
    """The compilations that the cases need: (operator, direction, configuration's origin, job) to the first part of a row.

    Returns them and notes: calls that the kernels do not serve, measured configurations that no call uses.
    """
    pinned: dict[str, list[tuple[str, dict[str, launch.Config]]]] = {arch: [("default", {})] for arch in archs}
    for table in tables:
        arch = "sm_{}{}".format(*table["capability"])
        if arch in pinned:
            pinned[arch].append((table["gpu"], {row["key"]: row["config"] for row in table["rows"]}))
    wanted: dict[tuple[str, str, str, Job], dict[str, Any]] = {}
    notes: dict[str, None] = {}
    unused = {(gpu, key) for tables in pinned.values() for gpu, configs in tables for key in configs}
    task = progress.add_task("record", total=len(cases) * sum(map(len, pinned.values())))
    for arch, origins in pinned.items():
        for gpu, configs in origins:
            for case in cases:
                try:
                    with launch.override(configs) if configs else contextlib.nullcontext():
                        directions = launches(case, dtype, arch)
                except NotImplementedError as refused:
                    notes[f"not compiled: {case.label}: {refused}"] = None
                    directions = [], []
                progress.advance(task)
                for direction, recorded in zip(("fwd", "bwd"), directions, strict=True):
                    for one in recorded:
                        unused.discard((gpu, one.key))
                        if configs and one.key not in configs:
                            continue
                        row = {"kernel": one.kernel.__name__, "op": case.op, "direction": direction, "shape": case.label}
                        row |= {"dtype": str(dtype).removeprefix("torch."), "arch": arch, "source": gpu}
                        row |= {"key": one.key, "config": dict(one.config)}
                        known = wanted.setdefault((case.op, direction, gpu, job(one, arch)), row)
                        if case.label not in known["shape"].split(", "):
                            known["shape"] += f", {case.label}"
    notes |= dict.fromkeys(f"measured on {gpu}, but launched by no case: {key}" for gpu, key in sorted(unused))
    return wanted, list(notes)


def compile_all(wanted: Mapping[tuple[str, str, str, Job], dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
    """The rows, each job compiled once, on all cores."""
    jobs = list(dict.fromkeys(key[-1] for key in wanted))
    task = progress.add_task("compile", total=len(jobs))
    found: dict[Job, dict[str, Any]] = {}
    workers = max(1, min(os.cpu_count() or 1, len(jobs)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_job, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                found[futures[future]] = future.result()
            except Exception as error:  # whatever stops the compiler is that row's failure
                found[futures[future]] = {"error": f"{type(error).__name__}: {error}".strip()}
            progress.advance(task)
    return [row | found[key[-1]] for key, row in wanted.items()]


def failures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong with each row that cannot be launched well."""
    found = []
    for row in rows:
        reasons = []
        if "error" in row:
            reasons.append(f"does not compile: {row['error']}")
        else:
            limit = LIMITS[row["arch"]].block_shared
            if row["spills"]:
                reasons.append(f"{row['spills']} loads and stores of spilled registers")
            if row["shared_bytes"] > limit:
                reasons.append(f"{row['shared_bytes']} bytes of shared memory, the card has {limit}")
            if row["matrix"] and row["mma"] is None and row["dtype"] != "float32":
                reasons.append("multiplies matrices without tensor cores")
        found += [f"{row['kernel']} on {row['arch']} ({row['op']}, {row['shape']}, {row['config']}): {r}" for r in reasons]
    return found


def print_table(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """The rows, for people: a table a kernel, the architectures of a shape side by side."""
    kernels: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        kernels.setdefault(row["kernel"], {}).setdefault(row["shape"], []).append(row)
    for kernel, shapes in kernels.items():
        table = Table(title=kernel, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("shape", overflow="fold")
        for heading in ("arch", "mma"):
            table.add_column(heading, no_wrap=True)
        for heading in ("regis-\nters", "spills", "shared\nKB", "warps", "stages", "blocks\nan SM", "warps\nan SM"):
            table.add_column(heading, justify="right", no_wrap=True)
        for shape, same in shapes.items():
            first, *others = shape.split(", ")
            for i, row in enumerate(same):
                cells = "" if i else f"{first} +{len(others)}" if others else first, row["arch"]
                if "error" in row:
                    table.add_row(*cells, "error")
                    continue
                numbers = row["registers"], row["spills"], f"{row['shared_bytes'] / KB:.1f}", row["num_warps"]
                numbers += row["num_stages"], row["blocks_per_sm"], row["warps_per_sm"]
                table.add_row(*cells, row["mma"] or "-", *map(str, numbers))
        console.print(table)
    console.print("+n: so many more shapes share the kernel as compiled; an SM's blocks and warps at one time are an estimate")


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="resources.py", description=__doc__)
    served = sorted({case.op for case in (*CASES, *INSIDE)})
    p.add_argument("--arch", choices=tuple(LIMITS), nargs="+", default=list(ARCHS), help="architectures to compile for")
    p.add_argument("--op", choices=tuple(served), nargs="+", default=served, help="operators, and what runs inside them")
    p.add_argument("--shape", nargs="+", default=[""], metavar="TEXT", help="shapes whose names begin so")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="dtype of all tensors")
    p.add_argument("--json", type=str, metavar="FILE", help="write the rows here; the folder must exist")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    file = json_file(p, args.json, "cpu")
    if launch.INTERPRETED:
        p.error("TRITON_INTERPRET is set: the interpreter compiles nothing; run this without it")
    console = Console()
    with progress_bar(console) as progress:
        cases = [case for case in (*CASES, *INSIDE) if case.op in args.op and case.label.startswith(tuple(args.shape))]
        wanted, notes = collect(cases, DTYPES[args.dtype], dict.fromkeys(args.arch), pinned_tables(), progress)
        rows = compile_all(wanted, progress)
    print_table(rows, console)
    for note in notes:
        console.print(note)
    wrong = failures(rows)
    for text in wrong:
        console.print(text, style="bold red")
    if file is not None:
        file.write_text(json.dumps(origin("cpu") | {"rows": rows, "failures": wrong}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

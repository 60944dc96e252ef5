"""The operators' benchmark: its options, what is measured where nothing is asked for, its table."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness import DTYPES, copy_peak, matmul_peak, results_file, save
from benchmarks.ops.gate import Judged, compare
from benchmarks.ops.instruments import Instruments, Machine, best
from benchmarks.ops.problem import MODES
from benchmarks.ops.providers import PROVIDERS, has
from benchmarks.shapes import CASES, STRESS, Case, tensors
from stgcma_fast.kernels import launch

# What is measured, in this order, where nothing else is asked for.
DEFAULT = {
    "cuda": (
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
        ("cross_modal_attention", "swin_l stage 1"),
        ("av_adapter", "swin_l stage 3 batch 8"),
    ),
    # Stage 3 holds most of the blocks, and its scores in float64 fit into any machine.
    "cpu": (
        ("av_adapter", "swin_l stage 3"),
        ("av_adapter", "swin_l stage 3 windows shift 3"),
        ("temporal_attention", "swin_l stage 3"),
        ("window_attention", "swin_l stage 3 shift 3"),
        ("adapter", "swin_l stage 3"),
        ("layer_norm", "swin_l stage 3 both streams"),
        ("gelu", "swin_l stage 3 both streams"),
        ("spatial_attention", "clip_l14 visual"),
        ("cross_modal_attention", "swin_l stage 3"),
    ),
}
KEYS = ("op", "provider", "mode", "shape", "dtype")
ROWS = pytest.StashKey[list[dict[str, Any]]]()
DEVICE = pytest.StashKey[str]()


def _results(text: str) -> str:
    if text != "auto" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).absolute().parent}")
    return text


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operators")
    operators = tuple(dict.fromkeys(case.op for case in CASES))
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is a device")
    group.addoption("--op", choices=operators, action="append", help="an operator; may be repeated")
    group.addoption("--shape", metavar="PREFIX", action="append", help="shapes whose names begin so; may be repeated")
    group.addoption("--provider", choices=tuple(PROVIDERS), action="append", help="who computes; may be repeated")
    group.addoption("--mode", choices=MODES, action="append", help="forward, backward alone, or both; may be repeated")
    group.addoption(
        "--dtype",
        choices=tuple(DTYPES),
        action="append",
        help="of all tensors; may be repeated (default: bfloat16 on CUDA, float32 on the CPU)",
    )
    group.addoption("--all", action="store_true", help="every case; without it, --op and --shape those that count most")
    group.addoption(
        "--json",
        type=_results,
        metavar="FILE",
        help="keep the rows here, beside what other commands measured at this commit; the folder must exist. auto: "
        "benchmarks/results/<device>_<torch>_<commit>.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no CUDA device here")
    if device == "cuda" and launch.INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET is set: kernels would run in the interpreter; run this without it")
    config.stash[DEVICE], config.stash[ROWS] = device, []
    if config.option.json is not None:
        config.option.json = results_file(device) if config.option.json == "auto" else Path(config.option.json).absolute()
        try:
            save(config.option.json, "operators", [], KEYS, device)
        except ValueError as error:
            raise pytest.UsageError(f"--json: {error}") from error
    # Its table knows the host's times alone; ours follows.
    config.option.benchmark_quiet = True
    # What is skipped or wrong is not timed.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    # The compiler's, of PyTorch's own code.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def chosen(option: argparse.Namespace, device: str) -> list[Case]:
    """The cases asked for; without a wish those of `DEFAULT`, in its order."""
    cases = [*CASES, *STRESS]
    if not (option.all or option.op or option.shape):
        by_name = {(case.op, case.label): case for case in cases}
        return [by_name[name] for name in DEFAULT[device]]
    prefixes = tuple(option.shape or ("",))
    return [c for c in cases if c.op in (option.op or [c.op]) and c.label.startswith(prefixes)]


def _id(case: Case) -> str:
    """The operator, the shape's name, and the sizes of the first tensor."""
    first = next(tensors(case.build(torch.float32, "meta")[0]))
    return f"{case.op}-{case.label}-{'x'.join(map(str, first.shape))}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option, device = metafunc.config.option, metafunc.config.stash[DEVICE]
    # Compilation on the CPU takes longer than all else together.
    providers = option.provider or [name for name in PROVIDERS if device == "cuda" or name != "compiled"]
    rows = [
        pytest.param(case, DTYPES[dtype], provider, mode, id=f"{_id(case)}-{dtype}-{provider}-{mode}")
        for case in chosen(option, device)
        for dtype in option.dtype or ["bfloat16" if device == "cuda" else "float32"]
        for mode in option.mode or MODES
        for provider in providers
        if has(provider, case.op)
    ]
    metafunc.parametrize(("case", "dtype", "provider", "mode"), rows)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.stash[DEVICE]


@pytest.fixture(scope="session")
def copy_rate(device: str) -> float:
    return copy_peak(device)


@pytest.fixture(scope="session")
def machines(device: str) -> dict[torch.dtype, Machine]:
    """The machine's ceilings by dtype, as far as they were needed."""
    return {}


@pytest.fixture
def machine(device: str, dtype: torch.dtype, copy_rate: float, machines: dict[torch.dtype, Machine]) -> Machine:
    if dtype not in machines:
        machines[dtype] = Machine(copy_rate, matmul_peak(device, dtype))
    return machines[dtype]


@pytest.fixture(scope="session")
def judged() -> dict[tuple[Case, torch.dtype], Judged]:
    """What was compared, each case once for all its providers."""
    return {}


@pytest.fixture
def comparison(
    request: pytest.FixtureRequest,
    case: Case,
    dtype: torch.dtype,
    device: str,
    judged: dict[tuple[Case, torch.dtype], Judged],
) -> Judged:
    if (case, dtype) not in judged:
        asked = [item.callspec.params for item in request.session.items]
        asked = [params for params in asked if (params["case"], params["dtype"]) == (case, dtype)]
        calls = {provider: PROVIDERS[provider](case) for provider in dict.fromkeys(params["provider"] for params in asked)}
        kinds = {"fwd" if params["mode"] == "fwd" else "fwdbwd" for params in asked}
        judged[case, dtype] = Judged(calls, compare(case, dtype, device, calls, kinds))
    return judged[case, dtype]


@pytest.fixture
def instruments(device: str) -> Iterator[Instruments]:
    yield Instruments(device)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def keep(pytestconfig: pytest.Config, device: str) -> Callable[[dict[str, Any]], None]:
    """Takes a row as soon as it is measured."""

    def keep(row: dict[str, Any]) -> None:
        pytestconfig.stash[ROWS].append(row)
        if pytestconfig.option.json is not None:
            save(pytestconfig.option.json, "operators", [row], KEYS, device)

    return keep


def pytest_terminal_summary(config: pytest.Config) -> None:
    if config.stash[ROWS]:
        console = Console()
        # In a file or a pipe its width is a guess.
        console.width = max(console.width, 110)
        print_table(config.stash[ROWS], console)


def speedup(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> float | None:
    """How often ``row`` runs while ``other`` runs once, both as graphs or neither; None where one was not timed."""
    if other is None or "host_ms" not in row or "host_ms" not in other:
        return None
    if row["graph_ms"] and other["graph_ms"]:
        return other["graph_ms"][1] / row["graph_ms"][1]
    return best(other | {"graph_ms": None}) / best(row | {"graph_ms": None})


def print_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The rows, for people: a table a case."""
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(f"{row['op']}, {row['shape']}, {row['dtype']}", []).append(row)
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
            "of\nroof",
        )
        for heading in (*headings, "err.\nratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        by_key = {(row["mode"], row["provider"]): row for row in same}
        for row in same:
            if "failed" in row:
                table.add_row(row["mode"], row["provider"], "failed", style="bold red")
            else:
                over = [speedup(row, by_key.get((row["mode"], other))) for other in ("reference", "compiled")]
                table.add_row(row["mode"], row["provider"], *_numbers(row, over))
        console.print(table)
    console.print(
        "p50; host: to issue a call, on the CPU to run it; cold: on the device, L2 cache cold, with the gaps between kernels; "
        "graph: the same as a CUDA graph, without gaps; speedups over reference and compiled, and what follows, by graph where "
        "there is one; roof: the least bytes at this machine's copy rate, or the products at its matmul rate if they take "
        "longer, which caches can beat; error: over the reference's, at most 2"
    )


def _numbers(row: Mapping[str, Any], over: Sequence[float | None]) -> Iterator[str]:
    for kind in ("host_ms", "gpu_cold_ms", "graph_ms"):
        yield "-" if row[kind] is None else f"{row[kind][1]:.3g}"
    for times_over in over:
        yield "-" if times_over is None else f"{times_over:.2f}"
    yield "-" if row["peak_extra_mb"] is None else f"{row['peak_extra_mb']:.0f}"
    yield f"{row['gbps']:.3g}"
    yield f"{row['tflops']:.3g}" if row["flops"] else "-"
    yield f"{row['roof_pct']:.0f}%"
    yield f"{row['error'] / row['error_reference']:.2f}" if row["error_reference"] else "0"

"""What more work costs: time and memory of STG-CMA as frames, the image or the clips of a step become more.

One of them grows at a time, from the model of the presets: 10 frames, 224 pixels, one clip. At the cheapest point the outputs
and gradients of all implementations are compared; after that each is measured alone. Points come in rising order of tokens, and
an implementation's axis ends where its memory or the time of the command does not suffice, which its row then says.

Exponents are least squares fits of log time and of log memory over log tokens of a step, both streams: frames and clips are
proportional to them, the image goes in with its square. Memory is what a step takes beyond what stays allocated between steps,
weights and optimizer state.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    DTYPES,
    add_device,
    add_json,
    add_model,
    chosen_device,
    json_file,
    progress_bar,
    quantiles,
    refuse_graph,
    save,
)
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich import box
from rich.console import Console
from rich.table import Table
from throughput import IMPLEMENTATIONS, PHASES, DisagreementError, Race

from stgcma_fast.config import ModelConfig, SwinConfig, preset

KEYS = ("arch", "adapters", "axis", "value", "dtype", "phase", "impl", "device")
EXPONENT_KEYS = tuple(key for key in KEYS if key != "value")
# Of the sizes of images a backbone has those that it allows: Swin with windows of 7 only 224 and 448.
AXES = {"frames": (5, 10, 20, 40), "image": tuple(range(112, 449, 56)), "batch": (1, 2, 4, 8, 16, 32)}
CUDA_WARMUP, CUDA_STEPS, CPU_STEPS = 3, 10, 2
# Of what memory is free so much may be asked for: what is expected is an extrapolation.
USABLE = 0.8
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")


@dataclass(frozen=True)
class Point:
    """A model and a number of clips, and where they stand: on one axis, or as the common point on all."""

    config: ModelConfig
    batch_size: int
    axes: tuple[str, ...]

    @property
    def values(self) -> dict[str, int]:
        """Where it stands on each axis."""
        return {"frames": self.config.num_frames, "image": self.config.backbone.image_size, "batch": self.batch_size}

    @property
    def tokens(self) -> int:
        """Tokens of a step where they enter the first block, of both streams."""
        backbone = self.config.backbone
        frame = (
            2 * backbone.resolution(0) ** 2
            if isinstance(backbone, SwinConfig)
            else backbone.visual_tokens + backbone.audio_tokens
        )
        return self.batch_size * self.config.num_frames * frame


def points(config: ModelConfig) -> list[Point]:
    """All points around a configuration, in rising order of tokens."""
    axes_of: dict[tuple[ModelConfig, int], list[str]] = defaultdict(list)
    for axis, values in AXES.items():
        for value in values:
            changed, batch_size = config, 1
            if axis == "frames":
                changed = dataclasses.replace(config, num_frames=value)
            elif axis == "batch":
                batch_size = value
            else:
                try:
                    changed = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, image_size=value))
                except ValueError:  # not a size of this backbone
                    continue
            axes_of[changed, batch_size].append(axis)
    return sorted((Point(*key, tuple(axes)) for key, axes in axes_of.items()), key=lambda point: point.tokens)


def free_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def extrapolated(known: Sequence[tuple[int, float]], tokens: int, largest: float) -> float:
    """What to expect at a number of tokens, from one or more (tokens, value) in rising order.

    The last two set the exponent, kept between 1 and ``largest``, which is taken where there is only one.
    """
    exponent = largest
    if len(known) > 1:
        exponent = min(max(slope(known[-2:]) or 1.0, 1.0), largest)
    return known[-1][1] * (tokens / known[-1][0]) ** exponent


def slope(known: Sequence[tuple[int, float]]) -> float | None:
    """The exponent of a power law through (tokens, value), by least squares of the logarithms; None below two points."""
    known = [(x, y) for x, y in known if y > 0]
    if len({x for x, _ in known}) < 2:
        return None
    x, y = np.log(np.array(known, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


class Scaling:
    """The measurements of a command.

    Args:
        impls: names in `IMPLEMENTATIONS`.
        dtype: float32, or a lower precision for autocast.
        device: "cpu" or "cuda".
        steps: timed steps of each.
        seconds: what all may take together.
        console: where progress goes.
    """

    def __init__(
        self, impls: Sequence[str], dtype: torch.dtype, device: str, steps: int, seconds: float, console: Console
    ) -> None:
        self.end = time.perf_counter() + seconds
        self.impls, self.dtype, self.device, self.steps, self.console = impls, dtype, device, steps, console
        self.rows: list[dict[str, Any]] = []

    def race(self, point: Point, impls: Sequence[str]) -> Race:
        return Race(point.config, impls, PHASES, point.batch_size, [self.dtype], self.device, self.steps, self.console)

    def check(self, point: Point) -> None:
        """Compare outputs and gradients of all implementations.

        Raises:
            DisagreementError: one is further from the reference than the yardstick allows.
        """
        torch.backends.cudnn.allow_tf32 = False  # the reference in float32 is the yardstick
        race = self.race(point, self.impls)
        names = [("reference", dtype) for dtype in dict.fromkeys((torch.float32, self.dtype))]
        names += [(name, self.dtype) for name in self.impls if name != "reference"]
        contenders = []
        for name, dtype in names:
            contenders.append(race.build(name, dtype, contenders[0] if contenders else None))
        with progress_bar(self.console) as progress:
            for phase in PHASES:
                race.check(contenders, phase, progress)
        del race, contenders
        self.release()

    def obstacle(self, point: Point, impl: str, phase: str) -> str | None:
        """Why not to measure a phase of an implementation at a point, seen from earlier points of its axes; None: nothing."""
        rows = [row for row in self.rows if row["axis"] in point.axes and (row["impl"], row["phase"]) == (impl, phase)]
        ended = next((row["stopped"] for row in rows if row["stopped"]), None)
        if ended or not rows:
            return ended
        # Clips know nothing of one another; nothing grows faster than pairs of tokens.
        largest = 1 if point.axes == ("batch",) else 2
        seconds = extrapolated([(row["tokens"], row["p50_ms"] / 1e3) for row in rows], point.tokens, largest)
        seconds *= 1 + self.warmup(impl) + self.steps
        left = max(self.end - time.perf_counter(), 0)
        if seconds > left:
            return f"time: about {seconds:.0f} s would be needed, {left:.0f} s are left"
        if self.device == "cpu" and rows[-1]["work_mb"] is not None:
            held = rows[-1]["peak_mb"] - rows[-1]["work_mb"]
            work = extrapolated([(row["tokens"], row["work_mb"]) for row in rows], point.tokens, largest)
            needed, free = (held + work) / 1e3, free_memory() / 1e9
            if needed > USABLE * free:
                return f"memory: about {needed:.1f} GB would be needed, {free:.1f} GB are free"
        return None

    def warmup(self, impl: str) -> int:
        """Steps before the timed ones. On the CPU the step that memory is measured in does, but for what is compiled."""
        return CUDA_WARMUP if self.device == "cuda" else int(impl.endswith("compiled"))

    def measure(self, point: Point, impl: str, phases: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Time and memory of one implementation at one point.

        Returns:
            Measurements by phase. Where an allocation fails, "stopped" of that phase and those after it says so.
        """
        measured = {}
        try:
            race = self.race(point, [impl])
            contender = race.build(impl, self.dtype, None)
            for phase in phases:
                race.measured(contender, phase)
                for seed in range(self.warmup(impl)):
                    race.step(contender, phase, seed)
                times = [race.step(contender, phase, seed) for seed in range(self.steps)]
                measured[phase] = numbers(point, times, contender.peak.get(phase), contender.held)
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            reason = f"memory: {str(error).splitlines()[0]}"
            for phase in phases[len(measured) :]:
                measured[phase] = numbers(point, None, None, None) | {"stopped": reason}
        return measured

    def add(self, point: Point, impl: str) -> list[dict[str, Any]]:
        """Measure an implementation at a point, where nothing is in the way.

        Returns:
            The new rows: one for each phase and each axis that had not ended.
        """
        obstacles = {phase: self.obstacle(point, impl, phase) for phase in PHASES}
        phases = [phase for phase in PHASES if obstacles[phase] is None]
        measured = self.measure(point, impl, phases) if phases else {}
        self.release()
        rows = []
        for phase, obstacle in obstacles.items():
            found = measured.get(phase) or numbers(point, None, None, None) | {"stopped": obstacle}
            for axis in point.axes:
                row = {"axis": axis, "value": point.values[axis], "phase": phase, "impl": impl}
                ended = any(
                    old["stopped"] and all(old[key] == row[key] for key in ("axis", "phase", "impl")) for old in self.rows
                )
                if not ended:
                    rows.append(row | found)
        self.rows += rows
        return rows

    def release(self) -> None:
        """Free the last models, and what was compiled for their sizes: the next ones need the room."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        if any(impl.endswith("compiled") for impl in self.impls):
            torch.compiler.reset()


def numbers(point: Point, times: Sequence[float] | None, peak: int | None, held: int | None) -> dict[str, Any]:
    """The measurements of a row: seconds of each step, the peak of bytes, and those held between steps."""
    low, middle, high = (1e3 * x for x in quantiles(times)) if times else (None, None, None)
    work = None if peak is None else (peak - held) / 1e6
    return {
        "tokens": point.tokens,
        "p20_ms": low,
        "p50_ms": middle,
        "p80_ms": high,
        "rounds": len(times) if times else 0,
        "ms_per_clip": middle / point.batch_size if times else None,
        "peak_mb": None if peak is None else peak / 1e6,
        "work_mb": work,
        "work_mb_per_clip": None if work is None else work / point.batch_size,
        "stopped": None,
    }


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and memory over tokens, of each axis, phase and implementation; None below two points."""
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in EXPONENT_KEYS) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in EXPONENT_KEYS) == key]
        fits = {
            f"{name}_exponent": slope([(row["tokens"], row[field]) for row in own if row[field] is not None])
            for name, field in (("time", "p50_ms"), ("memory", "work_mb"))
        }
        measured = [row["value"] for row in own if row["stopped"] is None]
        found.append(dict(zip(EXPONENT_KEYS, key, strict=True)) | fits | {"values": measured})
    return found


def plot(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], folder: Path, title: str) -> list[Path]:
    """One figure an axis: time and memory of a step, in double logarithmic scales. Returns the files."""
    from matplotlib.figure import Figure

    files = []
    for axis in AXES:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, field, name, unit in zip(
            panels, ("p50_ms", "work_mb"), ("time", "memory"), ("ms a step", "MB a step, beyond what is held"), strict=True
        ):
            for fit in (fit for fit in fits if fit["axis"] == axis):
                own = [row for row in rows if (row["axis"], row["phase"], row["impl"]) == (axis, fit["phase"], fit["impl"])]
                own = [row for row in own if row[field] is not None]
                exponent = fit[f"{name}_exponent"]
                panel.loglog(
                    [row["tokens"] for row in own],
                    [row[field] for row in own],
                    marker="o",
                    color=f"C{list(IMPLEMENTATIONS).index(fit['impl'])}",
                    linestyle="-" if fit["phase"] == "infer" else "--",
                    label=f"{fit['impl']} {fit['phase']}" + ("" if exponent is None else f", exponent {exponent:.2f}"),
                )
            ticks = {row["tokens"]: row["value"] for row in rows if row["axis"] == axis}
            panel.set_xticks([*ticks], [*map(str, ticks.values())])
            panel.minorticks_off()
            panel.set(xlabel=f"{axis} (spaced by tokens)", ylabel=unit)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="small")
        figure.suptitle(title)
        files.append(folder / f"scaling_{axis}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def print_tables(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """The measurements and the exponents, for people."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("axis", "phase", "impl", "value"):
        table.add_column(name, no_wrap=True)
    for heading in ("ms\na clip", "peak\nMB", "work MB\na clip"):
        table.add_column(heading, justify="right")
    for row in rows:
        fields = ("ms_per_clip", "peak_mb", "work_mb_per_clip")
        cells = ["-" if row[field] is None else f"{row[field]:.5g}" for field in fields]
        table.add_row(row["axis"], row["phase"], row["impl"], str(row["value"]), *cells)
    console.print(table)
    for row in rows:
        if row["stopped"]:
            console.print(f"{row['axis']} {row['value']}, {row['phase']}, {row['impl']}: stopped, {row['stopped']}")
    table = Table(title="exponents over tokens", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("axis", "phase", "impl", "time", "memory", "fitted through"):
        table.add_column(name, no_wrap=True)
    for fit in fits:
        cells = ["-" if fit[field] is None else f"{fit[field]:.2f}" for field in ("time_exponent", "memory_exponent")]
        table.add_row(fit["axis"], fit["phase"], fit["impl"], *cells, " ".join(map(str, fit["values"])))
    console.print(table)
    console.print("peak: weights included; work, and the memory of the exponents: beyond weights and optimizer state")


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="scaling.py", description=__doc__)
    add_model(p)
    p.add_argument(
        "--impl",
        choices=tuple(IMPLEMENTATIONS),
        nargs="+",
        default=["reference", "fast"],
        help="what to measure, as in throughput.py",
    )
    p.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default=None,
        help="below float32, autocast is used (default: float32 on the CPU, bfloat16 on CUDA)",
    )
    add_device(p)
    p.add_argument(
        "--steps", type=PositiveInt, default=None, help=f"timed steps (default: {CUDA_STEPS} on CUDA, {CPU_STEPS} on the CPU)"
    )
    p.add_argument(
        "--seconds", type=PositiveFloat, default=600.0, help="begin nothing that, by the earlier points, would end after this"
    )
    p.add_argument(
        "--plots", type=Path, metavar="FOLDER", default=None, help="write a figure for each axis here; made if missing"
    )
    add_json(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    device = chosen_device(p, args.device)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    impls = list(dict.fromkeys(args.impl))
    refuse_graph(p, impls, device, [dtype])
    file = json_file(p, args.json, device)
    if file is not None:
        try:
            save(file, "scaling", [], KEYS, device)
        except ValueError as error:  # of another commit: better now than after the first measurement
            p.error(f"--json: {error}")
    if args.plots is not None:
        args.plots.mkdir(parents=True, exist_ok=True)
    console = Console()
    steps = args.steps or (CUDA_STEPS if device == "cuda" else CPU_STEPS)
    labels = {"arch": args.arch, "adapters": args.adapters, "dtype": dtype, "device": device}
    scaling = Scaling(impls, DTYPES[dtype], device, steps, args.seconds, console)
    todo = points(preset(args.arch, args.adapters))
    try:
        scaling.check(todo[0])
    except DisagreementError as error:
        console.print(f"nothing is measured, an implementation disagrees with the reference: {error}", style="bold red")
        return 1
    with progress_bar(console) as progress:
        task = progress.add_task("measure", total=len(todo) * len(impls))
        for point in todo:
            for impl in impls:
                rows = [row | labels for row in scaling.add(point, impl)]
                if file is not None:
                    save(file, "scaling", rows, KEYS, device)
                    fits = exponents([row | labels for row in scaling.rows])
                    save(file, "scaling_exponents", fits, EXPONENT_KEYS, device)
                progress.advance(task)
    rows = [row | labels for row in scaling.rows]
    rows.sort(key=lambda row: ([*AXES].index(row["axis"]), PHASES.index(row["phase"]), impls.index(row["impl"]), row["value"]))
    fits = exponents(rows)
    title = f"{args.arch} {args.adapters}, {dtype} on {device}"
    print_tables(rows, fits, title, console)
    if args.plots is not None:
        for path in plot(rows, fits, args.plots, title):
            console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

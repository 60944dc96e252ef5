"""How fast `stgcma-fast fit` trains AVE, data and all, beside the same model's train steps alone.

Module, data, trainer, callbacks and logs are those of the command, with a backbone of random weights and synthetic clips, H.264
in mp4. Steps of a warm-up, with what is compiled, are not counted; evaluation and checkpoints lie outside of what is measured.
fast and fast_graph are benchmarks/throughput.py's train steps on one batch that is there already.

Waiting is the share of the time in which the trainer asked for a batch and had none yet, as the host sees it. GPU busy is the
mean of what nvidia-smi reports as utilization: the share of the time in which any kernel ran at all.
"""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import throughput
import torch
from harness import (
    DTYPES,
    Meter,
    add_device,
    add_json,
    add_model,
    chosen_device,
    json_file,
    quantiles,
    save,
)
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.profilers import Profiler
from rich import box
from rich.console import Console
from rich.table import Table

from stgcma_fast.data.synth import synthesize
from stgcma_fast.tasks import training

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
KEYS = ("arch", "adapters", "task", "batch_size", "dtype", "device", "impl")
# Steps before the clock starts. Those of a GPU also use up what workers read ahead while the model was compiled.
WARMUP = {"cpu": 1, "cuda": 50}
# The epoch must not end before the clock stops.
MOST_CLIPS_PER_SECOND = 2000
# Between two looks at the GPU, in seconds.
INTERVAL = 0.5


class StopFitError(Exception):
    """Enough steps were measured."""


class Waiting(Profiler):
    """Adds up the seconds in which the trainer waited for its next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self._begun = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._begun = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._begun


class Busy(threading.Thread):
    """Looks at the GPU's utilization until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.shares: list[float] = []
        self._stopped = threading.Event()
        self._query = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
        self._query += (f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",)

    def run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            # Without the program, or on a part of a GPU, which has no utilization, nothing is known.
            with suppress(OSError, subprocess.CalledProcessError, ValueError):
                self.shares.append(int(subprocess.run(self._query, check=True, capture_output=True, text=True).stdout) / 100)

    def stop(self) -> float | None:
        """The mean; None where nothing is known."""
        self._stopped.set()
        self.join()
        return sum(self.shares) / len(self.shares) if self.shares else None


class Clock(L.Callback):
    """Times a training's steps for some seconds behind a warm-up, then ends it.

    Args:
        seconds: for how long.
        device: "cpu" or "cuda".
    """

    def __init__(self, seconds: float, device: str) -> None:
        self.seconds, self.device, self.waiting = seconds, device, Waiting()
        self.meter = Meter(device)
        self.ends: list[Any] = []  # of steps: times, on a GPU events of its stream
        self.measured: dict[str, Any] = {}
        self._busy: Busy | None = None
        self._begun = 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._fit = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if index + 1 < WARMUP[self.device]:
            return
        if not self.ends:
            self._begin()
            return
        self._mark()
        if time.perf_counter() - self._begun >= self.seconds:
            self._end(trainer)
            raise StopFitError

    def _mark(self) -> None:
        if self.device == "cpu":
            self.ends.append(time.perf_counter())
        else:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()

    def _begin(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._busy = Busy()
            self._busy.start()
        if self.meter.known:
            self.meter.reset()
        self.waiting.seconds = 0.0
        self._begun = time.perf_counter()
        self._mark()

    def _end(self, trainer: L.Trainer) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds, steps = time.perf_counter() - self._begun, len(self.ends) - 1
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        times = [b - a for a, b in pairs] if self.device == "cpu" else [a.elapsed_time(b) / 1e3 for a, b in pairs]
        self.measured = {
            **{f"p{q}_ms": 1e3 * value for q, value in zip((20, 50, 80), quantiles(times), strict=True)},
            "rounds": steps,
            "clips_per_s": steps * trainer.datamodule.batch_size / seconds,
            "peak_mb": self.meter.peak() / 1e6 if self.meter.known else None,
            "waiting": self.waiting.seconds / seconds,
            "gpu_busy": self._busy.stop() if self._busy is not None else None,
            "warmup_s": self._begun - self._fit,
            "backend": trainer.train_dataloader.backend,
        }


def make_data(root: Path, clips: int, items: int) -> None:
    """AVE's layout with ``clips`` clips for training, each of them so often in the split that it has ``items`` at least."""
    synthesize("ave", root, max(5, math.ceil(clips * 5 / 3)))
    split = root / "trainSet.txt"
    lines = split.read_text().splitlines(keepends=True)
    split.write_text("".join(lines * math.ceil(items / len(lines))))


def fit(
    arch: str, adapters: str, batch_size: int, dtype: str, device: str, seconds: float, workers: int | None, root: Path
) -> dict[str, Any]:
    """What `Clock` measures of the command's training.

    Raises:
        RuntimeError: the training ended before the clock did.
    """
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "model.task": "ave",
            "model.arch": arch,
            "model.adapters": adapters,
            "model.pretrained": "random",
            "data.root": root,
            "data.batch_size": batch_size,
            "trainer.accelerator": {"cuda": "gpu"}.get(device, device),
            "trainer.precision": PRECISIONS[dtype],
            "trainer.max_epochs": 2,
            # What an evaluation compiles is not wanted, nor checkpoints with the whole backbone in them, as it is random.
            "trainer.num_sanity_val_steps": 0,
            "trainer.default_root_dir": folder,
            "save_every": 10**9,
        }
        if workers is not None:
            options["data.workers"] = workers
        cli = training._CLI("fit", [f"--{name}={value}" for name, value in options.items()])
        clock = Clock(seconds, device)
        cli.trainer.callbacks.append(clock)
        cli.trainer.profiler = clock.waiting
        with suppress(StopFitError):
            cli.trainer.fit(cli.model, cli.datamodule)
        if not clock.measured:
            raise RuntimeError(f"the training ended before its {seconds} s: did it do {MOST_CLIPS_PER_SECOND} clips/s?")
        return clock.measured


def steps_alone(arch: str, adapters: str, batch_size: int, dtype: str, device: str, console: Console) -> list[dict[str, Any]]:
    """Rows of benchmarks/throughput.py for the train steps of what runs here.

    Raises:
        DisagreementError: see `throughput.Race`.
    """
    impls = ["fast"] if device == "cpu" or dtype == "float16" else ["fast", "fast_graph"]
    config = throughput.preset(arch, adapters, task="ave")
    steps = "auto" if device == "cuda" else throughput.CPU_ROUNDS
    (rows,) = throughput.Race(config, impls, ["train"], batch_size, [DTYPES[dtype]], device, steps, console).run()
    return rows


def release() -> None:
    """Give back what a compiled model holds."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_table(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """The measurements, for people."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("batch", "dtype", "impl"):
        table.add_column(name, no_wrap=True)
    headings = ("p20\nms", "p50\nms", "p80\nms", "clips\n/s", "fit over\nthis", "waiting", "GPU\nbusy", "peak\nMB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    fits = {(row["batch_size"], row["dtype"]): row for row in rows if row["impl"] == "fit"}
    for row in rows:
        ratio = fits[row["batch_size"], row["dtype"]]["clips_per_s"] / row["clips_per_s"]
        numbers = [f"{row[key]:.4g}" for key in ("p20_ms", "p50_ms", "p80_ms", "clips_per_s")]
        shares = ["-" if row.get(key) is None else f"{row[key]:.0%}" for key in ("waiting", "gpu_busy")]
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        table.add_row(str(row["batch_size"]), row["dtype"], row["impl"], *numbers, f"{ratio:.2f}", *shares, peak)
    console.print(table)
    for (batch, dtype), row in fits.items():
        console.print(
            f"batch {batch} {dtype}: {row['rounds']} steps, after {row['warmup_s']:.0f} s of setting up and warm-up; decoding: "
            f"{row['backend']}"
        )
    console.print("weights are random: what is trained here is worth nothing but its time")


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="fit.py", description=__doc__)
    add_model(p)
    p.add_argument("--batch-size", type=PositiveInt, nargs="+", default=[1, 8], help="clips in a step")
    p.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="default: float32 on the CPU, bfloat16 on CUDA")
    p.add_argument("--seconds", type=PositiveFloat, default=20.0, help="of training that are measured, of each batch size")
    p.add_argument("--clips", type=PositiveInt, default=60, help="different ones of the synthetic set")
    p.add_argument("--workers", type=PositiveInt, default=None, help="as of stgcma-fast fit")
    add_device(p)
    add_json(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    device = chosen_device(p, args.device)
    file = json_file(p, args.json, device)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    console = Console()
    labels = {"arch": args.arch, "adapters": args.adapters, "task": "ave", "dtype": dtype, "device": device}
    rows: list[dict[str, Any]] = []

    def keep(measured: Sequence[dict[str, Any]], batch_size: int) -> None:
        rows.extend(row | labels | {"batch_size": batch_size} for row in measured)
        if file is not None:
            save(file, "fit", rows, KEYS, device)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root, args.clips, math.ceil(args.seconds * MOST_CLIPS_PER_SECOND))
        for batch_size in dict.fromkeys(args.batch_size):
            what = (args.arch, args.adapters, batch_size, dtype, device)
            # First, for it is also the check, without which no speed is worth keeping.
            try:
                alone = steps_alone(*what, console)
            except throughput.DisagreementError as error:
                console.print(f"no speed is reported, one implementation disagrees with the reference: {error}", style="red")
                return 1
            kept = ("impl", "p20_ms", "p50_ms", "p80_ms", "rounds", "clips_per_s", "peak_mb")
            keep([{key: row[key] for key in kept} for row in alone], batch_size)
            release()
            keep([{"impl": "fit"} | fit(*what, args.seconds, args.workers, root)], batch_size)
            release()
    print_table(rows, f"{args.arch} {args.adapters}, ave, on {device}", console)
    return 0


if __name__ == "__main__":
    sys.exit(main())

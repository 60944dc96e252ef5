"""End-to-end speed and memory of STG-CMA: forward, and a whole train step, of each implementation.

All get the same weights and inputs. Their outputs and gradients are compared first: where they disagree no speed is printed.
Then they run in turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stgcma_fast as sf
from stgcma_fast import report
from stgcma_fast.config import ADAPTER_SIZES, BACKBONES, ModelConfig, Task, preset
from stgcma_fast.ops.linear import linear

# Each takes a configuration and returns the model and what to call.
IMPLEMENTATIONS: dict[str, Callable[[ModelConfig], tuple[nn.Module, Callable]]] = {
    "reference": lambda config: (model := sf.reference.ReferenceSTGCMA(config), model),
    "compiled": lambda config: (model := sf.reference.ReferenceSTGCMA(config), torch.compile(model)),
    "fast": lambda config: (model := sf.FastSTGCMA(config), model),
}
PHASES = ("infer", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On the CPU the whole command must end within four minutes: rounds are run while they fit into this.
CPU_SECONDS = 230
CPU_ROUNDS = 5
CUDA_WARMUP, CUDA_ROUNDS = 10, 50


class DisagreementError(Exception):
    """Outputs or gradients of an implementation are further from the reference than the yardstick allows."""


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


@dataclass
class Contender:
    """An implementation in the race."""

    name: str
    module: nn.Module
    call: Callable
    held: int  # bytes that stay allocated on its behalf between its steps
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None
    times: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    first_calls: float = 0.0
    max_abs_err: float = 0.0

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def fill(model: nn.Module) -> None:
    """Weights with which every part of the model matters: at their starting values gates and adapters hide each other."""
    for key, t in model.state_dict().items():
        if not t.is_floating_point() or key.endswith("attn_mask"):
            continue
        x = torch.randn(t.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        norm = t.ndim == 1 and ("ln_" in key or "norm" in key) and key.endswith("weight")
        if norm:
            x = 1 + 0.1 * x
        elif "gate_" in key:
            x = 0.5 + 0.1 * x
        elif t.ndim >= 2 and "bias_table" not in key and "embedding" not in key:
            x = x * t[0].numel() ** -0.5
        else:
            x = 0.1 * x
        t.copy_(x)


def make_inputs(config: ModelConfig, batch_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Audio, video and soft targets."""
    size, frames = config.backbone.image_size, config.num_frames
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(batch_size, 3, frames, size, size, generator=generator)
    audio = torch.randn(batch_size, frames, *config.backbone.audio_shape, generator=generator)
    target = (3 * torch.randn(batch_size * frames, config.num_classes, generator=generator)).softmax(-1)
    return audio.to(device), video.to(device), target.to(device)


def count_flops(config: ModelConfig, batch_size: int) -> dict[str, int]:
    """Floating-point operations of the reference's products; computed on shapes alone."""
    with torch.device("meta"):
        model = sf.reference.ReferenceSTGCMA(config)
    audio, video, _ = make_inputs(config, batch_size, "meta")
    flops = {}
    for phase in PHASES:
        with FlopCounterMode(display=False) as counter:
            logits = model(audio, video)
            if phase == "train":
                logits.sum().backward()
        flops[phase] = counter.get_total_flops()
    return flops


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large square product, by PyTorch's own route or by the one `stgcma_fast` takes."""
    best = 0.0
    for size in (4096, 8192, 16384) if device == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for product in (torch.matmul, linear):
            for _ in range(3):
                best = max(best, 2 * size**3 / timed(lambda product=product, a=a, b=b: product(a, b), device)[0])
    return best


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


def verify(what: str, got: Tensor | None, hi: Tensor, low: Tensor | None, dtype: torch.dtype, gradient: bool) -> None:
    """Hold a tensor against the reference's, ``hi``; in low precision also against its own error there, ``low``.

    Raises:
        DisagreementError: further off than the yardstick allows.
    """
    size = (lambda x: x.norm()) if gradient else (lambda x: x.abs().max())
    error = size((torch.zeros_like(hi) if got is None else got.float()) - hi).item()
    if low is None:
        allowed = (1e-3 * hi.norm() if gradient else 1e-4 * hi.std()).item()
    else:
        allowed = ((3 if gradient else 2) * size(low.float() - hi) + torch.finfo(dtype).eps * size(hi)).item()
    if not error <= allowed:
        raise DisagreementError(f"{what}: error {error:.3g}, allowed {allowed:.3g}")


class Race:
    """The implementations, their common inputs, and what is measured of them.

    Args:
        config: the model.
        impls: names in `IMPLEMENTATIONS`. The reference is always built, as the yardstick, but timed only if named.
        phases: "infer", "train" or both.
        batch_size: clips.
        dtype: float32, or a lower precision for autocast.
        device: "cpu" or "cuda".
        steps: timed rounds, or "auto".
        console: where progress and notes go.
    """

    def __init__(
        self,
        config: ModelConfig,
        impls: Sequence[str],
        phases: Sequence[str],
        batch_size: int,
        dtype: torch.dtype,
        device: str,
        steps: int | Literal["auto"],
        console: Console,
    ) -> None:
        self.start = time.perf_counter()
        self.config, self.impls, self.batch_size = config, impls, batch_size
        self.phases = [phase for phase in PHASES if phase in phases]
        self.dtype, self.device, self.steps, self.console = dtype, device, steps, console
        self.low_precision = dtype != torch.float32
        self.audio, self.video, self.target = make_inputs(config, batch_size, device)
        self.meter = Meter(device)

    def autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=enabled)

    def build(self, name: str, state: dict[str, Tensor] | None) -> Contender:
        """An implementation with the weights ``state``; without, the weights of `fill`."""
        before = self.meter.used()
        with torch.device(self.device):
            module, call = IMPLEMENTATIONS[name](self.config)
        if state is None:
            fill(module)
        else:
            module.load_state_dict(state)
        if self.low_precision and isinstance(module, sf.FastSTGCMA):
            module.cast_frozen(self.dtype)
        contender = Contender(name, module, call, self.meter.used() - before)
        # As published: Adam with L2, the same for all.
        parameters = [p for _, p in contender.named_trainable()]
        contender.optimizer = torch.optim.Adam(parameters, lr=5e-5, betas=(0.95, 0.999), weight_decay=5e-7)
        contender.scaler = torch.amp.GradScaler(self.device, enabled=self.dtype == torch.float16)
        return contender

    def infer(self, contender: Contender, autocast: bool = True) -> Tensor:
        """One forward."""
        with torch.inference_mode(), self.autocast(autocast and self.low_precision):
            return contender.call(self.audio, self.video)

    def gradients(self, contender: Contender, autocast: bool = True) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Logits and every trainable gradient in eval mode: without stochastic depth and dropout."""
        with self.autocast(autocast and self.low_precision):
            logits = contender.call(self.audio, self.video)
            loss = F.cross_entropy(logits, self.target)
        scale = contender.scaler.get_scale()
        (loss * scale).backward()
        gradients = {name: None if p.grad is None else p.grad / scale for name, p in contender.named_trainable()}
        contender.optimizer.zero_grad()
        if self.low_precision:
            # One rounding error measures nothing: the reference's own may be zero by luck. All gates together do.
            for kind in ("gate_v", "gate_a"):
                gates = [gradients.pop(name) for name in [*gradients] if name.endswith(kind)]
                gradients[f"every {kind}"] = torch.cat([g for g in gates if g is not None])
        return logits.detach(), gradients

    def train(self, contender: Contender) -> None:
        """One whole step: forward, loss, backward, optimizer."""
        with self.autocast(self.low_precision):
            loss = F.cross_entropy(contender.call(self.audio, self.video), self.target)
        contender.scaler.scale(loss).backward()
        contender.scaler.step(contender.optimizer)
        contender.scaler.update()
        contender.optimizer.zero_grad()

    def prime(self, contender: Contender) -> None:
        """Let the optimizer take its memory by a step of rate zero, which leaves the weights as they are."""
        before = self.meter.used()
        (group,) = contender.optimizer.param_groups
        rate, group["lr"] = group["lr"], 0.0
        for _, parameter in contender.named_trainable():
            parameter.grad = torch.zeros_like(parameter)
        contender.optimizer.step()
        contender.optimizer.zero_grad()
        group["lr"] = rate
        contender.held += self.meter.used() - before

    def measured(self, contender: Contender, phase: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Logits and, in a train phase, gradients in eval mode; notes the peak of memory."""
        if phase == "train":
            self.prime(contender)
        contender.module.eval()
        run = self.gradients if phase == "train" else lambda c: (self.infer(c), {})
        if contender.name == "compiled":
            seconds, _ = timed(lambda: run(contender), self.device)  # compiles, which takes memory of its own
            contender.first_calls += seconds
        level = self.meter.used()
        if self.meter.known:
            self.meter.reset()
        result = run(contender)
        if self.meter.known:
            contender.peak[phase] = contender.held + self.meter.peak() - level
        return result

    def step(self, contender: Contender, phase: str, seed: int) -> float:
        """One step of a phase, in seconds."""
        contender.module.train(phase == "train")
        torch.manual_seed(seed)
        return timed(lambda: getattr(self, phase)(contender), self.device)[0]

    def check(self, contenders: list[Contender], phase: str, progress: Progress) -> None:
        """Compare each implementation with the first, the reference, as yet at equal weights, and measure their memory.

        On the CPU it is the warm-up, too.

        Raises:
            DisagreementError: an implementation is further off than the yardstick allows.
        """
        task = progress.add_task(f"{phase}: check", total=len(contenders))

        reference = contenders[0]
        hi, hi_gradients = self.measured(reference, phase)
        low, low_gradients = None, {}
        if self.low_precision:
            low, low_gradients = hi, hi_gradients
            hi, hi_gradients = (self.infer(reference, False), {}) if phase == "infer" else self.gradients(reference, False)
            reference.max_abs_err = max(reference.max_abs_err, (low.float() - hi).abs().max().item())
        progress.advance(task)
        for contender in contenders[1:]:
            logits, gradients = self.measured(contender, phase)
            verify(f"{contender.name}, {phase}, logits", logits, hi, low, self.dtype, False)
            for key, gradient in hi_gradients.items():
                if gradient is not None:
                    what = f"{contender.name}, gradient of {key}"
                    verify(what, gradients[key], gradient, low_gradients.get(key), self.dtype, True)
            contender.max_abs_err = max(contender.max_abs_err, (logits.float() - hi).abs().max().item())
            progress.advance(task)

    def rounds(self, phase: str, one_round: float) -> int:
        """How many rounds of a phase to time, given the seconds one takes."""
        if self.steps != "auto":
            return self.steps
        if self.device == "cuda":
            return CUDA_ROUNDS
        if phase != self.phases[-1]:
            return 2  # train steps take about eight times as long, and need what time is left
        left = self.start + CPU_SECONDS - time.perf_counter()
        return min(CPU_ROUNDS, math.floor(left / one_round))

    def race(self, contenders: list[Contender], phase: str, progress: Progress) -> None:
        """Warm up, then time a phase: the implementations take turns, in alternating order."""
        task = progress.add_task(f"{phase}: time", total=None)

        def one_round(number: int) -> dict[str, float]:
            seconds = {}
            for contender in contenders[:: -1 if number % 2 else 1]:
                seconds[contender.name] = self.step(contender, phase, number)
                progress.advance(task)
            return seconds

        # Forwards on the CPU were warmed up by the check; time is short if train steps are to follow.
        short = self.device == "cpu" and phase != self.phases[-1]
        warmup = [one_round(i) for i in range(CUDA_WARMUP if self.device == "cuda" else 0 if short else 1)]
        for contender in contenders if warmup else ():
            contender.first_calls += warmup[0][contender.name]
        total = self.rounds(phase, sum(warmup[-1].values()) if warmup else 0)
        progress.update(task, total=(len(warmup) + total) * len(contenders))
        # Without time for another round, what was meant to be the warm-up has to do.
        rounds = [one_round(i) for i in range(total)] or warmup[-1:]
        for contender in contenders:
            contender.times[phase] = [seconds[contender.name] for seconds in rounds]

    def run(self) -> list[dict[str, Any]]:
        """Check, then time.

        Returns:
            A row of measurements for each phase and implementation.

        Raises:
            DisagreementError: an implementation is further off than the yardstick allows.
        """
        # The float32 reference is the yardstick: no convolution may round its operands to TF32.
        torch.backends.cudnn.allow_tf32 = False
        with progress_bar(self.console) as progress:
            task = progress.add_task("build", total=len({"reference", *self.impls}))
            contenders: list[Contender] = []
            for name in ("reference", *(name for name in self.impls if name != "reference")):
                contenders.append(self.build(name, contenders[0].module.state_dict() if contenders else None))
                progress.advance(task)
            raced = [c for c in contenders if c.name in self.impls]
            for phase in self.phases:
                self.check(contenders, phase, progress)
                self.race(raced, phase, progress)
        contenders = raced
        for contender in contenders:
            if contender.name == "compiled":
                self.console.print(
                    f"compiled: first calls, with compilation, took {contender.first_calls:.0f} s; not in the table"
                )
        flops, machine = count_flops(self.config, self.batch_size), matmul_peak(self.device, self.dtype)
        self.console.print(
            f"fastest matrix product: {machine / 1e12:.3g} TFLOP/s; products of the reference, in TFLOP: "
            + ", ".join(f"{phase} {flops[phase] / 1e12:.3g}" for phase in self.phases)
            + "; timed rounds: "
            + ", ".join(f"{phase} {len(contenders[0].times[phase])}" for phase in self.phases)
        )
        rows = []
        for phase in self.phases:
            p50 = {c.name: statistics.median(c.times[phase]) for c in contenders}
            for c in contenders:
                p20, p80 = (
                    torch.tensor(c.times[phase], dtype=torch.float64).quantile(torch.tensor([0.2, 0.8]).double()).tolist()
                )
                rows.append(
                    {
                        "impl": c.name,
                        "phase": phase,
                        "p20_ms": p20 * 1e3,
                        "p50_ms": p50[c.name] * 1e3,
                        "p80_ms": p80 * 1e3,
                        "clips_per_s": self.batch_size / p50[c.name],
                        "peak_mb": c.peak[phase] / 1e6 if phase in c.peak else None,
                        "speedup": p50["reference"] / p50[c.name] if "reference" in p50 else None,
                        "max_abs_err": c.max_abs_err,
                        "peak_share": flops[phase] / p50[c.name] / machine,
                    }
                )
        return rows


def _four(x: float) -> str:
    return f"{x:.4g}" if x < 1e4 else f"{x:.0f}"


# Measurement -> heading and text in the table.
COLUMNS = {
    "p20_ms": ("p20\nms", _four),
    "p50_ms": ("p50\nms", _four),
    "p80_ms": ("p80\nms", _four),
    "clips_per_s": ("clips\n/s", "{:.3g}".format),
    "peak_mb": ("peak\nMB", "{:.0f}".format),
    "speedup": ("speed-\nup", "{:.2f}".format),
    "max_abs_err": ("max\nerror", "{:.1e}".format),
    "peak_share": ("of\npeak", "{:.0%}".format),
}


def print_table(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """The measurements, for people."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("phase", "impl"):
        table.add_column(name, no_wrap=True)
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = ("-" if row[key] is None else text(row[key]) for key, (_, text) in COLUMNS.items())
        table.add_row(row["phase"], row["impl"], *numbers)
    console.print(table)
    console.print(
        "clips/s and speed-up by p50; speed-up over the reference; peak: most memory held, weights included; error: of the "
        "logits, against the reference in float32; of peak: FLOP/s of the reference's products over the fastest product's"
    )


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    described = ("git", "-C", root, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7")
    try:
        return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(device: str) -> dict[str, Any]:
    """Where and when something was measured, for its JSON."""
    return {
        "versions": report.versions() | {"device": report.device_name(device)},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def progress_bar(console: Console) -> Progress:
    """Description, bar, count and time of each task."""
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def check_folder(p: ArgumentParser, file: str | None) -> None:
    """End the command before any work is done if there is no folder for its ``--json`` file."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        p.error(f"--json: there is no folder {Path(file).absolute().parent}")


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="throughput.py", description=__doc__)
    p.add_argument("--arch", choices=tuple(BACKBONES), required=True, help="backbone")
    p.add_argument("--adapters", choices=ADAPTER_SIZES, default="base", help="size of the adapters")
    p.add_argument("--task", choices=get_args(Task), default="ave", help="task, which decides the head")
    p.add_argument("--batch-size", type=PositiveInt, default=1, help="clips in a step")
    p.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES), help="forward alone, or a whole train step")
    p.add_argument(
        "--impl",
        choices=tuple(IMPLEMENTATIONS),
        nargs="+",
        default=None,
        help="what to time: the model in plain PyTorch, the same under torch.compile, FastSTGCMA (default: all on CUDA; on the "
        "CPU all but compiled, whose compilation takes minutes)",
    )
    p.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="below float32, autocast is used; auto: float32 on the CPU, bfloat16 on CUDA",
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is a device")
    p.add_argument(
        "--steps",
        type=PositiveInt | Literal["auto"],
        default="auto",
        help=f"timed steps of each; auto: {CUDA_ROUNDS} on CUDA, as many as fit into four minutes on the CPU",
    )
    p.add_argument("--json", type=str, metavar="FILE", help="write the rows here; the folder must exist")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    check_folder(p, args.json)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch finds no CUDA device here")
    dtype = args.dtype if args.dtype != "auto" else {"cpu": "float32", "cuda": "bfloat16"}[device]
    console = Console()
    impls = args.impl
    if impls is None:
        impls = [name for name in IMPLEMENTATIONS if device == "cuda" or name != "compiled"]
        if device == "cpu":
            console.print(
                "compiled is left out: on the CPU its compilation takes minutes; --impl reference compiled fast adds it"
            )
    impls = list(dict.fromkeys(impls))
    config = preset(args.arch, args.adapters, task=args.task)
    labels = {"arch": args.arch, "adapters": args.adapters, "task": args.task, "batch_size": args.batch_size, "dtype": dtype}
    labels["device"] = device
    try:
        measured = Race(config, impls, args.phase, args.batch_size, DTYPES[dtype], device, args.steps, console).run()
    except DisagreementError as error:
        console.print(f"no speed is reported, an implementation disagrees with the reference: {error}", style="bold red")
        return 1
    source = origin(device)
    rows = [row | labels | source for row in measured]
    title = f"{args.arch} {args.adapters}, {args.task}, batch {args.batch_size}, {dtype} on {device}"
    print_table(rows, title, console)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

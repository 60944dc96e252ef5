"""End-to-end speed and memory of STG-CMA: forward, and a whole train step, of each implementation.

All get the same weights and inputs. Their outputs and gradients are compared first: of a phase in which they disagree no speed
is printed. Then they run in turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    Meter,
    add_device,
    add_json,
    add_model,
    chosen_device,
    json_file,
    matmul_peak,
    progress_bar,
    quantiles,
    refuse_graph,
    save,
    timed,
)
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stgcma_fast as sf
from stgcma_fast.config import ModelConfig, Task, preset
from stgcma_fast.heads.avqa import avqa_loss
from stgcma_fast.heads.avs import avs_loss
from stgcma_fast.ops.fp8 import fp8_refusals

# Each takes a configuration and returns the model and what to call.
IMPLEMENTATIONS: dict[str, Callable[[ModelConfig], tuple[nn.Module, Callable]]] = {
    "reference": lambda config: (model := sf.reference.ReferenceSTGCMA(config), model),
    "compiled": lambda config: (model := sf.reference.ReferenceSTGCMA(config), torch.compile(model)),
    "fast": lambda config: (model := sf.FastSTGCMA(config), model),
    "fast_compiled": lambda config: (model := sf.FastSTGCMA(config), torch.compile(model)),
    "fast_graph": lambda config: (model := sf.FastSTGCMA(config), model),
    "fast_fp8": lambda config: (model := sf.FastSTGCMA(config, precision="fp8-frozen"), model),
}
PHASES = ("infer", "train")
# On the CPU the whole command must end within four minutes: rounds are run while they fit into this.
CPU_SECONDS = 230
CPU_ROUNDS = 5
CUDA_WARMUP, CUDA_ROUNDS = 10, 50


class DisagreementError(Exception):
    """Outputs or gradients of an implementation are further from the reference than the yardstick allows."""


@dataclass
class Contender:
    """An implementation in the race."""

    name: str
    dtype: torch.dtype  # below float32, of autocast
    module: nn.Module
    call: Callable
    held: int  # bytes that stay allocated on its behalf between its steps
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None
    times: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    first_calls: float = 0.0
    max_abs_err: float = 0.0
    graphs: dict[str, torch.cuda.CUDAGraph] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"

    @property
    def low_precision(self) -> bool:
        return self.dtype != torch.float32

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


def fill(model: nn.Module) -> None:
    """Weights with which every part of the model matters: at their starting values gates and adapters hide each other."""
    for key, t in model.state_dict().items():
        if not t.is_floating_point() or key.endswith("attn_mask"):
            continue
        x = torch.randn(t.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        norm = t.ndim == 1 and ("ln_" in key or "norm" in key) and key.endswith("weight")
        if key.endswith("running_var"):
            x = 1 + 0.1 * x.abs()
        elif norm:
            x = 1 + 0.1 * x
        elif "gate_" in key:
            x = 0.5 + 0.1 * x
        elif t.ndim >= 2 and "bias_table" not in key and "embedding" not in key:
            x = x * t[0].numel() ** -0.5
        else:
            x = 0.1 * x
        t.copy_(x)


def make_inputs(config: ModelConfig, batch_size: int, device: str) -> tuple[tuple[Tensor, ...], Callable[[Any], Tensor]]:
    """What a call of the model takes, and the task's loss of what it returns."""
    size, frames = config.backbone.image_size, config.num_frames
    generator = torch.Generator().manual_seed(0)
    layout = (3, frames) if config.task == "ave" else (frames, 3)
    video = torch.randn(batch_size, *layout, size, size, generator=generator).to(device)
    audio = torch.randn(batch_size, frames, *config.backbone.audio_shape, generator=generator).to(device)
    if config.task == "ave":
        target = (3 * torch.randn(batch_size * frames, config.num_classes, generator=generator)).softmax(-1).to(device)
        return (audio, video), lambda logits: F.cross_entropy(logits, target)
    if config.task == "avs":
        mask = (torch.rand(batch_size, 1, 1, size, size, generator=generator) > 0.5).to(device)
        return (audio, video), lambda out: avs_loss(out[0], mask)
    negative = torch.randn(batch_size, frames, 3, size, size, generator=generator).to(device)
    question = torch.randint(config.vocabulary, (batch_size, 14), generator=generator).to(device)
    label = torch.randint(config.num_classes, (batch_size,), generator=generator).to(device)
    return (audio, video, negative, question), lambda out: avqa_loss(*out, label)


def scores(out: Tensor | tuple) -> Tensor:
    """Of what a model returns, what its predictions are made of."""
    return out if isinstance(out, Tensor) else out[0]


def count_flops(config: ModelConfig, batch_size: int) -> dict[str, int]:
    """Floating-point operations of the reference's products; computed on shapes alone."""
    with torch.device("meta"):
        model = sf.reference.ReferenceSTGCMA(config)
    arguments, loss_of = make_inputs(config, batch_size, "meta")
    flops = {}
    for phase in PHASES:
        with FlopCounterMode(display=False) as counter:
            loss = loss_of(model(*arguments))
            if phase == "train":
                loss.backward()
        flops[phase] = counter.get_total_flops()
    return flops


def verify(
    what: str, got: Tensor | None, hi: Tensor, low: Tensor | None, dtype: torch.dtype, gradient: bool, float8: bool = False
) -> None:
    """Hold a tensor against the reference's, ``hi``; in low precision also against its own error there, ``low``.

    ``float8``: products' factors were rounded to 4 bits where bfloat16 has 8, which costs 16 times as much.

    Raises:
        DisagreementError: further off than the yardstick allows.
    """
    size = (lambda x: x.norm()) if gradient else (lambda x: x.abs().max())
    error = size((torch.zeros_like(hi) if got is None else got.float()) - hi).item()
    if low is None:
        allowed = (1e-3 * hi.norm() if gradient else 1e-4 * hi.std()).item()
    else:
        factor = (3 if gradient else 2) * (16 if float8 else 1)
        allowed = (factor * size(low.float() - hi) + torch.finfo(dtype).eps * size(hi)).item()
    if not error <= allowed:
        raise DisagreementError(f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def pooled_gates(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The gates' gradients as one: a single rounding error measures nothing, the reference's own may be zero by luck."""
    kinds = ("gate_v", "gate_a")
    pooled = {name: g for name, g in gradients.items() if not name.endswith(kinds)}
    for kind in kinds:
        gates = [g for name, g in gradients.items() if name.endswith(kind)]
        given = next((g for g in gates if g is not None), None)
        pooled[f"every {kind}"] = (
            None if given is None else torch.cat([torch.zeros_like(given) if g is None else g for g in gates])
        )
    return pooled


class Race:
    """The implementations, their common inputs, and what is measured of them.

    Args:
        config: the model.
        impls: names in `IMPLEMENTATIONS`. The reference is always built, as the yardstick, but timed only if named.
        phases: "infer", "train" or both.
        batch_size: clips.
        dtypes: float32, or a lower precision for autocast; every implementation runs in each.
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
        dtypes: Sequence[torch.dtype],
        device: str,
        steps: int | Literal["auto"],
        console: Console,
    ) -> None:
        self.start = time.perf_counter()
        self.config, self.impls, self.batch_size = config, impls, batch_size
        self.phases = [phase for phase in PHASES if phase in phases]
        self.dtypes, self.device, self.steps, self.console = dtypes, device, steps, console
        self.arguments, self.loss_of = make_inputs(config, batch_size, device)
        self.meter = Meter(device)

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def build(self, name: str, dtype: torch.dtype, reference: Contender | None) -> Contender:
        """An implementation with the weights of ``reference``, whose module serves the reference in every dtype; with the
        weights of `fill` where there is none yet."""
        before = self.meter.used()
        if name == "reference" and reference is not None:
            module = call = reference.module
        else:
            with torch.device(self.device):
                module, call = IMPLEMENTATIONS[name](self.config)
            if reference is None:
                fill(module)
            else:
                module.load_state_dict(reference.module.state_dict())
            if dtype != torch.float32 and isinstance(module, sf.FastSTGCMA):
                module.cast_frozen(dtype)
        shared = reference.held if reference is not None and module is reference.module else 0
        contender = Contender(name, dtype, module, call, shared + self.meter.used() - before)
        # As published: Adam with L2, the same for all.
        parameters = [p for _, p in contender.named_trainable()]
        contender.optimizer = torch.optim.Adam(
            parameters, lr=5e-5, betas=(0.95, 0.999), weight_decay=5e-7, fused=True, capturable=name == "fast_graph"
        )
        contender.scaler = torch.amp.GradScaler(self.device, enabled=dtype == torch.float16)
        return contender

    def infer(self, contender: Contender) -> Tensor:
        """One forward."""
        with torch.inference_mode(), self.autocast(contender.dtype):
            return scores(contender.call(*self.arguments))

    def gradients(self, contender: Contender) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Logits and every trainable gradient in eval mode: without stochastic depth and dropout."""
        with self.autocast(contender.dtype):
            out = contender.call(*self.arguments)
            loss = self.loss_of(out)
        scale = contender.scaler.get_scale()
        (loss * scale).backward()
        gradients = {name: None if p.grad is None else p.grad / scale for name, p in contender.named_trainable()}
        contender.optimizer.zero_grad()
        return scores(out).detach(), gradients

    def train(self, contender: Contender) -> None:
        """One whole step: forward, loss, backward, optimizer."""
        contender.optimizer.zero_grad()
        with self.autocast(contender.dtype):
            loss = self.loss_of(contender.call(*self.arguments))
        contender.scaler.scale(loss).backward()
        contender.scaler.step(contender.optimizer)
        contender.scaler.update()

    def capture(self, contender: Contender, phase: str) -> torch.cuda.CUDAGraph:
        """A whole step as one CUDA graph, on the inputs where they lie.

        Raises:
            DisagreementError: its replay gives other logits than the step itself, or spoils a parameter.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # whatever a first step sets up must be there
                getattr(self, phase)(contender)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = getattr(self, phase)(contender)
        graph.replay()
        if phase == "infer":
            hi = self.infer(contender).float()
            error, allowed = (logits.float() - hi).abs().max(), torch.finfo(contender.dtype).eps * hi.abs().max()
            if not error <= allowed:
                raise DisagreementError(f"{contender.title}, replayed logits: error {error:.3g}, allowed {allowed:.3g}")
        else:
            spoilt = [name for name, p in contender.named_trainable() if not p.isfinite().all()]
            if spoilt:
                raise DisagreementError(f"{contender.title}, replayed step: {spoilt} are not finite")
        return graph

    def prime(self, contender: Contender) -> None:
        """Let the optimizer take its memory by a step of rate zero, which leaves the weights as they are."""
        before = self.meter.used()
        (group,) = contender.optimizer.param_groups
        rate, group["lr"] = group["lr"], 0.0
        for _, parameter in contender.named_trainable():
            parameter.grad = torch.zeros_like(parameter)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")  # the step to be captured comes later
            contender.optimizer.step()
        contender.optimizer.zero_grad()
        group["lr"] = rate
        contender.held += self.meter.used() - before

    def measured(self, contender: Contender, phase: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Logits and, in a train phase, gradients in eval mode; notes the peak of memory."""
        if phase == "train":
            self.prime(contender)
        contender.module.eval()
        for module in contender.module.modules():
            if isinstance(module, nn.LSTM):
                module.train()  # it draws nothing, and in eval mode cuDNN has no way back through it
        run = self.gradients if phase == "train" else lambda c: (self.infer(c), {})
        if contender.name.endswith("compiled"):
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
        if contender.name == "fast_graph":
            if phase not in contender.graphs:
                contender.graphs[phase] = self.capture(contender, phase)
            return timed(contender.graphs[phase].replay, self.device)[0]
        return timed(lambda: getattr(self, phase)(contender), self.device)[0]

    def check(self, contenders: list[Contender], phase: str, progress: Progress) -> None:
        """Compare each implementation with the first, the reference in float32, as yet at equal weights, and measure their
        memory. In low precision the reference comes before the others.

        On the CPU it is the warm-up, too.

        Raises:
            DisagreementError: an implementation is further off than the yardstick allows.
        """
        task = progress.add_task(f"{phase}: check", total=len(contenders))
        hi, hi_gradients = self.measured(contenders[0], phase)
        lows: dict[torch.dtype, tuple[Tensor | None, dict[str, Tensor | None]]] = {torch.float32: (None, {})}
        progress.advance(task)
        for contender in contenders[1:]:
            logits, gradients = self.measured(contender, phase)
            contender.max_abs_err = max(contender.max_abs_err, (logits.float() - hi).abs().max().item())
            progress.advance(task)
            if contender.name == "reference":
                lows[contender.dtype] = logits, gradients
                continue
            low, low_gradients = lows[contender.dtype]
            float8 = contender.name == "fast_fp8"
            verify(f"{contender.title}, {phase}, logits", logits, hi, low, contender.dtype, False, float8)
            exact = hi_gradients
            if contender.low_precision:
                exact, gradients, low_gradients = map(pooled_gates, (exact, gradients, low_gradients))
            for key, gradient in exact.items():
                if gradient is not None:
                    what = f"{contender.title}, gradient of {key}"
                    verify(what, gradients.get(key), gradient, low_gradients.get(key), contender.dtype, True, float8)

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
                seconds[contender.title] = self.step(contender, phase, number)
                progress.advance(task)
            return seconds

        # Forwards on the CPU were warmed up by the check; time is short if train steps are to follow.
        short = self.device == "cpu" and phase != self.phases[-1]
        warmup = [one_round(i) for i in range(CUDA_WARMUP if self.device == "cuda" else 0 if short else 1)]
        for contender in contenders if warmup else ():
            contender.first_calls += warmup[0][contender.title]
        total = self.rounds(phase, sum(warmup[-1].values()) if warmup else 0)
        progress.update(task, total=(len(warmup) + total) * len(contenders))
        # Without time for another round, what was meant to be the warm-up has to do.
        rounds = [one_round(i) for i in range(total)] or warmup[-1:]
        for contender in contenders:
            contender.times[phase] = [seconds[contender.title] for seconds in rounds]
            contender.graphs.clear()  # and with them the memory they hold

    def run(self) -> Iterator[list[dict[str, Any]]]:
        """Check, then time.

        Yields:
            The rows of measurements of a phase, one for each implementation and dtype, when it has ended.

        Raises:
            DisagreementError: an implementation is further off than the yardstick allows.
        """
        # The float32 reference is the yardstick: no convolution may round its operands to TF32.
        torch.backends.cudnn.allow_tf32 = False
        # The reference in float32 is the yardstick of all, in a low precision that of the others' errors there.
        names = [("reference", dtype) for dtype in dict.fromkeys((torch.float32, *self.dtypes))]
        names += [(name, dtype) for dtype in self.dtypes for name in self.impls if name != "reference"]
        flops = count_flops(self.config, self.batch_size)
        machine = {dtype: matmul_peak(self.device, dtype) for dtype in self.dtypes}
        with progress_bar(self.console) as progress:
            task = progress.add_task("build", total=len(names))
            contenders: list[Contender] = []
            for name, dtype in names:
                contenders.append(self.build(name, dtype, contenders[0] if contenders else None))
                progress.advance(task)
            raced = [c for c in contenders if c.name in self.impls and c.dtype in self.dtypes]
            for phase in self.phases:
                self.check(contenders, phase, progress)
                self.race(raced, phase, progress)
                yield self.rows(raced, phase, flops[phase], machine)
        for contender in raced:
            if contender.name.endswith("compiled"):
                self.console.print(
                    f"{contender.title}: first calls, with compilation, took {contender.first_calls:.0f} s; not in the table"
                )
        self.console.print(
            "fastest matrix product, in TFLOP/s: "
            + ", ".join(f"{str(dtype).removeprefix('torch.')} {machine[dtype] / 1e12:.3g}" for dtype in self.dtypes)
            + "; products of the reference, in TFLOP: "
            + ", ".join(f"{phase} {flops[phase] / 1e12:.3g}" for phase in self.phases)
            + "; timed rounds: "
            + ", ".join(f"{phase} {len(raced[0].times[phase])}" for phase in self.phases)
        )

    def rows(self, raced: list[Contender], phase: str, flops: float, machine: dict[torch.dtype, float]) -> list[dict[str, Any]]:
        """The measurements of a phase that was timed."""
        p50 = {(c.name, c.dtype): quantiles(c.times[phase])[1] for c in raced}
        base = p50.get(("reference", self.dtypes[0]))
        rows = []
        for c in sorted(raced, key=lambda c: self.dtypes.index(c.dtype)):
            low, middle, high = quantiles(c.times[phase])
            rows.append(
                {
                    "impl": c.name,
                    "phase": phase,
                    "dtype": str(c.dtype).removeprefix("torch."),
                    "p20_ms": low * 1e3,
                    "p50_ms": middle * 1e3,
                    "p80_ms": high * 1e3,
                    "rounds": len(c.times[phase]),
                    "clips_per_s": self.batch_size / middle,
                    "peak_mb": c.peak[phase] / 1e6 if phase in c.peak else None,
                    "speedup": base / middle if base else None,
                    "speedup_over": f"reference {str(self.dtypes[0]).removeprefix('torch.')}" if base else None,
                    "max_abs_err": c.max_abs_err,
                    "peak_share": flops / middle / machine[c.dtype],
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
    for name in ("phase", "impl", "dtype"):
        table.add_column(name, no_wrap=True)
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = ("-" if row[key] is None else text(row[key]) for key, (_, text) in COLUMNS.items())
        table.add_row(row["phase"], row["impl"], row["dtype"].replace("float", "f"), *numbers)
    console.print(table)
    console.print(
        "clips/s and speed-up by p50; speed-up over the reference in the first dtype; peak: most memory held, weights "
        "included, for fast_graph without the graph; error: of the logits, against the reference in float32; of peak: FLOP/s "
        "of the reference's products over the fastest product's"
    )


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="throughput.py", description=__doc__)
    add_model(p)
    p.add_argument("--task", choices=get_args(Task), default="ave", help="task, which decides the head")
    p.add_argument("--batch-size", type=PositiveInt, default=1, help="clips in a step")
    p.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES), help="forward alone, or a whole train step")
    p.add_argument(
        "--impl",
        choices=tuple(IMPLEMENTATIONS),
        nargs="+",
        default=None,
        help="what to time: the model in plain PyTorch, the same under torch.compile, FastSTGCMA, that under torch.compile, "
        "a whole step of it as one CUDA graph, and its frozen layers in float8 (default: all but the last on CUDA; reference "
        "and fast on the CPU, where compilation takes minutes)",
    )
    p.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        nargs="+",
        default=None,
        help="below float32, autocast is used; of several all are run, and compared with the reference in the first (default: "
        "float32 on the CPU, bfloat16 on CUDA)",
    )
    add_device(p)
    p.add_argument(
        "--steps",
        type=PositiveInt | Literal["auto"],
        default="auto",
        help=f"timed steps of each; auto: {CUDA_ROUNDS} on CUDA, as many as fit into four minutes on the CPU",
    )
    add_json(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    device = chosen_device(p, args.device)
    file = json_file(p, args.json, device)
    dtypes = list(dict.fromkeys(args.dtype or ["float32" if device == "cpu" else "bfloat16"]))
    console = Console()
    impls = args.impl
    if impls is None:
        impls = [n for n in IMPLEMENTATIONS if n in ("reference", "fast") or (device == "cuda" and n != "fast_fp8")]
        if device == "cpu":
            console.print("what is compiled is left out: on the CPU that takes minutes; --impl reference compiled fast adds it")
    impls = list(dict.fromkeys(impls))
    refuse_graph(p, impls, device, dtypes)
    if "fast_fp8" in impls:
        reasons = [*fp8_refusals(torch.device(device))]
        reasons += [f"it needs --dtype bfloat16, got {name}" for name in dtypes if name != "bfloat16"]
        if reasons:
            p.error(f"--impl fast_fp8: {'; '.join(reasons)}")
    try:
        config = preset(args.arch, args.adapters, task=args.task)
    except ValueError as error:
        p.error(str(error))
    labels = {"arch": args.arch, "adapters": args.adapters, "task": args.task, "batch_size": args.batch_size, "device": device}
    tensor_dtypes = [DTYPES[name] for name in dtypes]
    rows: list[dict[str, Any]] = []
    status = 1
    try:
        for measured in Race(config, impls, args.phase, args.batch_size, tensor_dtypes, device, args.steps, console).run():
            rows += [row | labels for row in measured]
            if file is not None:
                save(file, "throughput", rows, ("arch", "adapters", "task", "batch_size", "dtype", "phase", "impl"), device)
        status = 0
    except DisagreementError as error:
        console.print(f"no speed is reported, an implementation disagrees with the reference: {error}", style="bold red")
    except torch.OutOfMemoryError as error:
        console.print(f"{device} has not enough memory: {error}", style="bold red")
    # Of the phases that ended.
    title = f"{args.arch} {args.adapters}, {args.task}, batch {args.batch_size} on {device}"
    if rows:
        print_table(rows, title, console)
    return status


if __name__ == "__main__":
    sys.exit(main())

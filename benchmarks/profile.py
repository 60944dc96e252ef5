"""Where the time of a step goes, by class of operator and by stage and step, for each implementation.

One step of each is profiled after a warm-up. The folder gets a trace of each for Perfetto or chrome://tracing and, for each
phase and dtype, the tables as Markdown and a picture. What is counted:

* time: on CUDA of the kernels, on the CPU of the operators without those they call. Profiling slows the host; "step" is a step
  without it.
* calls: on CUDA kernels, copies and fills among them; on the CPU operators that compute or move data, without those they call.
* idle: on CUDA the time between the first kernel and the last in which none ran, with the host slowed by the profiler.
* GFLOP: of PyTorch's matrix products, convolutions and attention, by the shapes of what they take. Products within the
  project's own kernels do not show.
* GB read: what operators take, each tensor as large as its shape. What is written in place counts as read; new results do not
  count, nor do lists of tensors, which show no shapes: the optimizer's, and those of some of the project's kernels.
* backward: belongs where its forward ran, by autograd's thread and sequence numbers; what has no forward is "unattributed".
* no range: the loss, and all of a model that is compiled.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import DTYPES, add_device, add_json, add_model, chosen_device, json_file, progress_bar, refuse_graph, save
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from throughput import IMPLEMENTATIONS, PHASES, Contender, Race
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

import stgcma_fast as sf
from stgcma_fast.config import preset

WARMUP = {"cpu": 1, "cuda": 5}
DIRECTIONS = ("forward", "backward", "optimizer", "unattributed")
KEYS = ("arch", "adapters", "batch_size", "dtype", "phase", "impl", "device")

FROZEN, PRODUCTS, ATTENTION, EXCHANGE = "frozen products", "other products", "attention", "cross-modal exchange"
ADAPTERS, HOST, OTHER = "adapters", "views and host", "other"
# Class -> the names it goes by: kernels of the project, operators without `aten::` and the underscore of those in place.
# Products and attention are told apart further by the range they run in.
CLASSES = {
    FROZEN: None,
    PRODUCTS: r"(add|badd)?b?(mm|mv)|dot|ger|_addmm_activation|_scaled_mm"
    r"|((mkldnn_|cudnn_)?convolution|_slow_conv2d|thnn_conv2d)\w*|mkldnn_linear(_backward\w*)?|mkldnn::_linear_pointwise",
    ATTENTION: r"(_|stgcma_fast::)[a-z]+_attention_\w+|_(scaled_dot_product|flash_att|efficient_att|cudnn_att)\w+"
    r"|.*(flash_attn|fmha|xformers).*",
    EXCHANGE: r"(_|stgcma_fast::)cross_modal_\w+|_av_adapter_fwd_kernel",
    ADAPTERS: r"(_|stgcma_fast::)(av_)?adapter_\w+",
    "layer norm": r"native_layer_norm(_backward)?|(_|stgcma_fast::)layer_norm_\w+",
    "GELU": r"(gelu|sigmoid|silu)(_backward)?|(_|stgcma_fast::)gelu_\w+",
    "softmax": r"_(log_)?softmax(_backward_data)?",
    "copies and casts": r"copy|_to_copy|clone|cat|roll|index|index_select|_index_put_impl|gather|fill|zero|constant_pad_nd"
    r"|repeat|(Memcpy|Memset) .*|(_|stgcma_fast::)quantize_\w+",
    "pointwise and sums": r"r?sub|add|mul|div|neg|exp|log|sqrt|pow|addcmul|sum|mean|amax|max|logsumexp|where|masked_fill"
    r"|bernoulli|native_dropout(_backward)?|eq|ne|lt|gt|le|ge",
    "optimizer": r"_fused_adam\w*|_foreach_\w+|_amp_\w+",
    # What allocates, looks at a tensor in another way, or leaves the work to operators of other names.
    HOST: r"view|_unsafe_view|reshape|_reshape_alias|view_as|as_strided|transpose|t|permute|movedim|(un)?flatten|(un)?squeeze"
    r"|unbind|expand|expand_as|slice|select|narrow|split|split_with_sizes|chunk|(slice|select|index|sum|mean|split)_backward"
    r"|detach|alias|(new_)?(empty|zeros|ones|full)(_like|_strided)?|_efficientzerotensor|resize(_as)?|arange|scalar_tensor"
    r"|lift_fresh|set|to|contiguous|type_as|(result|promote)_types?|resolve_\w+|linear|matmul|einsum|conv[123]d|_convolution|layer_norm"
    r"|softmax|log_softmax|stack|pad|dropout|scaled_dot_product_attention|cross_entropy_loss|_local_scalar_dense|item"
    r"|is_nonzero|index_put|unfold|mT|outer|_nnpack_available|record_stream",
    OTHER: None,
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in CLASSES.items() if pattern}
_RANGE = re.compile(r"(embed|head|stage \d+)(/.*)?")
_NODE = "autograd::engine::evaluate_function: "
_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "bool": 1, "unsigned char": 1}


@cache
def kind(name: str, place: str) -> str:
    """The class of an operator, or of a kernel of the project, that runs in a range."""
    plain = name.removeprefix("aten::").rstrip("_")
    found = next((each for each, pattern in _PATTERNS.items() if pattern.fullmatch(plain)), None)
    if found is None:
        # Ranges, autograd's nodes and functions: their own time is that of the interpreter and the engine.
        return HOST if "::" not in name or name.startswith(("autograd::", "torch::autograd::")) else OTHER
    if found in (PRODUCTS, ATTENTION) and place.endswith("/cross-modal"):
        return EXCHANGE
    if found == PRODUCTS and place.endswith("/adapter"):
        return ADAPTERS
    if found == PRODUCTS and place.endswith("/attention"):
        return ATTENTION
    return FROZEN if found == PRODUCTS and place.startswith(("stage", "embed")) else found


def kernel_kind(kernel: str, operator: str, place: str) -> str:
    """The class of a kernel: by its own name if it is one of the project's, a copy or a fill, else by what launched it."""
    found = kind(kernel, place)
    found = kind(operator, place) if found in (HOST, OTHER) else found
    return OTHER if found == HOST else found


def flop(event: FunctionEvent) -> int:
    """Operations of a product, convolution or attention, 2 for each multiply-accumulate; 0 for other operators."""
    name, shapes = event.name.removeprefix("aten::").rstrip("_"), event.input_shapes
    if name in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm"):
        a, b = shapes[1:3] if "add" in name else shapes[:2]
        return 2 * math.prod(a) * b[-1]
    if name == "mkldnn::_linear_pointwise":
        return 2 * math.prod(shapes[0]) * shapes[1][0]
    if name == "convolution":
        # All convolutions here take patches that do not overlap: each element of the input meets each output channel once.
        return 2 * math.prod(shapes[0]) * shapes[1][0]
    if name == "convolution_backward":
        products = sum(event.concrete_inputs[-1][:2])  # of the input, of the weight
        return products * 2 * math.prod(shapes[1]) * shapes[2][0]
    if name.startswith("_scaled_dot_product_"):
        return sdpa_backward_flop_count(*shapes[:4]) if "backward" in name else sdpa_flop_count(*shapes[:3])
    return 0


def bytes_read(event: FunctionEvent, dtypes: Sequence[str]) -> int:
    """Bytes of the tensors that an operator takes."""
    sizes = zip(event.input_shapes, dtypes, strict=False)
    return sum(math.prod(shape) * _BYTES.get(dtype, 0) for shape, dtype in sizes if shape)


class Cell(NamedTuple):
    """What a sum is of."""

    stage: str
    step: str
    direction: str
    kind: str

    @classmethod
    def at(cls, place: str, direction: str, kind: str) -> Cell:
        """The cell of a range's path, all blocks of a stage together."""
        stage, *parts = place.split("/")
        # The exchange may be a part of the adapter's kernels: it is one of the classes, but no step.
        return cls(stage, " ".join(p for p in parts[:3] if not p.startswith("block")), direction, kind)


@dataclass
class Sums:
    """What is summed up in a cell."""

    ms: float = 0.0
    calls: int = 0
    gflop: float = 0.0
    read_gb: float = 0.0

    def __iadd__(self, other: Sums) -> Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass
class Profile:
    """One step of an implementation."""

    impl: str
    step_ms: float  # without the profiler
    cells: dict[Cell, Sums] = field(default_factory=lambda: defaultdict(Sums))
    other: Counter[str] = field(default_factory=Counter)  # ms of what `CLASSES` does not name
    gaps: list[float] | None = None  # ms

    def by(self, key: Callable[[Cell], Any]) -> dict[Any, Sums]:
        """The sums of all cells that have the same key."""
        out: dict[Any, Sums] = defaultdict(Sums)
        for cell, sums in self.cells.items():
            out[key(cell)] += sums
        return out

    @property
    def total(self) -> Sums:
        return self.by(lambda cell: None)[None]

    def row(self) -> dict[str, Any]:
        """As it is saved."""
        by_class = self.by(lambda cell: (cell.kind, cell.direction))
        by_step = self.by(lambda cell: cell[:3])
        return {
            "impl": self.impl,
            "step_ms": self.step_ms,
            **vars(self.total),
            "idle_ms": None if self.gaps is None else sum(self.gaps),
            "by_class": [{"class": k, "direction": d, **vars(sums)} for (k, d), sums in by_class.items()],
            "by_step": [{"stage": a, "step": b, "direction": d, **vars(sums)} for (a, b, d), sums in by_step.items()],
            "other": dict(self.other.most_common()),
        }


class _Where(NamedTuple):
    place: str = "no range"
    direction: str = "forward"
    counted: bool = False  # inside an operator that was counted


def analyse(profile: Profile, events: Iterable[FunctionEvent], dtypes: Mapping[int, Sequence[str]], device: str) -> None:
    """Put the events of a step into the cells of ``profile``.

    Args:
        profile: is added to.
        events: in the order they start, as the profiler gives them.
        dtypes: of the inputs of the events, by their id.
        device: "cpu", where operators' own time counts, or "cuda", where kernels' time does.
    """
    cuda = device == "cuda"
    where: dict[int, _Where] = {}
    forward: dict[tuple[int, int], str] = {}  # thread and sequence number -> range
    kernels: list[FunctionEvent] = []
    loose: dict[str, Sums] = defaultdict(Sums)  # kernels that no operator launched

    def add(name: str, place: str, direction: str, found: str, sums: Sums) -> None:
        profile.cells[Cell.at(place, "optimizer" if found == "optimizer" else direction, found)] += sums
        if found == OTHER:
            profile.other[name] += sums.ms

    for event in events:
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:
                kernels.append(event)
                loose[event.name] += Sums(event.time_range.elapsed_us() / 1e3, 1)
            continue
        place, direction, counted = where.get(id(event.cpu_parent), _Where())
        if event.is_user_annotation and _RANGE.fullmatch(event.name):
            place = event.name
        elif event.is_user_annotation and event.name.startswith("Optimizer."):
            place, direction = "optimizer", "optimizer"
        elif event.name.startswith(_NODE):
            # The gradient of a parameter has no forward; inside a node that has one it stays there.
            unknown = "unattributed" if direction != "backward" else place
            place, direction = forward.get((event.fwd_thread, event.sequence_nr), unknown), "backward"
        elif event.sequence_nr >= 0 and not event.fwd_thread:
            # Several operators may show the number of the next node; the last of them made it.
            forward[event.thread, event.sequence_nr] = place
        found = kind(event.name, place)
        work = found != HOST and not counted
        # The project's operators may run PyTorch's, whose products would not show otherwise.
        where[id(event)] = _Where(place, direction, counted or (work and not event.name.startswith("stgcma_fast::")))
        sums = Sums(0 if cuda else event.self_cpu_time_total / 1e3)
        if work:
            read = bytes_read(event, dtypes.get(event.id, ()))
            sums += Sums(0, 0 if cuda else 1, flop(event) / 1e9, read / 1e9)
        if any(vars(sums).values()):
            add(event.name, place, direction, found, sums)
        for kernel in event.kernels if cuda and not event.is_user_annotation else ():
            ms = kernel.duration / 1e3
            loose[kernel.name] += Sums(-ms, -1)
            add(kernel.name, place, direction, kernel_kind(kernel.name, event.name, place), Sums(ms, 1))
    for name, sums in loose.items():
        if sums.calls > 0:
            add(name, "unattributed", "unattributed", kernel_kind(name, "", ""), sums)
    if cuda:
        profile.gaps = idle(kernels)


def idle(kernels: Iterable[FunctionEvent]) -> list[float]:
    """Lengths in ms of the times between the first kernel and the last in which none ran."""
    gaps, end = [], math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.time_range.start):
        if kernel.time_range.start > end:
            gaps.append((kernel.time_range.start - end) / 1e3)
        end = kernel.time_range.end if end == math.inf else max(end, kernel.time_range.end)
    return gaps


def measure(race: Race, contender: Contender, phase: str, trace: Path, advance: Callable[[], Any]) -> Profile:
    """Warm up, profile one step, leave its trace in a file. ``advance`` is called `WARMUP` + 2 times."""
    for number in range(WARMUP[race.device]):
        seconds = race.step(contender, phase, number)
        advance()
    # What is compiled or captured has no functions to put ranges around.
    ranges = sf.annotate(contender.module) if contender.name in ("reference", "fast") else nullcontext()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if race.device == "cuda" else [])]
    with ranges, torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        race.step(contender, phase, number)
    advance()
    profiler.export_chrome_trace(str(trace))
    profile = Profile(contender.name, seconds * 1e3)
    # The public events keep no dtypes.
    dtypes = {event.correlation_id(): event.dtypes() for event in profiler.profiler.kineto_results.events()}
    analyse(profile, profiler.events(), dtypes, race.device)
    advance()
    return profile


def _text(value: str | float | None) -> str:
    return (
        value if isinstance(value, str) else "-" if value is None else f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.3g}"
    )


@dataclass
class Sheet:
    """A table for people: the first columns are text, the others numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]

    def markdown(self) -> str:
        lines = [
            [heading.replace("\n", " ") for heading in self.headings],
            ["---" if isinstance(cell, str) else "---:" for cell in self.rows[0]],
        ]
        lines += [[_text(cell) for cell in row] for row in self.rows]
        return f"## {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def print(self, console: Console) -> None:
        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for heading, cell in zip(self.headings, self.rows[0], strict=True):
            table.add_column(heading, justify="left" if isinstance(cell, str) else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(_text, row))
        console.print(table, "\n")


def sheets(profiles: Sequence[Profile]) -> list[Sheet]:
    """Totals, classes, stages and steps, the largest differences from the reference, and what no class names."""
    out = []
    rows = []
    for p in profiles:
        t, gaps = p.total, p.gaps
        rows.append([p.impl, p.step_ms, t.ms, t.calls, t.gflop, t.read_gb])
        rows[-1] += [None] * 3 if gaps is None else [sum(gaps), len(gaps), max(gaps, default=0.0)]
    headings = ["", "step\nms", "all\nms", "calls", "GFLOP", "GB\nread", "idle\nms", "gaps", "longest\nms"]
    out.append(Sheet("Totals", headings, rows))

    def spread(title: str, first: Sequence[str], key: Callable[[Cell], tuple], order: Callable[[tuple], Any]) -> Sheet:
        """Time by a key, each direction by itself and all together."""
        parts = [p.by(lambda cell: (key(cell), cell.direction)) for p in profiles]
        totals = [p.by(key) for p in profiles]
        rows = []
        for at in sorted({at for total in totals for at, sums in total.items() if sums.ms}, key=order):
            rows.append([*at])
            for part, total in zip(parts, totals, strict=True):
                rows[-1] += [part[at, d].ms for d in DIRECTIONS[:2]] + [total[at].ms]
        headings = [f"{p.impl}\n{what}" for p in profiles for what in (*DIRECTIONS[:2], "all, ms")]
        return Sheet(title, [*first, *headings], rows)

    names = list(CLASSES)
    out.append(spread("Time by class of operator", ["class"], lambda cell: (cell.kind,), lambda at: names.index(*at)))

    totals = [p.by(lambda cell: cell.kind) for p in profiles]
    rows = []
    for name in names:
        if any(total[name].calls for total in totals):
            counts = ([total[name].calls, total[name].gflop, total[name].read_gb] for total in totals)
            rows.append([name, *(value for values in counts for value in values)])
    headings = [f"{p.impl}\n{what}" for p in profiles for what in ("calls", "GFLOP", "GB read")]
    out.append(Sheet("Work by class of operator", ["class", *headings], rows))

    out.append(spread("Time by stage and step", ["stage", "step"], lambda cell: cell[:2], _order))

    parts = [p.by(lambda cell: cell[:3]) for p in profiles]
    reference = next((part for p, part in zip(profiles, parts, strict=True) if p.impl == "reference"), None)
    for p, part in zip(profiles, parts, strict=True):
        if reference is None or part is reference:
            continue
        changes = [
            (*cell, reference[cell].ms, part[cell].ms, part[cell].ms - reference[cell].ms) for cell in {*reference, *part}
        ]
        rows = sorted(changes, key=lambda row: -abs(row[-1]))[:10]
        out.append(
            Sheet(
                f"Largest differences of {p.impl} from the reference",
                ["stage", "step", "direction", "reference\nms", f"{p.impl}\nms", "difference\nms"],
                rows,
            )
        )
    rows = [[p.impl, name, ms] for p in profiles for name, ms in p.other.most_common(10)]
    return [*out, Sheet("In no class", ["", "name", "ms"], rows)] if rows else out


def _order(place: tuple[str, str]) -> tuple:
    """Places as the model comes to them."""
    stage, step = place
    first = ("embed", "stage", "head", "no range", "optimizer", "unattributed").index(
        "stage" if stage[:5] == "stage" else stage
    )
    steps = ("", "temporal", "spatial", "global", "merge")
    return first, stage, steps.index(step.split(" ")[0]), step


def picture(profiles: Sequence[Profile], title: str, file: Path) -> None:
    """Time by class of operator, stacked: a bar for each implementation, in a group for each direction."""
    totals = [p.by(lambda cell: (cell.direction, cell.kind)) for p in profiles]
    directions = [d for d in DIRECTIONS if any(sums.ms for total in totals for (of, _), sums in total.items() if of == d)]
    kinds = [k for k in CLASSES if any(sums.ms for total in totals for (_, of), sums in total.items() if of == k)]
    bars = [(d, p.impl, total) for d in directions for p, total in zip(profiles, totals, strict=True)]
    colors = dict(zip(CLASSES, colormaps["tab20"].colors, strict=False))
    figure = Figure(figsize=(11, 1.6 + 0.5 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    # Groups stand apart by half a bar.
    ys = [i + 0.5 * (i // len(profiles)) for i in range(len(bars))]
    starts = [0.0] * len(bars)
    widest = max(sum(total[d, k].ms for k in kinds) for d, _, total in bars)
    for k in kinds:
        widths = [total[d, k].ms for d, _, total in bars]
        drawn = axes.barh(ys, widths, left=starts, label=k, color=colors[k])
        axes.bar_label(drawn, [_text(w) if w > 0.04 * widest else "" for w in widths], label_type="center", fontsize=8)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(ys, [f"{impl}, {d}" for d, impl, _ in bars])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="ms", title=title)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="profile.py", description=__doc__.split("\n")[0])
    add_model(p)
    p.add_argument("--batch-size", type=PositiveInt, default=1, help="clips in a step")
    p.add_argument("--phase", choices=PHASES, nargs="+", default=["train"], help="forward alone, or a whole train step")
    p.add_argument(
        "--impl",
        choices=tuple(IMPLEMENTATIONS),
        nargs="+",
        default=["reference", "fast"],
        help="what to profile, as in throughput.py; what is compiled or a graph has no stages and steps",
    )
    p.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        nargs="+",
        default=None,
        help="below float32, autocast is used (default: float32 on the CPU, bfloat16 on CUDA)",
    )
    add_device(p)
    p.add_argument(
        "--out", type=str, default="profile", metavar="FOLDER", help="for traces, tables and pictures; made if missing"
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
    impls = list(dict.fromkeys(args.impl))
    refuse_graph(p, impls, device, dtypes)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out: {error}")
    config, console = preset(args.arch, args.adapters), Console()
    console.width = max(console.width, 100)  # of the widest table
    race = Race(config, impls, args.phase, args.batch_size, [DTYPES[name] for name in dtypes], device, 1, console)
    labels = {"arch": args.arch, "adapters": args.adapters, "batch_size": args.batch_size, "device": device}
    for phase in race.phases:
        for dtype in dtypes:
            name = f"{args.arch}_{args.adapters}_{args.batch_size}_{phase}_{dtype}_{device}"
            profiles = []
            with progress_bar(console) as progress:
                for impl in impls:
                    task = progress.add_task(impl, total=WARMUP[device] + 2)
                    contender = race.build(impl, DTYPES[dtype], None)
                    trace = out / f"{name}_{impl}.json.gz"
                    profiles.append(measure(race, contender, phase, trace, lambda task=task: progress.advance(task)))
                    del contender  # one model at a time
                    if file is not None:
                        save(file, "profile", [labels | {"phase": phase, "dtype": dtype} | profiles[-1].row()], KEYS, device)
            title = f"{args.arch} {args.adapters}, {phase}, {dtype}, batch {args.batch_size} on {device}"
            tables = sheets(profiles)
            for table in tables:
                table.print(console)
            counted = __doc__.partition("What is counted:\n\n")[2]
            (out / f"{name}.md").write_text("\n".join([f"# {title}\n", *(table.markdown() for table in tables), counted]))
            picture(profiles, title, out / f"{name}.png")
            console.print(f"{out / name}: table .md, picture .png, traces .json.gz")
    return 0


if __name__ == "__main__":
    sys.exit(main())

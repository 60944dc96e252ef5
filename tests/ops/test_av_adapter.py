"""The AV-adapter: two adapters and the exchange between them."""

from functools import partial

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.kernels import launch
from stgcma_fast.ops import WindowGrid
from tests.support.inputs import Device, adapter_weights, draw, each_dtype, each_kernel_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

FUSIONS = ("both", "a2v", "v2a", "none")
# Frames, visual tokens, audio tokens, channels, rank.
SIZES = {
    "stage4": (1, 49, 49, 128, 96),
    "clip": (2, 50, 49, 96, 24),
    "odd": (1, 70, 33, 100, 100),
    "narrow": (3, 17, 40, 32, 4),
    "one-token": (1, 1, 1, 96, 16),
}
GRIDS = {
    "one-window": WindowGrid(7, 7, 7),
    "square": WindowGrid(14, 14, 7),
    "square-shifted": WindowGrid(14, 14, 7, 3),
    "wide": WindowGrid(8, 12, 4),
    "wide-shifted": WindowGrid(8, 12, 4, 1),
    "tall-shifted": WindowGrid(9, 3, 3, 2),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
each_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def function(of, **options):
    """``of.av_adapter`` with its weights taken by name."""

    def av_adapter(visual, audio, gate_visual, gate_audio, residual_visual=None, residual_audio=None, **weights):
        params = (
            ops.AdapterParams(**{name: weights[f"{stream}_{name}"] for name in ops.AdapterParams._fields})
            for stream in ("visual", "audio")
        )
        residuals = {"residual_visual": residual_visual, "residual_audio": residual_audio}
        return of.av_adapter(visual, audio, *params, gate_visual, gate_audio, **residuals, **options)

    return av_adapter


def problem(
    frames,
    n,
    m,
    channels,
    rank,
    *,
    dtype=torch.float32,
    strides="packed",
    residuals=("visual", "audio"),
    gates=(0.7, -0.4),
    seed=0,
):
    shapes = {"visual": (frames, n, channels), "audio": (frames, m, channels)}
    tensors = {name: draw(seed + i, *shapes[name], dtype=dtype, strides=strides) for i, name in enumerate(shapes)}
    tensors |= {
        "gate_visual": torch.tensor([gates[0]], dtype=dtype, device=Device.name),
        "gate_audio": torch.tensor([gates[1]], dtype=dtype, device=Device.name),
    }
    tensors |= {
        f"residual_{name}": draw(seed + 4 + len(name), *shapes[name], dtype=dtype, strides=strides) for name in residuals
    }
    weights = (adapter_weights(seed + 20 * i, channels, rank, f"{name}_", dtype=dtype) for i, name in enumerate(shapes, 1))
    return tensors | next(weights) | next(weights)


def windowed(grid, frames=2, channels=48, rank=24, **kwargs):
    return problem(frames, grid.height * grid.width, grid.height * grid.width, channels, rank, **kwargs)


def hold(problems, *, fast=None, fusion="both", window=None, **options):
    tensors = problems if isinstance(problems, dict) else problems[0]
    rank, channels = tensors["visual_down_weight"].shape
    rows = {name: tensors[name].shape[:2].numel() for name in ("visual", "audio")}
    # What the exchange sees: whole frames, or all windows of all frames.
    tokens = {name: tensors[name].shape[1] if window is None else window.size**2 for name in rows}
    return check(
        "av_adapter",
        fast or function(ops, fusion=fusion, window=window),
        function(reference, fusion=fusion, window=window),
        problems,
        reductions=[channels, rank, rank, max(rows.values())],
        gates={f"gate_{name}": (rows[name] // tokens[name], tokens[name], rank) for name in rows},
        **{"gate_roundings": 6} | options,
    )


@each_dtype
@each_size
def test_sizes(size, dtype):
    hold(problem(*size, dtype=dtype))


@each_dtype
@each_grid
def test_windows(grid, dtype):
    hold(windowed(grid, dtype=dtype), window=grid)


@pytest.mark.parametrize("window", [None, GRIDS["square-shifted"]], ids=["frame", "windows"])
@each_fusion
def test_fusions(fusion, window):
    hold(windowed(GRIDS["square-shifted"]), fusion=fusion, window=window)


@pytest.mark.parametrize("window", [None, GRIDS["wide-shifted"]], ids=["frame", "windows"])
@each_stride
def test_strided_inputs(strides, window):
    hold(windowed(GRIDS["wide-shifted"], strides=strides), window=window)


@pytest.mark.parametrize("window", [None, GRIDS["wide-shifted"]], ids=["frame", "windows"])
@each_stride
def test_strided_upstream_gradients(strides, window):
    hold(windowed(GRIDS["wide-shifted"]), upstream=strides, window=window)


@pytest.mark.parametrize("residuals", [(), ("visual",), ("audio",)], ids=["neither", "visual", "audio"])
@each_dtype
def test_residuals(dtype, residuals):
    hold(problem(2, 20, 13, 48, 24, dtype=dtype, residuals=residuals))


@each_dtype
def test_gradients_of_gates(dtype):
    """One gate's gradient may be right by luck; those of 20 problems together are not."""
    hold([problem(2, 20, 13, 32, 16, dtype=dtype, seed=100 * seed) for seed in range(20)], gate_roundings=1)


@pytest.mark.parametrize("gates", [(0.0, 0.0), (0.0, 0.5)], ids=["closed", "visual-closed"])
@each_dtype
def test_closed_gates(dtype, gates):
    """With a gate closed the stream is adapted by itself, yet the gate gets its gradient."""
    tensors = problem(2, 20, 13, 48, 24, dtype=dtype, gates=gates)
    got = hold(tensors)
    alone = evaluate(function(ops, fusion="none"), tensors)
    torch.testing.assert_close(got["out0"], alone["out0"])
    assert got["grad_gate_visual"] != 0


def test_two_bottleneck_widths_go_without_exchange():
    tensors = problem(2, 20, 13, 48, 24) | adapter_weights(50, 48, 5, "audio_")
    check("av_adapter", function(ops, fusion="none"), function(reference, fusion="none"), tensors, reductions=[48, 24, 40])


@each_dtype
def test_large_scores(dtype):
    """Scores in the hundreds. Rounding the hidden tokens then decides between two near candidates, in the reference as well;
    20 problems together go without that luck.
    """
    problems = [problem(2, 30, 21, 48, 24, dtype=dtype, seed=100 * seed) for seed in range(20)]
    for tensors in problems:
        for name in ("visual_down_weight", "audio_down_weight"):
            tensors[name] = tensors[name] * 30**0.5
    hold(problems)


@pytest.mark.parametrize("window", [None, GRIDS["wide-shifted"]], ids=["frame", "windows"])
@each_fusion
def test_equals_the_reference_in_float64(fusion, window):
    options = {"fusion": fusion, "window": window}
    fast, law = (function(ops, impl=impl, **options) for impl in ("torch", "reference"))
    check_equal_in_float64(fast, law, windowed(GRIDS["wide-shifted"]))


FROZEN = {
    "visual": {"visual", "residual_visual"},
    "streams": {"visual", "audio", "residual_visual", "residual_audio"},
    "gates": {"gate_visual", "gate_audio"},
    "audio-adapter": {f"audio_{name}" for name in ops.AdapterParams._fields},
    "down-weights": {"visual_down_weight", "audio_down_weight"},
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_inputs_change_nothing_else(frozen):
    hold(problem(2, 20, 13, 48, 24), frozen=frozen)


@pytest.mark.parametrize("window", [None, GRIDS["wide-shifted"]], ids=["frame", "windows"])
@each_low_dtype
def test_autocast(dtype, window):
    hold(windowed(GRIDS["wide-shifted"]), autocast=dtype, window=window)


@pytest.mark.parametrize("window", [None, WindowGrid(2, 4, 2, 1)], ids=["frame", "windows"])
def test_gradcheck_of_the_reference(window):
    tensors = problem(2, 8, 8, 3, 2, dtype=torch.float64)
    law = function(reference, window=window)
    inputs = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *xs: law(**dict(zip(tensors, xs, strict=True))), inputs)


@pytest.mark.parametrize("window", [None, GRIDS["wide-shifted"]], ids=["frame", "windows"])
def test_compiled(window):
    check_compiled(
        function(ops, window=window),
        partial(hold, window=window),
        lambda batch: windowed(GRIDS["wide-shifted"], batch, 16, 8),
        batched=["visual", "audio", "residual_visual", "residual_audio"],
    )


ERRORS = {
    "visual": ({"visual": draw(0, 20, 48)}, r"visual: expected shape \[F, n, D\], got \[20, 48\]"),
    "audio": ({"audio": draw(0, 3, 20, 48)}, r"audio: expected shape \[2, m, 48\], got \[3, 20, 48\]"),
    "visual-adapter": (
        {"visual_up_bias": draw(0, 47)},
        r"visual_params.up_bias: expected shape \[48\], got \[47\]",
    ),
    "ranks": (adapter_weights(0, 48, 5, "audio_"), r"audio_params.down_bias: expected shape \[24\], got \[5\]"),
    "residual": ({"residual_audio": draw(0, 2, 48, 49)}, r"residual_audio: expected shape \[2, 49, 48\], got \[2, 48, 49\]"),
    "gate": ({"gate_visual": draw(0, 2)}, r"gate_visual: expected shape \[1\], got \[2\]"),
    "dtype": ({"audio": draw(0, 2, 49, 48).half()}, "expected one floating dtype.*visual torch.float32, audio torch.float16"),
    "dtypes-of-streams": (
        {name: x.half() for name, x in windowed(GRIDS["one-window"]).items() if name.startswith(("audio_", "gate_"))},
        "expected one floating dtype",
    ),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        function(ops)(**windowed(GRIDS["one-window"]) | changed)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (WindowGrid(7, 8, 7), r"multiples of size and 0 <= shift < size, got WindowGrid\(height=7, width=8, size=7, shift=0\)"),
        (WindowGrid(7, 7, 7, 7), "0 <= shift < size, got .*shift=7"),
        (WindowGrid(7, 14, 7), "7 x 14 holds 98 tokens, got frames of 49 and 49"),
    ],
    ids=["not-whole", "shift", "tokens"],
)
def test_window_errors(window, message):
    with pytest.raises(ValueError, match=message):
        function(ops, window=window)(**windowed(GRIDS["one-window"]))


def test_fusion_error():
    with pytest.raises(ValueError, match="fusion: got 'audio', allowed are 'both', 'a2v', 'v2a', 'none'"):
        function(ops, fusion="audio")(**windowed(GRIDS["one-window"]))


def kernel(**options):
    return function(ops, impl="triton", **options)


KERNEL_SIZES = {
    "clip": (2, 50, 49, 96, 24),
    "stage4": (1, 49, 49, 128, 96),
    "odd": (1, 70, 33, 100, 100),
    "narrow": (3, 17, 40, 32, 4),
    "one-token": (1, 1, 1, 96, 16),
    "swin-l": (1, 3, 5, 1536, 96),
}


@each_kernel_dtype
@pytest.mark.parametrize("size", KERNEL_SIZES.values(), ids=KERNEL_SIZES.keys())
def test_kernel_sizes(kernels, size, dtype):
    hold(problem(*size, dtype=dtype), fast=kernel())


@each_grid
def test_kernel_windows(kernels, grid):
    hold(windowed(grid), fast=kernel(window=grid), window=grid)


def test_kernel_takes_windows_in_turn(kernels):
    """Twelve windows, and then ten, of which a program takes four."""
    for grid in (WindowGrid(8, 6, 2, 1), WindowGrid(4, 10, 2, 1)):
        hold(windowed(grid, frames=1, channels=16, rank=16), fast=kernel(window=grid), window=grid)


@pytest.mark.parametrize("window", [None, GRIDS["wide-shifted"]], ids=["frame", "windows"])
@each_fusion
def test_kernel_fusions(kernels, fusion, window):
    options = {"fusion": fusion, "window": window}
    hold(windowed(GRIDS["wide-shifted"], frames=1), fast=kernel(**options), **options)


@pytest.mark.parametrize("window", [None, WindowGrid(4, 6, 2, 1)], ids=["frame", "windows"])
@each_stride
def test_kernel_strides(kernels, strides, window):
    tensors = windowed(WindowGrid(4, 6, 2, 1), channels=32, rank=16, strides=strides)
    hold(tensors, fast=kernel(window=window), upstream=strides, window=window)


@pytest.mark.parametrize("residuals", [(), ("visual",), ("audio",)], ids=["neither", "visual", "audio"])
def test_kernel_residuals(kernels, residuals):
    hold(problem(2, 20, 13, 32, 16, residuals=residuals), fast=kernel())


@each_kernel_dtype
def test_kernel_gradients_of_gates(kernels, dtype):
    problems = [problem(2, 20, 13, 32, 16, dtype=dtype, seed=100 * seed) for seed in range(20)]
    hold(problems, fast=kernel(), gate_roundings=1)


@pytest.mark.parametrize("gates", [(0.0, 0.0), (0.0, 0.5)], ids=["closed", "visual-closed"])
@each_kernel_dtype
def test_kernel_closed_gates(kernels, dtype, gates):
    """Training starts with closed gates: the gradient of a gate is not zero there."""
    got = hold(problem(2, 20, 13, 48, 24, dtype=dtype, gates=gates), fast=kernel())
    assert got["grad_gate_visual"] != 0


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_kernel_frozen_inputs_change_nothing_else(kernels, frozen):
    hold(problem(2, 20, 13, 32, 16), fast=kernel(), frozen=frozen)


ALL = {name for name in problem(1, 1, 1, 16, 16) if name.startswith(("visual", "audio", "residual"))}
WEIGHTS = {name for name in ALL if name.endswith(("weight", "bias"))}


@pytest.mark.parametrize(
    ("frozen", "fusion", "launched"),
    [
        (set(), "both", ["bwd_up", "cross_modal_bwd", "adapter_bwd", "adapter_bwd_weight", "adapter_bwd_weight"]),
        (set(), "none", ["bwd_up", "adapter_bwd", "adapter_bwd_weight", "adapter_bwd_weight"]),
        (WEIGHTS, "both", ["bwd_up", "cross_modal_bwd", "adapter_bwd"]),
        (ALL, "both", ["bwd_up"]),
        (ALL | {"gate_visual", "gate_audio"}, "both", []),
    ],
    ids=["all", "no-exchange", "frozen-weights", "gates-alone", "residual-alone"],
)
def test_kernel_launches_what_is_needed(kernels, monkeypatch, frozen, fusion, launched):
    run, names = launch.run, []
    monkeypatch.setattr(
        launch, "run", lambda kernel, *args, **options: names.append(kernel.__name__) or run(kernel, *args, **options)
    )
    evaluate(kernel(fusion=fusion), problem(1, 5, 4, 16, 16), frozen=frozen - {"residual_visual"})
    names = [name.removeprefix("_av_adapter").strip("_").removesuffix("_kernel") for name in names]
    assert names == ["fwd_down", "fwd", *launched]


@pytest.mark.parametrize("window", [None, WindowGrid(4, 6, 2, 1)], ids=["frame", "windows"])
def test_kernel_autocast(kernels, window):
    # float16: the interpreter truncates where a GPU rounds to bfloat16.
    hold(windowed(WindowGrid(4, 6, 2, 1)), fast=kernel(window=window), autocast=torch.float16, window=window)


@pytest.mark.parametrize("window", [None, WindowGrid(4, 6, 2, 1)], ids=["frame", "windows"])
def test_kernel_compiled(kernels, window):
    check_compiled(
        kernel(window=window),
        partial(hold, window=window),
        lambda batch: windowed(WindowGrid(4, 6, 2, 1), batch, 16, 8),
        batched=["visual", "audio", "residual_visual", "residual_audio"],
    )


def test_kernel_saves_no_scores(kernels):
    """Inputs, and of what is new only hidden tokens, what they heard, and two log-sum-exps."""
    tensors = {name: x.requires_grad_() for name, x in problem(2, 90, 70, 32, 4).items()}
    given, saved = {x.data_ptr() for x in tensors.values()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernel()(**tensors)
    new = sorted(x.numel() for x in saved if x.data_ptr() not in given)
    assert new == [2 * 70, 2 * 90, *[4 * 2 * 70] * 2, *[4 * 2 * 90] * 2]


def test_kernel_repeats_bit_equal(kernels):
    tensors = problem(2, 70, 50, 48, 24)
    first = evaluate(kernel(), tensors)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(kernel(), tensors).items())


@pytest.mark.parametrize("window", [[], [4, 6, 2, 1]], ids=["frame", "windows"])
@pytest.mark.parametrize("fusion", ["both", "a2v", "none"])
def test_kernel_as_pytorch_sees_it(kernels, fusion, window):
    """Schema, fake and dispatch keys of the registered operators."""
    tensors = problem(2, 24, 24, 16, 8)
    operators = torch.ops.stgcma_fast
    xs, residuals, gates = ([tensors[f"{p}{m}"] for m in ("visual", "audio")] for p in ("", "residual_", "gate_"))
    weights = [[tensors[f"{m}_{name}"] for m in ("visual", "audio")] for name in ops.AdapterParams._fields]
    forward = (xs, [residuals[0], None], *weights, gates, window, fusion, torch.float32)
    torch.library.opcheck(operators.av_adapter_fwd.default, forward)
    _, *kept = operators.av_adapter_fwd(*forward)
    for needs in ((True, True), (False, True), (True, False), (False, False)):
        torch.library.opcheck(operators.av_adapter_bwd.default, (xs, xs, *weights[:3], gates, *kept, window, fusion, *needs))


def test_kernel_refuses_what_it_cannot_serve(kernels):
    """Every reason at once."""
    tensors = problem(1, 5, 5, 16, 129) | adapter_weights(50, 16, 5, "audio_")
    with pytest.raises(
        NotImplementedError, match=r"at most 128, got 129; its kernels take two adapters of one bottleneck width"
    ):
        kernel(fusion="none")(**tensors)

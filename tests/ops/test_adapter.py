"""The bottleneck adapter."""

from functools import partial

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.kernels import launch
from stgcma_fast.ops.adapter import adapters
from tests.support.inputs import Device, adapter_weights, draw, each_dtype, each_kernel_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias")
SIZES = {
    "stage1": ((2, 49), 192, 96),
    "clip": ((2, 3, 50), 256, 48),
    "odd": ((3, 37), 100, 100),
    "narrow": ((17,), 32, 4),
    "one-row": ((1, 1), 96, 16),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def function(of, impl=None):
    """``of.adapter`` with its weights taken by name."""

    def adapter(x, residual=None, scale=None, **weights):
        params = ops.AdapterParams(**weights)
        call = of.adapter if impl is None else partial(of.adapter, impl=impl)
        return call(x, params, residual, scale)

    return adapter


FAST, LAW = function(ops), function(reference)


def problem(leading, channels, rank, *, dtype=torch.float32, strides="packed", residual=True):
    tensors = {"x": draw(0, *leading, channels, dtype=dtype, strides=strides)}
    if residual:
        tensors["residual"] = draw(1, *leading, channels, dtype=dtype, strides=strides)
    return tensors | adapter_weights(2, channels, rank, dtype=dtype)


def hold(tensors, *, fast=FAST, **options):
    rank, channels = tensors["down_weight"].shape
    rows = tensors["x"].shape[:-1].numel()
    return check("adapter", fast, LAW, tensors, reductions=[channels, rank, rows], **options)


@each_dtype
@each_size
def test_sizes(size, dtype):
    hold(problem(*size, dtype=dtype))


@each_dtype
def test_without_residual(dtype):
    hold(problem((2, 20), 48, 24, dtype=dtype, residual=False))


@each_stride
@each_dtype
def test_strided_inputs(dtype, strides):
    hold(problem((3, 20), 48, 24, dtype=dtype, strides=strides))


@each_stride
@each_dtype
def test_strided_upstream_gradients(dtype, strides):
    hold(problem((3, 20), 48, 24, dtype=dtype), upstream=strides)


@each_dtype
def test_zero_up_projection(dtype):
    """Training starts with the second layer at zero: the output is the residual, and that layer alone gets a gradient."""
    tensors = problem((3, 20), 48, 24, dtype=dtype)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in ("up_weight", "up_bias")}
    got = hold(tensors)
    assert torch.equal(got["out0"], tensors["residual"])
    assert not got["grad_down_weight"].any()
    assert got["grad_up_weight"].any()


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "bare"])
@each_size
def test_equals_the_reference_in_float64(size, residual):
    check_equal_in_float64(function(ops, "torch"), function(ops, "reference"), problem(*size, residual=residual))


FROZEN = {
    "x": {"x"},
    "residual": {"residual"},
    "weights": set(WEIGHTS),
    "down": {"down_weight", "down_bias"},
    "biases": {"down_bias", "up_bias"},
    "all-but-up-bias": {"x", "residual", "down_weight", "down_bias", "up_weight"},
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_inputs_change_nothing_else(frozen):
    hold(problem((3, 20), 48, 24), frozen=frozen)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "bare"])
@each_low_dtype
def test_autocast(dtype, residual):
    hold(problem((3, 20), 48, 24, residual=residual), autocast=dtype)


def test_gradcheck_of_the_reference():
    tensors = problem((2, 3), 4, 2, dtype=torch.float64)
    names = list(tensors)
    inputs = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *xs: LAW(**dict(zip(names, xs, strict=True))), inputs)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "bare"])
def test_compiled(residual):
    check_compiled(
        FAST,
        hold,
        lambda batch: problem((batch, 20), 48, 24, residual=residual),
        batched=["x", "residual"] if residual else ["x"],
    )


ERRORS = {
    "down_weight": ({"down_weight": draw(0, 24, 47)}, r"params.down_weight: expected shape \[r, 48\], got \[24, 47\]"),
    "down_bias": ({"down_bias": draw(0, 23)}, r"params.down_bias: expected shape \[24\], got \[23\]"),
    "up_weight": ({"up_weight": draw(0, 24, 48)}, r"params.up_weight: expected shape \[48, 24\], got \[24, 48\]"),
    "up_bias": ({"up_bias": draw(0, 24)}, r"params.up_bias: expected shape \[48\], got \[24\]"),
    "residual": ({"residual": draw(0, 20, 48)}, r"residual: expected shape \[3, 20, 48\], got \[20, 48\]"),
    "dtype": (
        {"x": draw(0, 3, 20, 48).half()},
        "expected one floating dtype.*x torch.float16, .*up_bias torch.float32",
    ),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        FAST(**problem((3, 20), 48, 24) | changed)


KERNEL = function(ops, "triton")
KERNEL_SIZES = SIZES | {"two-tiles": ((5, 26), 64, 64), "swin-l": ((3, 3), 1536, 96), "rank-40": ((70,), 33, 40)}


@each_kernel_dtype
@pytest.mark.parametrize("size", KERNEL_SIZES.values(), ids=KERNEL_SIZES.keys())
def test_kernel_sizes(kernels, size, dtype):
    hold(problem(*size, dtype=dtype), fast=KERNEL)


@each_kernel_dtype
def test_kernel_without_residual(kernels, dtype):
    hold(problem((2, 20), 48, 24, dtype=dtype, residual=False), fast=KERNEL)


@each_stride
def test_kernel_strides(kernels, strides):
    hold(problem((3, 20), 48, 24, strides=strides), fast=KERNEL, upstream=strides)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_kernel_frozen_inputs_change_nothing_else(kernels, frozen):
    hold(problem((3, 20), 48, 24), fast=KERNEL, frozen=frozen)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "bare"])
def test_kernel_autocast(kernels, residual):
    # float16: the interpreter truncates where a GPU rounds to bfloat16.
    hold(problem((3, 20), 48, 24, residual=residual), fast=KERNEL, autocast=torch.float16)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "bare"])
def test_kernel_compiled(kernels, residual):
    batched = ["x", "residual"] if residual else ["x"]
    check_compiled(KERNEL, hold, lambda batch: problem((batch, 20), 48, 24, residual=residual), batched=batched)


def pair(impl):
    def both(x, residual, x1, residual1, scale=None, scale1=None, **weights):
        params = [ops.AdapterParams(**{n: weights[prefix + n] for n in WEIGHTS}) for prefix in ("", "other_")]
        return tuple(adapters([x, x1], params, [residual, residual1], [scale, scale1], impl=impl))

    return both


def two_streams(dtype):
    return {
        **problem((2, 9), 48, 24, dtype=dtype),
        "x1": draw(20, 2, 33, 48, dtype=dtype, strides="slice"),
        "residual1": draw(21, 2, 33, 48, dtype=dtype),
        **adapter_weights(22, 48, 24, "other_", dtype=dtype),
    }


@each_kernel_dtype
def test_kernel_serves_two_streams_in_one_launch(kernels, dtype):
    tensors = two_streams(dtype)
    got = check("adapter", pair("triton"), pair("reference"), tensors, reductions=[48, 24, 66])
    assert not torch.equal(got["grad_down_weight"], got["grad_other_down_weight"])


def dropped(tensors):
    """Some tokens' adapters left out, the others scaled up."""
    scales = {"scale": torch.tensor([0.0, 1.25]).view(2, 1, 1), "scale1": draw(30, 1, 33, 1).abs()}
    names = {"x": "scale", "x1": "scale1"}
    return tensors | {s: scales[s].to(tensors[x]) for x, s in names.items() if x in tensors}


FROZEN_SCALES = {"scale", "scale1"}


@each_kernel_dtype
def test_kernel_scales_rows(kernels, dtype):
    """Stochastic depth, the scale broadcast over tokens or over clips, two streams."""
    tensors = dropped(two_streams(dtype))
    options = {"reductions": [48, 24, 66], "frozen": FROZEN_SCALES}
    got = check("adapter", pair("triton"), pair("reference"), tensors, **options)
    assert torch.equal(got["out0"][0], tensors["residual"][0])
    assert not got["grad_x"][0].any()


@pytest.mark.parametrize("frozen", [set(), set(WEIGHTS), {"x"}], ids=["none", "weights", "x"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "bare"])
def test_kernel_scales_rows_with_frozen_inputs(kernels, residual, frozen):
    hold(dropped(problem((2, 40), 48, 24, residual=residual)), fast=KERNEL, frozen=frozen | FROZEN_SCALES)


@pytest.mark.parametrize(
    "scale",
    [
        lambda: torch.full((1, 1, 1), 2.0),
        lambda: draw(1, 2, 1, 1),
        lambda: draw(1, 1, 5, 1),
        lambda: draw(1, 2, 5, 3)[..., :1],
    ],
    ids=["one", "clips", "tokens", "strided"],
)
def test_kernel_takes_scales_of_any_strides(kernels, scale):
    """One number for all, expanded, was read beyond its end."""
    hold(problem((2, 5), 16, 8) | {"scale": scale()}, fast=KERNEL, frozen=FROZEN_SCALES)


@each_dtype
def test_scaled_rows(dtype):
    hold(dropped(problem((2, 20), 48, 24, dtype=dtype)), frozen=FROZEN_SCALES)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2, 20), r"scale: expected \[2, 20, 1\], or ones in it, got \[2, 20\]"),
        (torch.ones(2, 3, 1), r"scale: expected \[2, 20, 1\], or ones in it, got \[2, 3, 1\]"),
        (torch.ones(2, 1, 1, requires_grad=True), "expected a constant"),
    ],
    ids=["dimensions", "sizes", "trained"],
)
def test_scale_errors(scale, message):
    with pytest.raises(ValueError, match=message):
        FAST(**problem((2, 20), 48, 24), scale=scale)


def test_two_streams_are_one_launch(kernels, monkeypatch):
    run, names = launch.run, []
    monkeypatch.setattr(
        launch, "run", lambda kernel, *args, **options: names.append(kernel.__name__) or run(kernel, *args, **options)
    )
    evaluate(pair("triton"), two_streams(torch.float32))
    assert names == ["_adapter_fwd_kernel", "_adapter_bwd_kernel", "_adapter_bwd_weight_kernel", "_adapter_bwd_weight_kernel"]


@pytest.mark.parametrize(
    ("frozen", "launched"),
    [
        (set(WEIGHTS), ["_adapter_fwd_kernel", "_adapter_bwd_kernel"]),
        ({"x", *WEIGHTS}, ["_adapter_fwd_kernel"]),
    ],
    ids=["weights", "all-but-the-residual"],
)
def test_kernel_does_nothing_for_frozen_weights(kernels, monkeypatch, frozen, launched):
    run, names = launch.run, []
    monkeypatch.setattr(
        launch, "run", lambda kernel, *args, **options: names.append(kernel.__name__) or run(kernel, *args, **options)
    )
    evaluate(KERNEL, problem((3, 20), 48, 24), frozen=frozen)
    assert names == launched


def test_kernel_keeps_its_inputs_alone(kernels):
    """The hidden tokens are made again in the backward."""
    tensors = {name: x.requires_grad_() for name, x in problem((3, 20), 48, 24).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        KERNEL(**tensors)
    assert set(saved) == {x.data_ptr() for name, x in tensors.items() if name != "residual"}


def test_kernel_repeats_bit_equal(kernels):
    tensors = problem((3, 150), 48, 24)
    first = evaluate(KERNEL, tensors)
    for _ in range(2):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(KERNEL, tensors).items())


def test_kernel_as_pytorch_sees_it(kernels):
    """Schema, fake and dispatch keys of the registered operators."""
    x, residual, *weights = problem((5,), 48, 24).values()
    operators = torch.ops.stgcma_fast
    each = [[w, w] for w in weights]
    torch.library.opcheck(operators.adapter_fwd.default, ([x, x[:3]], [residual, residual[:3]], [], *each, torch.float32))
    scales = [torch.ones(5, device=x.device), torch.ones(3, device=x.device)]
    torch.library.opcheck(operators.adapter_fwd.default, ([x, x[:3]], [], scales, *each, torch.float32))
    for needs in ((True, True), (True, False), (False, True)):
        for scaled in ([], scales):
            arguments = [x, x[:3]], [x, x[:3]], scaled, *each[:3], *needs, torch.float32
            torch.library.opcheck(operators.adapter_bwd.default, arguments)


def test_kernel_refuses_wide_bottlenecks(kernels):
    with pytest.raises(NotImplementedError, match="a bottleneck width of at most 128, got 129"):
        KERNEL(**problem((3, 5), 48, 129))


def test_a_third_stream_is_not_forgotten(kernels):
    """The kernels take the first and the last of their streams: three are served one by one."""
    params = ops.AdapterParams(**adapter_weights(2, 48, 24))
    xs = [draw(seed, 5, 48) for seed in range(3)]
    outs = adapters(xs, [params] * 3, [None] * 3, [None] * 3, impl="triton")
    for out, x in zip(outs, xs, strict=True):
        torch.testing.assert_close(out, reference.adapter(x, params))


def test_streams_of_two_dtypes_keep_them(kernels):
    xs = [draw(0, 5, 48, dtype=torch.float16), draw(1, 5, 48)]
    params = [ops.AdapterParams(**adapter_weights(2, 48, 24, dtype=x.dtype)) for x in xs]
    outs = adapters(xs, params, [None, None], [None, None], impl="triton")
    assert [out.dtype for out in outs] == [torch.float16, torch.float32]
    torch.testing.assert_close(outs[1], reference.adapter(xs[1], params[1]))


def test_kernel_takes_a_single_row(kernels):
    """``[D]``, without leading dimensions."""
    params = ops.AdapterParams(**adapter_weights(2, 48, 24))
    x = draw(0, 48)
    torch.testing.assert_close(ops.adapter(x, params, x, impl="triton"), reference.adapter(x, params, x))


def test_kernel_refuses_float64_residuals(kernels):
    """They would be added in float32."""
    tensors = problem((3, 5), 48, 24)
    with pytest.raises(NotImplementedError, match=r"residuals of float32, bfloat16 and float16, got torch.float64"):
        KERNEL(**tensors | {"residual": tensors["residual"].double()})


def test_rows_far_apart_are_copied(kernels):
    """Offsets inside a block of rows have 32 bits."""
    apart = torch.zeros(2**18 * 2 + 4, device=Device.name).as_strided((3, 4), (2**18, 1))
    assert launch.unit_stride(apart).is_contiguous()
    near = torch.zeros(32, device=Device.name).as_strided((3, 4), (8, 1))
    assert launch.unit_stride(near) is near

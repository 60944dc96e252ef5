"""Layer normalization."""

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.ops.layer_norm import _neighbours, branched_layer_norm, packed_layer_norm
from tests.support.inputs import Device, draw, each_dtype, each_kernel_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

SIZES = {
    "stage1": ((2, 49), 192),
    "merging": ((5,), 768),
    "odd": ((3, 7), 100),
    "one-row": ((1,), 33),
    "four-channels": ((4, 3), 4),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
FROZEN = {"trained": (), "frozen": ("weight", "bias"), "weight-alone": ("x", "bias"), "bias-alone": ("x", "weight")}
each_training = pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())


def problem(leading, channels, *, dtype=torch.float32, strides="packed", shift=0.0, scale=1.0):
    return {
        "x": draw(0, *leading, channels, dtype=dtype, shift=shift, scale=scale, strides=strides),
        "weight": draw(1, channels, dtype=dtype, shift=1, scale=0.2),
        "bias": draw(2, channels, dtype=dtype, scale=0.2),
    }


def written_out(x, weight, bias, eps=1e-5):
    """The equation, apart from the library's function; statistics in float32 or better, as its kernels keep them."""
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed * weight + bias).to(x.dtype)


def hold(tensors, *, fast=ops.layer_norm, law=written_out, **options):
    rows = tensors["x"].shape[:-1].numel()
    if tensors["x"].dtype != torch.float32 and not {"weight", "bias"} <= set(options.get("frozen", ())):
        # PyTorch sums the gradients of trained parameters over the rows in the dtype of the input.
        law = reference.layer_norm
    return check("layer_norm", fast, law, tensors, reductions=[len(tensors["weight"]), rows], **options)


@each_training
@each_dtype
@each_size
def test_sizes(size, dtype, frozen):
    got = hold(problem(*size, dtype=dtype), frozen=frozen)
    assert got.keys() == {"out0", *(f"grad_{name}" for name in ("x", "weight", "bias") if name not in frozen)}


@each_dtype
@each_stride
def test_strided_inputs(strides, dtype):
    hold(problem((3, 20), 48, dtype=dtype, strides=strides), frozen=("weight", "bias"))


@each_dtype
@each_stride
def test_strided_upstream_gradients(strides, dtype):
    hold(problem((3, 20), 48, dtype=dtype), upstream=strides, frozen=("weight", "bias"))


def test_rows_of_large_mean():
    """The variance is that of the centred row, not a difference of two large numbers."""
    hold(problem((3, 20), 96, shift=100.0))


@pytest.mark.parametrize("value", [0.0, -3.0], ids=["zeros", "constant"])
@each_dtype
def test_constant_rows(dtype, value):
    """Variance 0: the output is the bias."""
    tensors = problem((2, 5), 64, dtype=dtype)
    tensors["x"][:, ::2] = value
    got = hold(tensors)
    assert torch.equal(got["out0"][:, ::2], tensors["bias"].expand(2, 3, -1))


@each_size
def test_equals_the_equation_in_float64(size):
    check_equal_in_float64(lambda **tensors: ops.layer_norm(**tensors, impl="torch"), written_out, problem(*size))
    check_equal_in_float64(lambda **tensors: ops.layer_norm(**tensors, impl="reference"), written_out, problem(*size))


def test_eps():
    """Rows so small that eps decides."""
    tensors = problem((3, 20), 48, scale=1e-3)
    hold(
        tensors,
        fast=lambda **tensors: ops.layer_norm(**tensors, eps=1e-3),
        law=lambda **tensors: written_out(**tensors, eps=1e-3),
    )
    assert (ops.layer_norm(**tensors) - ops.layer_norm(**tensors, eps=1e-3)).abs().max() > 0.1


@each_low_dtype
def test_autocast(dtype):
    """Autocast runs layer normalization in float32: the yardstick is that of float32."""
    tensors = problem((3, 20), 48)
    with torch.autocast("cpu", dtype):
        assert ops.layer_norm(**tensors).dtype == torch.float32
    hold(tensors, law=reference.layer_norm, autocast=dtype)


def test_gradcheck_of_the_reference():
    inputs = [x.requires_grad_() for x in problem((2, 3), 4, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(reference.layer_norm, inputs)


def test_compiled():
    check_compiled(ops.layer_norm, hold, lambda batch: problem((batch, 20), 48), batched=["x"])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_errors(name):
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[48\], got \[47\]"):
        ops.layer_norm(**problem((3, 20), 48) | {name: draw(0, 47)})


KERNEL_SIZES = SIZES | {"swin-l": ((3, 5), 1536), "many-rows": ((70,), 96)}
FREEZE = ("weight", "bias")


def kernel(x, weight, bias, **options):
    return ops.layer_norm(x, weight, bias, impl="triton", **options)


@each_kernel_dtype
@pytest.mark.parametrize("size", KERNEL_SIZES.values(), ids=KERNEL_SIZES.keys())
def test_kernel_sizes(kernels, size, dtype):
    hold(problem(*size, dtype=dtype), fast=kernel, frozen=FREEZE)


@each_stride
def test_kernel_strides(kernels, strides):
    hold(problem((3, 20), 48, strides=strides), fast=kernel, upstream=strides, frozen=FREEZE)


@pytest.mark.parametrize("value", [0.0, -3.0], ids=["zeros", "constant"])
def test_kernel_constant_rows(kernels, value):
    tensors = problem((2, 5), 64)
    tensors["x"][:, ::2] = value
    got = hold(tensors, fast=kernel, frozen=FREEZE)
    assert torch.equal(got["out0"][:, ::2], tensors["bias"].expand(2, 3, -1))


def test_kernel_rows_of_large_mean(kernels):
    hold(problem((3, 20), 96, shift=100.0), fast=kernel, frozen=FREEZE)


def test_kernel_compiled(kernels):
    check_compiled(
        kernel,
        lambda tensors, **options: hold(tensors, frozen=FREEZE, **options),
        lambda batch: problem((batch, 20), 48),
        batched=["x"],
    )


@each_low_dtype
def test_kernel_autocast(kernels, dtype):
    hold(problem((3, 20), 48), fast=kernel, law=reference.layer_norm, autocast=dtype, frozen=FREEZE)


def test_kernel_refuses_trained_parameters(kernels):
    tensors = problem((3, 20), 48)
    with pytest.raises(NotImplementedError, match="layer_norm: impl='triton' was asked for, but its kernel gives weight and"):
        kernel(**tensors | {"weight": tensors["weight"].requires_grad_()})
    with torch.no_grad():
        kernel(**tensors)


def packed(x, weight, bias, other, impl="triton"):
    return packed_layer_norm([x, other], weight, bias, impl=impl)


@each_kernel_dtype
def test_kernel_packs_two_streams(kernels, dtype):
    """Streams of different sizes and strides, one behind the other, in one launch."""
    tensors = problem((2, 9), 48, dtype=dtype) | {"other": draw(3, 2, 5, 48, dtype=dtype, strides="slice")}
    rows = [9 * 2, 5 * 2]
    got = hold(tensors, fast=packed, law=lambda **t: packed(**t, impl="reference"), frozen=FREEZE)
    for part, name in zip(got["out0"].split(rows), ("x", "other"), strict=True):
        alone = kernel(tensors[name], tensors["weight"], tensors["bias"])
        assert torch.equal(part, alone.flatten(0, 1))


@each_low_dtype
def test_packed_rows_under_autocast_are_ready_for_the_product(kernels, dtype):
    tensors = problem((2, 9), 48) | {"other": draw(3, 2, 5, 48)}
    with torch.autocast(Device.name, dtype):
        got, wanted = packed(**tensors), packed(**tensors, impl="torch")
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted.to(dtype))


def branched(x, weight, bias, other, impl="triton"):
    """Both uses of the streams."""
    rows, again = branched_layer_norm([x, other], weight, bias, impl=impl)
    return rows, *again


@each_kernel_dtype
@each_stride
def test_kernel_adds_the_gradient_of_the_residual(kernels, dtype, strides):
    """Streams come back the same, and what flows back through them is added to the branch's gradient with one rounding."""
    tensors = problem((2, 9), 48, dtype=dtype) | {"other": draw(3, 2, 5, 48, dtype=dtype, strides=strides)}
    got = hold(tensors, fast=branched, law=lambda **t: branched(**t, impl="reference"), frozen=FREEZE, upstream=strides)
    assert torch.equal(got["out1"], tensors["x"])
    assert torch.equal(got["out2"], tensors["other"])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_kernel_with_some_uses_alone(kernels, used):
    """A stream without a residual, a residual without a branch."""
    tensors = problem((2, 9), 48) | {"other": draw(3, 2, 5, 48)}
    gradients = []
    for impl in ("triton", "reference"):
        xs = [tensors[name].clone().requires_grad_() for name in ("x", "other")]
        outs = branched(xs[0], tensors["weight"], tensors["bias"], xs[1], impl)
        torch.autograd.backward([outs[i] for i in used], [draw(10 + i, *outs[i].shape) for i in used])
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad for x in xs])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def merging(x, weight, bias, other, impl="triton"):
    return packed_layer_norm([x, other], weight, bias, side=6, impl=impl)


@each_stride
def test_kernel_merges_neighbours_in_place(kernels, strides):
    """2 x 2 tokens of two streams' grids, without a copy of either."""
    tensors = {"x": draw(0, 2, 36, 5, strides=strides), "other": draw(1, 2, 36, 5)}
    tensors |= {"weight": draw(2, 20, shift=1, scale=0.2), "bias": draw(3, 20, scale=0.2)}
    got = hold(tensors, fast=merging, law=lambda **t: merging(**t, impl="reference"), frozen=FREEZE, upstream=strides)
    assert got["out0"].shape == (36, 20)


def test_neighbours_are_merged_in_the_published_order():
    x = torch.arange(16.0).view(1, 16, 1)
    assert _neighbours(x, 4)[0].tolist() == [[0, 4, 1, 5], [2, 6, 3, 7], [8, 12, 9, 13], [10, 14, 11, 15]]


def test_kernel_as_pytorch_sees_it(kernels):
    """Schema, fake and dispatch keys of the registered operators."""
    x, weight, bias = (problem((5,), 48)[name] for name in ("x", "weight", "bias"))
    arguments = ([x, x[:3]], weight, bias, 1e-5, 0, torch.float32)
    torch.library.opcheck(torch.ops.stgcma_fast.layer_norm_fwd.default, arguments)
    y, mean, rstd = torch.ops.stgcma_fast.layer_norm_fwd(*arguments)
    torch.library.opcheck(torch.ops.stgcma_fast.layer_norm_bwd.default, (y, [x, x[:3]], weight, mean, rstd, [], 0))
    again = [torch.ones_like(x), torch.ones_like(x[:3])]
    torch.library.opcheck(torch.ops.stgcma_fast.layer_norm_bwd.default, (y, [x, x[:3]], weight, mean, rstd, again, 0))


def test_kernel_repeats_bit_equal(kernels):
    tensors = problem((3, 20), 192)
    first = evaluate(kernel, tensors, frozen=FREEZE)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(kernel, tensors, frozen=FREEZE).items())


PACKED_ERRORS = {
    "three": ({"xs": [draw(0, 5, 8)] * 3}, "xs: expected one or two streams of one dtype"),
    "dtypes": ({"xs": [draw(0, 5, 8), draw(0, 5, 8).half()]}, "xs: expected one or two streams of one dtype"),
    "channels": ({"xs": [draw(0, 5, 8), draw(0, 5, 9)]}, r"weight: expected shape \[9\], got \[8\]"),
    "odd": ({"xs": [draw(0, 1, 25, 2)], "side": 5}, "side: expected an even number"),
    "side": ({"xs": [draw(0, 1, 36, 2)], "side": 4}, "side: expected an even number, and side"),
}


@pytest.mark.parametrize(("changed", "message"), PACKED_ERRORS.values(), ids=PACKED_ERRORS.keys())
def test_packed_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        packed_layer_norm(**{"weight": draw(1, 8), "bias": draw(2, 8), "impl": "triton"} | changed)


def test_kernel_takes_a_single_row_and_expanded_parameters(kernels):
    x, one = draw(0, 48), draw(1, 1)
    got = ops.layer_norm(x, one.expand(48), one.expand(48), impl="triton")
    torch.testing.assert_close(got, reference.layer_norm(x, one.expand(48), one.expand(48)))


def test_kernel_refuses_rows_too_long_for_registers(kernels):
    with pytest.raises(NotImplementedError, match="rows of at most 8192 channels, got 8193"):
        kernel(**problem((1,), 8193))


@pytest.mark.parametrize("streams", [1, 2])
def test_kernel_compiles_without_gradients(kernels, streams):
    """Dynamo dropped the context of a variadic forward, and with it the first argument."""
    tensors = problem((5,), 48)
    xs = [tensors["x"], tensors["x"][:3]][:streams]
    compiled = torch.compile(
        lambda *xs: packed_layer_norm(xs, tensors["weight"], tensors["bias"], impl="triton"), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*xs), packed_layer_norm(xs, tensors["weight"], tensors["bias"], impl="triton"))

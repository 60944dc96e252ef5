"""The bottleneck adapter."""

import pytest
import torch

from stgcma_fast import ops, reference
from tests.support.inputs import adapter_weights, draw, each_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64

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

    def adapter(x, residual=None, **weights):
        params = ops.AdapterParams(**weights)
        return of.adapter(x, params, residual) if impl is None else of.adapter(x, params, residual, impl=impl)

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

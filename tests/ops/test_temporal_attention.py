"""Attention over time."""

from functools import partial
from importlib import import_module

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.ops.temporal_attention import temporal_attentions
from tests.support.inputs import draw, each_dtype, each_low_dtype, each_stride, strided
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

# Clips, frames, token positions, heads, channels of a head.
SIZES = {
    "swin": (1, 10, 49, 3, 32),
    "clip": (2, 10, 17, 2, 96),
    "five-frames": (2, 5, 12, 2, 64),
    "one-frame": (2, 1, 7, 2, 16),
    "one-site": (1, 3, 1, 1, 5),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])


def problem(batch, frames, sites, heads, head_dim, *, dtype=torch.float32, strides="packed", scale=1.0, bias=True):
    tensors = {"qkv": draw(0, batch, frames, sites, 3, heads, head_dim, dtype=dtype, scale=scale, strides=strides)}
    return tensors | ({"bias": draw(1, heads, frames, frames, dtype=dtype)} if bias else {})


def function(of, **options):
    return lambda qkv, bias=None: of.temporal_attention(qkv, bias, scale=qkv.shape[-1] ** -0.5, **options)


def hold(tensors, *, fast=None, **options):
    batch, frames, sites, _, _, head_dim = tensors["qkv"].shape
    return check(
        "temporal_attention",
        fast or function(ops),
        function(reference),
        tensors,
        reductions=[head_dim, frames, batch * sites],
        **options,
    )


@each_bias
@each_dtype
@each_size
def test_sizes(size, dtype, bias):
    hold(problem(*size, dtype=dtype, bias=bias))


@each_dtype
@each_stride
def test_strided_inputs(strides, dtype):
    hold(problem(2, 5, 6, 2, 16, dtype=dtype, strides=strides))


@each_dtype
@each_stride
def test_strided_upstream_gradients(strides, dtype):
    hold(problem(2, 5, 6, 2, 16, dtype=dtype), upstream=strides)


@each_dtype
def test_large_scores(dtype):
    hold(problem(2, 10, 6, 2, 16, dtype=dtype, scale=30**0.5))


@each_bias
@each_size
def test_equals_the_reference_in_float64(size, bias):
    check_equal_in_float64(function(ops, impl="torch"), function(ops, impl="reference"), problem(*size, bias=bias))


@each_bias
def test_is_attention_over_time(bias):
    """One query at a time, as the equation says it."""
    tensors = problem(2, 4, 3, 2, 5, dtype=torch.float64, bias=bias)
    qkv = tensors["qkv"]
    batch, frames, sites, _, heads, head_dim = qkv.shape
    expected = torch.empty(batch, frames, sites, heads, head_dim, dtype=torch.float64)
    for b, t, s, h in torch.cartesian_prod(*map(torch.arange, (batch, frames, sites, heads))).tolist():
        scores = torch.stack([qkv[b, t, s, 0, h].dot(qkv[b, k, s, 1, h]) for k in range(frames)]) / head_dim**0.5
        scores = scores + (tensors["bias"][h, t] if bias else 0)
        weights = scores.exp() / scores.exp().sum()
        expected[b, t, s, h] = sum(w * qkv[b, k, s, 2, h] for k, w in enumerate(weights))
    torch.testing.assert_close(function(ops)(**tensors), expected.flatten(-2), rtol=1e-12, atol=1e-12)


def test_is_multi_head_attention():
    """PyTorch's own module at each site, with identities for its projections."""
    qkv = problem(1, 6, 4, 2, 8, dtype=torch.float64, bias=False)["qkv"]
    module = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(16).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(16))
    sites = qkv[0].flatten(-2).permute(2, 1, 0, 3)  # [3, S, T, h * d]
    expected = module(*sites, need_weights=False)[0].transpose(0, 1)[None]
    torch.testing.assert_close(function(ops)(qkv), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["qkv", "bias"])
def test_frozen_inputs_change_nothing_else(frozen):
    got = hold(problem(2, 5, 6, 2, 16), frozen={frozen})
    assert f"grad_{frozen}" not in got


def test_repeated_runs_are_bit_equal(all_threads):
    tensors = problem(2, 10, 49, 3, 32)
    first = evaluate(function(ops), tensors)
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(function(ops), tensors).items())


@each_bias
@each_low_dtype
def test_autocast(dtype, bias):
    hold(problem(2, 5, 6, 2, 16, bias=bias), autocast=dtype)


@each_bias
def test_gradcheck_of_the_reference(bias):
    inputs = [x.requires_grad_() for x in problem(1, 3, 2, 2, 3, dtype=torch.float64, bias=bias).values()]
    assert torch.autograd.gradcheck(function(reference), inputs)


@each_bias
def test_compiled(bias):
    check_compiled(function(ops), hold, lambda batch: problem(batch, 5, 6, 2, 16, bias=bias), batched=["qkv"])


ERRORS = {
    "qkv": ({"qkv": draw(0, 2, 5, 6, 2, 2, 16)}, r"qkv: expected shape \[B, T, S, 3, h, d\], got \[2, 5, 6, 2, 2, 16\]"),
    "dimensions": ({"qkv": draw(0, 2, 5, 6, 96)}, r"qkv: expected shape \[B, T, S, 3, h, d\], got \[2, 5, 6, 96\]"),
    "heads": ({"bias": draw(0, 3, 5, 5)}, r"bias: expected shape \[2, 5, 5\], got \[3, 5, 5\]"),
    "frames": ({"bias": draw(0, 2, 6, 6)}, r"bias: expected shape \[2, 5, 5\], got \[2, 6, 6\]"),
    "dtype": ({"bias": draw(0, 2, 5, 5).half()}, "expected one floating dtype.*qkv torch.float32, bias torch.float16"),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        partial(ops.temporal_attention, scale=0.25)(**problem(2, 5, 6, 2, 16) | changed)


# What a tile of 32 or 64 rows makes of it: full, with rows to spare, one site alone, sites to spare.
# Of the models' sites there are a few tiles.
KERNEL_SIZES = SIZES | {
    "swin": (1, 10, 11, 3, 32),
    "clip": (2, 10, 4, 2, 96),
    "full-tile": (1, 16, 5, 2, 64),
    "a-site-a-tile": (1, 20, 3, 2, 40),
    "most-frames": (1, 32, 2, 1, 64),
    "most-channels": (3, 8, 7, 1, 128),
    "one-channel": (2, 4, 3, 2, 1),
    "one-number": (1, 1, 1, 1, 1),
}
LARGE_SIZES = {"33": (1, 33, 3, 1, 80), "64": (1, 64, 2, 2, 32), "widest": (1, 64, 1, 1, 128)}
# A tile holds three sites of ten frames.
SMALL = (2, 10, 7, 2, 16)


def kernel(qkv, bias=None):
    return function(ops, impl="triton")(qkv, bias)


@each_bias
@each_dtype
@pytest.mark.parametrize("size", KERNEL_SIZES.values(), ids=KERNEL_SIZES.keys())
def test_kernel_sizes(kernels, size, dtype, bias):
    hold(problem(*size, dtype=dtype, bias=bias), fast=kernel)


@each_low_dtype
@pytest.mark.parametrize("size", LARGE_SIZES.values(), ids=LARGE_SIZES.keys())
def test_kernel_many_frames(kernels, size, dtype):
    hold(problem(*size, dtype=dtype), fast=kernel)


@each_stride
def test_kernel_strides(kernels, strides):
    tensors = problem(*SMALL, strides=strides)
    hold(tensors | {"bias": strided(tensors["bias"], strides)}, fast=kernel, upstream=strides)


def test_kernel_reads_in_place(kernels):
    """Streams as a block packs them: rows of one are apart, and its head channels are a part of wider rows."""
    batch, frames, sites, heads, head_dim = SMALL
    around = draw(0, batch, sites + 3, frames, heads, 4, head_dim + 8)
    qkv = around[:, 2:-1, :, :, 1:, 8:].permute(0, 2, 1, 4, 3, 5)
    hold(problem(*SMALL) | {"qkv": qkv}, fast=kernel)


@each_dtype
def test_kernel_large_scores(kernels, dtype):
    hold(problem(2, 10, 6, 2, 16, dtype=dtype, scale=30**0.5), fast=kernel)


@pytest.mark.parametrize("frozen", ["qkv", "bias"])
def test_kernel_frozen_inputs_change_nothing_else(kernels, frozen):
    every = evaluate(kernel, problem(*SMALL))
    got = hold(problem(*SMALL), fast=kernel, frozen={frozen})
    assert got.keys() == every.keys() - {f"grad_{frozen}"}
    assert all(torch.equal(x, every[name]) for name, x in got.items())


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [100, 65536], ids=["many-rounds", "one-round"])
def test_kernel_tiles(kernels, monkeypatch, rows, block):
    """Every size of a tile, in one pass and in several over the sites, the last of which is not full."""
    launchers = import_module("stgcma_fast.kernels.temporal_attention")
    monkeypatch.setattr(launchers, "ROWS", rows)
    candidates = [{"BLOCK": block, "num_warps": 4, "num_stages": 1}]
    monkeypatch.setattr(launchers, "_candidates", lambda qkv: candidates)
    hold(problem(*SMALL), fast=kernel)


@each_bias
def test_kernel_compiled(kernels, bias):
    check_compiled(
        kernel,
        hold,
        lambda batch: problem(batch, 5, 4, 1, 16, bias=bias),
        batched=["qkv"],
    )


@each_bias
@each_low_dtype
def test_kernel_autocast(kernels, dtype, bias):
    got = hold(problem(*SMALL, bias=bias), fast=kernel, autocast=dtype)
    assert got["out0"].dtype == dtype
    assert got["grad_qkv"].dtype == torch.float32


@each_low_dtype
def test_kernel_autocast_of_ready_inputs(kernels, dtype):
    """In the model a linear layer has already given the autocast dtype, and the bias is a float32 parameter."""
    got = hold(problem(*SMALL, dtype=dtype) | {"bias": problem(*SMALL)["bias"]}, fast=kernel, autocast=dtype)
    assert got["grad_bias"].dtype == torch.float32


HALF = torch.float16
REFUSED = {
    "frames": ((1, 65, 1, 1, 1), HALF, "its kernels take at most 64 frames of 1 channels in torch.float16, got 65"),
    "channels": ((1, 2, 1, 1, 129), HALF, "its kernels take heads of at most 128 channels, got 129"),
    "both": ((1, 65, 1, 1, 129), HALF, "heads of at most 128 channels, got 129; its kernels take at most 64 frames"),
    "float32": ((1, 33, 1, 1, 64), torch.float32, "its kernels take at most 32 frames of 64 channels in torch.float32, got 33"),
    "wide-float32": ((1, 17, 1, 1, 65), torch.float32, "its kernels take at most 16 frames of 65 channels in torch.float32"),
}


@pytest.mark.parametrize(("size", "dtype", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_kernel_refuses(kernels, size, dtype, message):
    with pytest.raises(NotImplementedError, match=f"temporal_attention: impl='triton' was asked for, but .*{message}"):
        kernel(**problem(*size, dtype=dtype))


def test_kernel_limits_are_those_of_the_autocast_dtype(kernels):
    hold(problem(1, 33, 1, 1, 64), fast=kernel, autocast=HALF)


@each_bias
def test_kernel_as_pytorch_sees_it(kernels, bias):
    """Schema, fake and dispatch keys of the registered operators."""
    tensors = problem(2, 5, 3, 2, 16, bias=bias)
    arguments = ([tensors["qkv"]] * 2, [tensors.get("bias")] * 2, 0.25)
    torch.library.opcheck(torch.ops.stgcma_fast.temporal_attention_fwd.default, arguments)
    outs = torch.ops.stgcma_fast.temporal_attention_fwd(*arguments)
    for wanted in [(True, True), (True, False), (False, True)] if bias else [(True, False)]:
        torch.library.opcheck(torch.ops.stgcma_fast.temporal_attention_bwd.default, (outs, *arguments, *wanted))


def test_kernel_repeats_bit_equal(kernels):
    # The interpreter runs one program after another: more of them cannot race there.
    tensors = problem(2, 10, 19 if kernels == "cuda" else 4, 3, 32)
    first = evaluate(kernel, tensors)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(kernel, tensors).items())


@each_bias
def test_kernel_serves_two_streams(kernels, bias):
    """Each with its own sites and bias; gradients of qkv lie one behind the other."""
    first, second = problem(2, 5, 6, 2, 16, bias=bias), problem(2, 5, 3, 2, 16, bias=bias)
    tensors = first | {f"{name}1": 0.5 * x for name, x in second.items()}

    def both(impl):
        return lambda qkv, qkv1, bias=None, bias1=None: tuple(
            temporal_attentions([qkv, qkv1], [bias, bias1], scale=0.25, impl=impl)
        )

    check("temporal_attention", both("triton"), both("reference"), tensors, reductions=[16, 5, 12])
    leaves = [tensors[name].detach().requires_grad_() for name in ("qkv", "qkv1")]
    outs = temporal_attentions(leaves, [None, None], scale=0.25, impl="triton")
    grads = torch.autograd.grad(outs, leaves, [draw(7, *out.shape) for out in outs])
    assert grads[1].data_ptr() == grads[0].data_ptr() + grads[0].nbytes


@pytest.mark.parametrize("streams", [1, 2])
def test_kernel_compiles_without_gradients(kernels, streams):
    """Dynamo dropped the context of a variadic forward, and with it the first argument."""
    qkvs = [draw(seed, 1, 3, 2, 3, 1, 16) for seed in range(streams)]

    def attend(*qkvs):
        return temporal_attentions(qkvs, [None] * streams, scale=0.25, impl="triton")

    for got, wanted in zip(torch.compile(attend, fullgraph=True, backend="eager")(*qkvs), attend(*qkvs), strict=True):
        assert torch.equal(got, wanted)

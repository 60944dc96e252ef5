"""GELU and CLIP's quick form."""

import pytest
import torch

from stgcma_fast import ops, reference
from tests.support.inputs import DTYPES, Device, draw, dtype_id, each_dtype, each_low_dtype, each_stride
from tests.support.numerics import EPS32, check, check_compiled, check_equal_in_float64, evaluate

TINY32 = torch.finfo(torch.float32).smallest_normal
SIZES = {
    "clip": ((2, 17), 96),
    "odd": ((3, 5), 33),
    "two-tiles": ((), 1500),
    "one-number": ((1,), 1),
    "empty": ((0, 4), 8),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
each_form = pytest.mark.parametrize("quick", [False, True], ids=["exact", "quick"])


def problem(leading, channels, *, dtype=torch.float32, strides="packed", scale=3.0):
    return {"x": draw(0, *leading, channels, dtype=dtype, scale=scale, strides=strides)}


def function(quick, of=ops, **options):
    return lambda x: of.gelu(x, quick=quick, **options)


def written_out(quick):
    """The equation, in float32 or better."""

    def law(x):
        wide = x if x.dtype == torch.float64 else x.float()
        share = 1 / (1 + (-1.702 * wide).exp()) if quick else (1 + (wide * 0.5**0.5).erf()) / 2
        return (wide * share).to(x.dtype)

    return law


def hold(quick, tensors, *, fast, **options):
    """To the yardstick beside the reference: what the rounding of every step of an eager chain allows."""
    check("gelu", fast, function(quick, reference), tensors, reductions=[], **options)


def ulp(x, dtype):
    """Distance of the numbers of ``dtype`` around ``x``, float64."""
    info = torch.finfo(dtype)
    exponent = x.abs().clamp_min(info.smallest_normal).log2().floor()
    return info.eps * exponent.exp2()


def hold_to_one_ulp(quick, tensors, *, fast, upstream="packed"):
    """One unit in the last place of the output's dtype, plus what float32 leaves on the way to the one rounding.

    In the exact form that is the sum 1 + erf, rounded near 1 and so relative to x, not to the result; in the quick form the
    argument of the exponential, whose relative error is eps times its size, and a sigmoid below float32's normal numbers.
    """
    got = evaluate(fast, tensors, upstream=upstream)
    dtypes = [got["out0"].dtype]
    hi = evaluate(written_out(quick), {"x": tensors["x"].double()}, upstream=upstream, dtypes=dtypes)
    upstream_grad = evaluate(lambda x: 1 * x, tensors, upstream=upstream)["grad_x"]
    x, g = tensors["x"].double(), upstream_grad.double().abs()
    way = {
        "out0": EPS32 * (4 + 1.702 * x.abs()) * hi["out0"].abs() + TINY32 * x.abs() if quick else 2 * EPS32 * x.abs(),
        "grad_x": EPS32 * (4 if quick else 2) * g,
    }
    for name, wanted in hi.items():
        error = (got[name].double() - wanted).abs()
        bad = ~(error <= ulp(wanted, got[name].dtype) + way[name])
        assert not bad.any(), f"{name}: {bad.sum()} of {bad.numel()}, error {error[bad][:3]} at {tensors['x'][bad][:3]}"


def quick_and(impl):
    return [pytest.param(quick, impl, id=f"{'quick' if quick else 'exact'}-{impl}") for quick in (False, True)]


@each_dtype
@each_size
@each_form
def test_sizes(quick, size, dtype):
    if 0 in size[0]:
        assert function(quick)(**problem(*size, dtype=dtype)).shape == (*size[0], size[1])
        return
    hold(quick, problem(*size, dtype=dtype), fast=function(quick))


@each_dtype
@each_stride
@each_form
def test_strides(quick, strides, dtype):
    hold(quick, problem((3, 20), 48, dtype=dtype, strides=strides), fast=function(quick), upstream=strides)


@each_form
def test_equals_the_equation_in_float64(quick):
    for impl in ("torch", "reference"):
        check_equal_in_float64(function(quick, impl=impl), written_out(quick), problem((3, 20), 48))


@each_form
def test_forms(quick):
    """Known values: half of x at 0, all of it far above, none far below; and the two forms differ."""
    x = torch.tensor([0.0, 40.0, -40.0, 1.0])
    got = ops.gelu(x, quick=quick)
    torch.testing.assert_close(got[:3], torch.tensor([0.0, 40.0, 0.0]))
    assert got[3].item() == pytest.approx(0.8457957 if quick else 0.8413447, abs=1e-6)


@each_dtype
def test_quick_form_is_the_references_bits(dtype):
    tensors = problem((3, 20), 48, dtype=dtype)
    assert torch.equal(ops.gelu(**tensors, quick=True, impl="torch"), reference.gelu(**tensors, quick=True))


@pytest.mark.parametrize(("quick", "impl"), [*quick_and("torch"), *quick_and("triton")])
def test_only_x_is_kept(quick, impl, kernels):
    """The eager chain of the quick form keeps the sigmoid too."""

    def kept(of, **options):
        saved = {}
        x = draw(0, 3, 20, 48).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            function(quick, of, **options)(x)
        return saved, x

    saved, x = kept(ops, impl=impl)
    assert saved.keys() == {x.data_ptr()}
    assert len(kept(reference)[0]) == 1 + quick


@each_form
@each_low_dtype
def test_autocast_leaves_it_alone(quick, dtype):
    tensors = problem((3, 20), 48)
    with torch.autocast("cpu", dtype):
        assert function(quick)(**tensors).dtype == function(quick, reference)(**tensors).dtype == torch.float32
    hold(quick, tensors, fast=function(quick), autocast=dtype)


@each_form
def test_gradcheck_of_the_reference(quick):
    assert torch.autograd.gradcheck(function(quick, reference), [problem((2, 3), 4)["x"].double().requires_grad_()])


@each_form
def test_compiled(quick):
    check_compiled(
        function(quick),
        lambda tensors, **options: hold(quick, tensors, **options),
        lambda batch: problem((batch, 20), 48),
        batched=["x"],
    )


def test_errors():
    with pytest.raises(ValueError, match=r"x: expected a floating dtype, got torch\.int64"):
        ops.gelu(torch.ones(3, dtype=torch.int64), quick=True)


@each_dtype
@each_size
@each_form
def test_kernel_sizes(kernels, quick, size, dtype):
    hold_to_one_ulp(quick, problem(*size, dtype=dtype), fast=function(quick, impl="triton"))


@each_form
@each_dtype
def test_kernel_in_every_range(kernels, quick, dtype):
    """Tiny, ordinary and saturated values: no overflow on the way, and nothing but zero far below."""
    for scale in (1e-4, 0.1, 10.0, 100.0):
        hold_to_one_ulp(quick, problem((5,), 200, dtype=dtype, scale=scale), fast=function(quick, impl="triton"))


@each_form
@each_stride
def test_kernel_strides(kernels, quick, strides):
    tensors = problem((3, 20), 48, strides=strides)
    hold_to_one_ulp(quick, tensors, fast=function(quick, impl="triton"), upstream=strides)


@each_form
def test_kernel_strides_of_one_tensor_alone(kernels, quick):
    """Packed gradients of a strided input and the other way round."""
    fast = function(quick, impl="triton")
    hold_to_one_ulp(quick, problem((3, 20), 48, strides="slice"), fast=fast)
    hold_to_one_ulp(quick, problem((3, 20), 48), fast=fast, upstream="slice")


@each_form
def test_kernel_frozen_input(kernels, quick):
    """Without a gradient to give nothing is kept."""
    x = problem((3, 20), 48)["x"]
    assert ops.gelu(x, quick=quick, impl="triton").grad_fn is None
    with torch.no_grad():
        assert ops.gelu(x.requires_grad_(), quick=quick, impl="triton").grad_fn is None


@each_form
def test_kernel_compiled(kernels, quick):
    check_compiled(
        function(quick, impl="triton"),
        lambda tensors, **options: hold_to_one_ulp(quick, tensors, **options),
        lambda batch: problem((batch, 20), 48),
        batched=["x"],
    )


@each_form
@each_low_dtype
def test_kernel_autocast(kernels, quick, dtype):
    tensors = problem((3, 20), 48)
    with torch.autocast(Device.name, dtype):
        hold_to_one_ulp(quick, tensors, fast=function(quick, impl="triton"))


@each_form
def test_kernel_as_pytorch_sees_it(kernels, quick):
    """Schema, fake and dispatch keys of the registered operators."""
    x = problem((5,), 48)["x"]
    torch.library.opcheck(torch.ops.stgcma_fast.gelu_fwd.default, (x, quick))
    torch.library.opcheck(torch.ops.stgcma_fast.gelu_bwd.default, (x, x.flip(0), quick))


@each_form
def test_kernel_repeats_bit_equal(kernels, quick):
    tensors, fast = problem((3, 20), 192), function(quick, impl="triton")
    first = evaluate(fast, tensors)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(fast, tensors).items())


@pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_id)
def test_kernel_refuses(kernels, dtype):
    assert dtype not in DTYPES
    with pytest.raises(NotImplementedError, match=r"gelu: impl='triton' was asked for, but its kernels take float32, bfloat16"):
        ops.gelu(problem((2,), 5, dtype=dtype)["x"], quick=True, impl="triton")

"""`ops.linear.linear`: float32 products on the CPU by oneDNN, the library's own everywhere else."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from stgcma_fast.ops import linear as module
from stgcma_fast.ops.linear import input_gradient, linear, served_by_onednn
from tests.support.inputs import draw, dtype_id, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

# Leading shape of x, inputs, outputs.
SIZES = {
    "stage1": ((2, 49), 192, 96),
    "wide": ((64,), 96, 384),
    "odd": ((3, 37), 100, 33),
    "one-row": ((1,), 48, 17),
    "one-row-3d": ((1, 1, 1), 5, 3),
    "one-output": ((20,), 48, 1),
    "one-input": ((20,), 1, 48),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
FROZEN = [set(names) for k in range(3) for names in itertools.combinations(("x", "weight", "bias"), k)]


def problem(leading, inputs, outputs, *, bias=True, dtype=torch.float32, strides="packed"):
    tensors = {
        "x": draw(0, *leading, inputs, dtype=dtype, strides=strides),
        "weight": draw(1, outputs, inputs, dtype=dtype, scale=inputs**-0.5),
    }
    return tensors | ({"bias": draw(2, outputs, dtype=dtype)} if bias else {})


def as_library(x, weight, bias=None):
    return F.linear(x, weight, bias)


def hold(tensors, *, fast=linear, **options):
    *leading, inputs = tensors["x"].shape
    reductions = [inputs, len(tensors["weight"]), torch.Size(leading).numel()]
    return check("linear", fast, as_library, tensors, reductions=reductions, **options)


def passes_through_onednn(tensors):
    """Whether `linear` made its own step of the backward graph."""
    out = linear(**{name: x.detach().requires_grad_() for name, x in tensors.items()})
    return "OneDnnLinear" in out.grad_fn.next_functions[0][0].name()


@each_bias
@each_size
def test_sizes(size, bias, poisoned_memory, all_threads):
    tensors = problem(*size, bias=bias)
    assert passes_through_onednn(tensors)
    hold(tensors)


each_leading = pytest.mark.parametrize("leading", [(3, 20), (20,)], ids=["3d", "2d"])


@each_leading
@each_stride
def test_strided_inputs(strides, leading, poisoned_memory):
    hold(problem(leading, 48, 17, strides=strides))


@each_leading
@each_stride
def test_strided_upstream_gradients(strides, leading, poisoned_memory):
    hold(problem(leading, 48, 17), upstream=strides)


def test_strided_weight(poisoned_memory):
    """As in the folded temporal adapter, whose weight is a product, or a view."""
    tensors = problem((3, 20), 48, 48)
    hold(tensors | {"weight": tensors["weight"].t()})


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda names: "+".join(sorted(names)) + "-frozen" if names else "trained")
def test_gradients_that_are_wanted(frozen, poisoned_memory):
    tensors = problem((3, 20), 48, 17)
    got = hold(tensors, frozen=frozen)
    assert got.keys() == {"out0", *(f"grad_{name}" for name in tensors if name not in frozen)}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_keeps_its_input_only_for_a_trained_weight(trained):
    tensors = problem((3, 20), 48, 17)
    x, weight, bias = (t.requires_grad_(trained or name == "x") for name, t in tensors.items())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        linear(x, weight, bias)
    assert set(saved) == ({x.data_ptr(), weight.data_ptr()} if trained else {weight.data_ptr()})


def test_no_second_derivative():
    """A second derivative would be silently wrong, so asking for it raises."""
    x = draw(0, 4, 5).requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, draw(1, 3, 5)).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().mean().backward()


@each_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=dtype_id)
def test_other_dtypes_take_the_library_route(dtype, bias):
    tensors = problem((3, 20), 48, 17, bias=bias, dtype=dtype)
    assert not passes_through_onednn(tensors)
    got, expected = evaluate(linear, tensors), evaluate(as_library, tensors)
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_gradients_of_gradients_in_float64():
    inputs = [x.requires_grad_() for x in problem((3,), 4, 2, dtype=torch.float64).values()]
    assert torch.autograd.gradgradcheck(linear, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast(dtype):
    tensors = problem((3, 20), 48, 17)
    with torch.autocast("cpu", dtype):
        got, expected = evaluate(linear, tensors), evaluate(as_library, tensors)
    assert got["out0"].dtype == dtype
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(module, "_HAS_ONEDNN", False)
    tensors = problem((3, 20), 48, 17)
    assert not passes_through_onednn(tensors)
    check_equal_in_float64(linear, as_library, tensors)


def test_compiled():
    check_compiled(linear, hold, lambda batch: problem((batch, 20), 48, 17), batched=["x"])


@each_stride
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_id)
def test_input_gradient(dtype, strides, poisoned_memory):
    tensors = {"grad": draw(0, 3, 20, 17, dtype=dtype, strides=strides), "weight": draw(1, 17, 48, dtype=dtype)}
    check("input_gradient", input_gradient, lambda grad, weight: grad @ weight, tensors, reductions=[17], frozen=tensors)


def test_no_rows():
    """Convolutions refuse them; products do not."""
    x = torch.zeros(0, 5, requires_grad=True)
    y = linear(x, torch.ones(3, 5), torch.ones(3))
    assert y.shape == (0, 3)
    assert torch.autograd.grad(y, x, torch.zeros(0, 3))[0].shape == (0, 5)


def test_result_may_be_written_to():
    """It was a view made inside a custom function, which autograd protects."""
    x = torch.randn(4, 5, requires_grad=True)
    weight, grad = torch.randn(3, 5), torch.randn(4, 3)
    y = linear(x, weight).mul_(2)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], 2 * grad @ weight)


def test_onednn_can_be_switched_off():
    x = torch.zeros(1, 1)
    assert served_by_onednn(x, x)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not served_by_onednn(x, x)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_bfloat16_bias_of_frozen_layers_is_added_by_the_product(trained):
    """The same numbers as the library's, which writes the bias first; trained weights stay with the library."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 products")
    tensors = problem((3, 37), 96, 48, dtype=torch.bfloat16)
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_(trained)
    bias = tensors["bias"].repeat_interleave(2)[::2]  # oneDNN reads it packed
    y, wanted = linear(x, weight, bias), F.linear(x, weight, bias if trained else bias.contiguous())
    assert ("FusedBias" in y.grad_fn.next_functions[0][0].name()) != trained
    assert torch.equal(y, wanted)
    upstream = draw(3, *y.shape, dtype=torch.bfloat16)
    assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (y, wanted)))

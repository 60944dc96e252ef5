"""Frozen linear layers of float8 numbers: the law's error, the kernel that quantizes rows, the operator."""

from types import SimpleNamespace

import pytest
import torch

from stgcma_fast.ops import fp8
from stgcma_fast.ops.fp8 import fp8_linear, quantize_weight
from stgcma_fast.reference.fp8 import LARGEST, SMALLEST_SCALE, quantize_rows, scaled_product
from stgcma_fast.reference.fp8 import fp8_linear as law
from tests.support.inputs import Device, draw, each_dtype, each_stride
from tests.support.numerics import EPS32, evaluate

E4M3 = torch.float8_e4m3fn
# Half a unit in the last place of four bits, and half of the smallest number.
HALF_ULP, HALF_SMALLEST = 2.0**-4, 2.0**-10
SIZES = {"stage1": (98, 96, 288), "wide": (17, 384, 96), "one-row": (1, 48, 16), "smallest": (3, 16, 16)}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def problem(rows, inputs, outputs, *, dtype=torch.float32):
    """Rows and channels of very different sizes, which one scale a tensor would lose."""
    return {
        "x": (draw(0, rows, inputs) * draw(3, rows, 1, scale=4.0).exp()).to(dtype),
        "weight": (draw(1, outputs, inputs, scale=inputs**-0.5) * draw(4, outputs, 1, scale=2.0).exp()).to(dtype),
        "bias": draw(2, outputs, dtype=dtype),
    }


def rounding(x):
    """The most that `quantize_rows` moves each number of ``x``."""
    scale = quantize_rows(x)[1]
    return HALF_ULP * x.abs() + HALF_SMALLEST * scale + 4 * EPS32 * x.abs()


def product_bound(a, b):
    """The most that rounding both factors moves ``a @ b.T``, and what float32 adds to the sum."""
    size, err_a, err_b = a.abs() @ b.abs().T, rounding(a), rounding(b)
    return err_a @ b.abs().T + a.abs() @ err_b.T + err_a @ err_b.T + a.shape[1] * EPS32 * size


@pytest.fixture
def emulated(monkeypatch):
    """The operator on the CPU, its product being the law's."""
    monkeypatch.setattr(fp8, "fp8_refusals", lambda device: ())
    monkeypatch.setattr(fp8, "_product", lambda *args: scaled_product(*args).bfloat16())


@each_size
def test_error_of_the_law_is_that_of_rounding_to_float8(size):
    tensors = {name: t.double() for name, t in problem(*size).items()}
    x, weight, bias = tensors.values()
    x.requires_grad_()
    y = law(x, weight, bias)
    assert bool(((y - (x @ weight.T + bias)).abs() <= product_bound(x.detach(), weight) + EPS32 * bias.abs()).all())
    grad = draw(5, *y.shape).double() * draw(6, len(y), 1, scale=4.0).double().exp()
    (got,) = torch.autograd.grad(y, x, grad)
    assert bool(((got - grad @ weight).abs() <= product_bound(grad, weight.T)).all())


def test_error_of_the_law_is_not_zero():
    x, weight, bias = problem(*SIZES["stage1"]).values()
    assert (law(x, weight, bias) - (x @ weight.T + bias)).norm() > 0.01 * (x @ weight.T).norm()


def test_quantized_rows():
    """A row's largest number becomes the largest of float8; zeros stay, and what is not finite shows in all of its row."""
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-42, 0.0, 0.0], [3e38, 1.0, 0.0]])
    rows, scale = quantize_rows(x)
    assert rows[0].tolist() == [224.0, -448.0, 112.0]
    assert scale[:3, 0].tolist() == pytest.approx([2 / LARGEST, SMALLEST_SCALE, SMALLEST_SCALE])
    assert not rows[1:3].float().any()
    assert rows[3, 0] == LARGEST
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert (lambda q, s: q.float() * s)(*quantize_rows(torch.tensor([[1.0, bad]]))).isnan().all()


def same_as_the_law(x):
    """The kernel's bits; in the interpreter, which rounds to float8 wrongly, from its numbers before they are rounded."""
    rows, scale = torch.ops.stgcma_fast.quantize_fwd(x, torch.float32 if Device.name == "cpu" else E4M3)
    wanted_rows, wanted_scale = quantize_rows(x)
    assert torch.equal(rows.to(E4M3).float(), wanted_rows.float())
    assert torch.equal(scale, wanted_scale)
    assert rows.is_contiguous()


@each_dtype
@pytest.mark.parametrize(("rows", "channels"), [(37, 96), (1, 16), (5, 1536), (3, 100)])
def test_kernel_sizes(kernels, rows, channels, dtype):
    same_as_the_law((draw(0, rows, channels) * draw(1, rows, 1, scale=4.0).exp()).clamp(-6e4, 6e4).to(dtype))


@each_stride
def test_kernel_strides(kernels, strides):
    same_as_the_law(draw(0, 20, 48, strides=strides))


def test_kernel_at_the_ends_of_float32(kernels):
    x = draw(0, 6, 48)
    x[0] = 0
    x[1] *= 1e-40
    x[2] *= 1e-37
    x[3] *= 1e37
    same_as_the_law(x)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_kernel_on_numbers_that_are_not_finite(kernels, bad):
    """Every product of such a row is NaN, as of the law's; no other row's is."""
    x = draw(0, 3, 48)
    x[1, 5] = bad
    rows, scale = torch.ops.stgcma_fast.quantize_fwd(x, torch.float32 if Device.name == "cpu" else E4M3)
    assert (rows.float() * scale).sum(1).isnan().tolist() == [False, True, False]


def test_kernel_as_pytorch_sees_it(kernels):
    torch.library.opcheck(torch.ops.stgcma_fast.quantize_fwd.default, (draw(0, 5, 48), torch.float32))


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_operator_is_the_law(emulated, leading, bias):
    tensors = problem(6, 96, 48, dtype=torch.bfloat16)
    weight, bias = tensors["weight"], tensors["bias"] if bias else None
    quantized = quantize_weight(weight)
    x = tensors["x"].view(*leading, 96)
    got = evaluate(lambda x: fp8_linear(x, weight, bias, quantized, impl="torch"), {"x": x})
    wanted = evaluate(lambda x: law(x.flatten(0, -2), weight, bias).view(*leading, 48), {"x": x})
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_autocast(emulated):
    """Rows of float32 are quantized as they are; the output is bfloat16, the gradient of the input float32."""
    tensors = problem(6, 96, 48)
    quantized = quantize_weight(tensors["weight"])
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(
            lambda x: fp8_linear(x, tensors["weight"], tensors["bias"], quantized, impl="torch"), {"x": tensors["x"]}
        )
    assert (got["out0"].dtype, got["grad_x"].dtype) == (torch.bfloat16, torch.float32)
    bias = tensors["bias"].bfloat16().float()
    assert torch.equal(got["out0"], law(tensors["x"], tensors["weight"], bias).bfloat16())


def test_keeps_the_transposed_weight_alone(emulated):
    tensors = problem(6, 96, 48, dtype=torch.bfloat16)
    quantized = quantize_weight(tensors["weight"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        fp8_linear(tensors["x"].requires_grad_(), tensors["weight"], None, quantized, impl="torch")
    assert saved == [quantized.columns.data_ptr(), quantized.column_scale.data_ptr()]


def test_compiled(emulated):
    tensors = problem(6, 96, 48, dtype=torch.bfloat16)
    quantized = quantize_weight(tensors["weight"])

    def call(x):
        return fp8_linear(x, tensors["weight"], tensors["bias"], quantized, impl="torch")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, wanted = (evaluate(f, {"x": tensors["x"]}) for f in (compiled, call))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_refuses_with_every_reason():
    tensors = problem(6, 40, 48)
    with pytest.raises(
        NotImplementedError,
        match=r"precision='fp8-frozen' was asked for, but it needs a CUDA device, got cpu; it needs bfloat16, or autocast to "
        r"it, got torch\.float32; it takes weights of sizes that are multiples of 16 up to 8192, got \[48, 40\]; it gives "
        "weight and bias no gradients, and they are trained",
    ):
        fp8_linear(tensors["x"], tensors["weight"].requires_grad_(), None, quantize_weight(tensors["weight"]))


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)])
def test_compute_capability(monkeypatch, capability, refused):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    wanted = [f"it needs compute capability 8.9, got {capability[0]}.{capability[1]}"] if refused else []
    assert list(fp8.fp8_refusals(torch.device("cuda"))) == wanted


@pytest.mark.gpu
@each_size
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_on_a_gpu(size, impl):
    """PyTorch's scaled product is the law's, but for a rounding to bfloat16 and sums of which Hopper keeps 14 bits at times."""
    tensors = {name: t.cuda() for name, t in problem(*size, dtype=torch.bfloat16).items()}
    weight, bias = tensors["weight"], tensors["bias"]
    quantized = quantize_weight(weight)
    got = evaluate(lambda x: fp8_linear(x, weight, bias, quantized, impl=impl), {"x": tensors["x"]})
    wide = {name: t.float() for name, t in tensors.items()}
    wanted = evaluate(lambda x: law(x, wide["weight"], wide["bias"]), {"x": wide["x"]}, dtypes=[torch.bfloat16])
    # The upstream gradient that `evaluate` draws.
    grad = draw(1000, *got["out0"].shape, dtype=torch.bfloat16).to(wide["x"])
    summed = {
        "out0": wide["x"].abs() @ wide["weight"].abs().T + wide["bias"].abs(),
        "grad_x": grad.abs() @ wide["weight"].abs(),
    }
    for name, hi in wanted.items():
        assert bool(((got[name].float() - hi).abs() <= 2.0**-8 * hi.abs() + 2.0**-13 * summed[name]).all()), name

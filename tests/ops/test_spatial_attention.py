"""Full self-attention of a frame."""

import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from stgcma_fast import ops, reference
from stgcma_fast.ops import short_attention
from tests.support.inputs import Device, draw, each_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

module = importlib.import_module("stgcma_fast.ops.spatial_attention")

# Frames, tokens, heads, channels of a head.
SIZES = {
    "clip_b16": (2, 197, 2, 96),
    "clip_l14": (1, 257, 2, 64),
    "audio": (3, 49, 4, 32),
    "odd": (2, 37, 1, 5),
    "one-token": (2, 1, 2, 16),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def problem(frames, tokens, heads, head_dim, *, dtype=torch.float32, strides="packed", scale=1.0):
    return {"qkv": draw(0, frames, tokens, 3, heads, head_dim, dtype=dtype, scale=scale, strides=strides)}


def function(of, **options):
    return lambda qkv: of.spatial_attention(qkv, scale=qkv.shape[-1] ** -0.5, **options)


def written_out(qkv):
    """The equation, with whole score matrices: a reference apart from the library's fused attention."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = ((query * qkv.shape[-1] ** -0.5) @ key.mT).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(-2)


def hold(tensors, *, fast=None, law=written_out, **options):
    _, tokens, _, _, head_dim = tensors["qkv"].shape
    return check("spatial_attention", fast or function(ops), law, tensors, reductions=[head_dim, tokens, tokens], **options)


@each_dtype
@each_size
def test_sizes(size, dtype):
    hold(problem(*size, dtype=dtype))


@each_dtype
@each_stride
def test_strided_inputs(strides, dtype):
    hold(problem(3, 20, 2, 16, dtype=dtype, strides=strides))


@each_dtype
@each_stride
def test_strided_upstream_gradients(strides, dtype):
    hold(problem(3, 20, 2, 16, dtype=dtype), upstream=strides)


@each_dtype
def test_large_scores(dtype):
    tensors = problem(2, 49, 2, 32, dtype=dtype, scale=30**0.5)
    query, key, _ = tensors["qkv"].double().permute(2, 0, 3, 1, 4)
    scores = (query @ key.mT).abs().max().item() * 32**-0.5
    assert scores > 100
    hold(tensors, scores=scores)


@each_size
def test_reference_is_the_equation_in_float64(size):
    check_equal_in_float64(function(ops, impl="reference"), written_out, problem(*size))
    check_equal_in_float64(function(ops, impl="torch"), function(ops, impl="reference"), problem(*size))


def test_is_multi_head_attention():
    """PyTorch's own function, with identities for its projections."""
    qkv = problem(3, 11, 2, 8, dtype=torch.float64)["qkv"]
    query, key, value = qkv.flatten(-2).permute(2, 1, 0, 3)  # [S, F, h * d] each
    eye = torch.eye(16, dtype=torch.float64)
    zeros = torch.zeros(48, dtype=torch.float64)
    expected, _ = F.multi_head_attention_forward(
        query, key, value, 16, 2, eye.repeat(3, 1), zeros, None, None, False, 0.0, eye, zeros[:16], need_weights=False
    )
    torch.testing.assert_close(function(ops)(qkv), expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_repeated_runs_are_bit_equal(all_threads):
    tensors = problem(2, 197, 4, 32)
    first = evaluate(function(ops), tensors)
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(function(ops), tensors).items())


@each_low_dtype
def test_autocast(dtype):
    hold(problem(3, 20, 2, 16), law=function(reference), autocast=dtype)


def test_gradcheck_of_the_reference():
    assert torch.autograd.gradcheck(function(reference), [problem(1, 4, 2, 3, dtype=torch.float64)["qkv"].requires_grad_()])


def test_compiled():
    check_compiled(function(ops), hold, lambda batch: problem(batch, 20, 2, 16), batched=["qkv"])


@pytest.mark.parametrize("shape", [(2, 20, 96), (2, 20, 2, 2, 16), (1, 2, 20, 3, 2, 16)], ids=["flat", "two-of-three", "clips"])
def test_errors(shape):
    with pytest.raises(ValueError, match=rf"qkv: expected shape \[F, S, 3, h, d\], got \[{', '.join(map(str, shape))}\]"):
        ops.spatial_attention(draw(0, *shape), scale=0.25)


ON_CPU = ("sdpa_flash", "sdpa_math")
each_backend = pytest.mark.parametrize("backend", module.BACKENDS)
each_cpu_backend = pytest.mark.parametrize("backend", ON_CPU)


@each_dtype
@each_size
@each_cpu_backend
def test_backends(backend, size, dtype):
    hold(problem(*size, dtype=dtype), fast=function(ops, backend=backend))


@each_dtype
@each_stride
def test_backend_strides(strides, dtype):
    """The kernels that need channels side by side say so; the plain products take everything."""
    tensors = problem(3, 20, 2, 16, dtype=dtype, strides=strides)
    hold(tensors, fast=function(ops, backend="sdpa_math"), upstream=strides)
    if strides == "transposed":
        with pytest.raises(NotImplementedError, match="the channels of a head must lie side by side, got stride 2"):
            function(ops, backend="sdpa_flash")(**tensors)
    else:
        hold(tensors, fast=function(ops, backend="sdpa_flash"), upstream=strides)


@each_dtype
@each_size
def test_libraries(kernels, size, dtype):
    hold(problem(*size, dtype=dtype), fast=function(ops, impl="triton"))


@each_dtype
@each_stride
def test_libraries_strides(kernels, strides, dtype):
    hold(problem(3, 20, 2, 16, dtype=dtype, strides=strides), fast=function(ops, impl="triton"), upstream=strides)


@each_low_dtype
@pytest.mark.parametrize("options", [{"impl": "triton"}, *({"backend": b} for b in ON_CPU)], ids=["libraries", *ON_CPU])
def test_autocast_of_the_libraries(options, dtype):
    """The packed tensor is rounded once to the autocast dtype."""
    hold(problem(3, 20, 2, 16), fast=function(ops, **options), law=function(reference), autocast=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [SIZES["clip_b16"], SIZES["clip_l14"], SIZES["audio"]], ids=["clip_b16", "clip_l14", "audio"])
@each_dtype
@each_backend
def test_backends_on_cuda(backend, dtype, size, monkeypatch):
    monkeypatch.setattr(Device, "name", "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    tensors = problem(*size, dtype=dtype)
    reasons = module.backend_refusals(backend, tensors["qkv"])
    if reasons:
        pytest.skip("; ".join(reasons))
    hold(tensors, fast=function(ops, backend=backend))


@pytest.mark.parametrize("options", [{"impl": "triton"}, *({"backend": b} for b in ON_CPU)], ids=["libraries", *ON_CPU])
def test_backends_compiled(options):
    check_compiled(function(ops, **options), hold, lambda batch: problem(batch, 20, 2, 16), batched=["qkv"])


def streams():
    """qkv of two streams, views of one packed tensor of rows ``3 * h * d`` wide, which lie apart so that a copy would show."""
    frames, heads, head_dim = 2, 2, 16
    rows = draw(0, frames * (20 + 7), 3 * heads * head_dim + 16)[:, 8:-8]
    return rows, [part.view(frames, -1, 3, heads, head_dim) for part in rows.split([frames * 20, frames * 7])]


def reads(of, name):
    """Has a function of a module note the tensors that reach it, and the list of them."""
    seen, original = [], getattr(of, name)

    def noting(*args, **kwargs):
        seen.extend(a for a in args if isinstance(a, torch.Tensor))
        return original(*args, **kwargs)

    return seen, noting


@pytest.mark.parametrize(
    "options", [{}, {"impl": "triton"}, *({"backend": b} for b in ON_CPU)], ids=["auto", "libraries", *ON_CPU]
)
def test_streams_of_a_packed_tensor_are_not_copied(options, monkeypatch):
    rows, qkvs = streams()
    for qkv in qkvs:
        seen, noting = reads(F, "scaled_dot_product_attention")
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", noting)
            function(ops, **options)(qkv)
        assert [x.data_ptr() for x in seen] == [qkv[:, :, i].data_ptr() for i in range(3)]
        assert all(x.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr() for x in seen)


def test_what_is_saved(monkeypatch):
    """But for short sequences on the CPU: views of the packed tensor, the output (the caller's, no copy of it) and one
    number a query and head."""
    monkeypatch.setattr(short_attention, "_LONGEST", {})
    rows, (qkv, _) = streams()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = function(ops, impl="triton")(qkv.requires_grad_())
    of_caller = [x for x in saved if x.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()]
    of_output = [x for x in saved if x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()]
    assert (len(of_caller), len(of_output), len(saved)) == (3, 1, 5)
    assert sum(x.numel() for x in saved) == qkv.numel() + out.numel() + out.numel() // qkv.shape[-1]


def flash_attn_qkvpacked_func(qkv, *, softmax_scale, deterministic):
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    query, key, value = qkv.unbind(2)
    return memory_efficient_attention(query, key, value, scale=softmax_scale)


def memory_efficient_attention(query, key, value, *, scale):
    """``[F, S, h, d]`` each, to the same."""
    weights = torch.einsum("fihd,fjhd->fhij", scale * query, key).softmax(-1)
    return torch.einsum("fhij,fjhd->fihd", weights, value)


@pytest.mark.parametrize(
    ("backend", "library", "call"),
    [
        ("flash_attn", "flash_attn", flash_attn_qkvpacked_func),
        ("xformers", "xformers.ops", memory_efficient_attention),
    ],
)
def test_calls_of_the_libraries(backend, library, call, monkeypatch):
    """Layouts and arguments as documented, with the equation in the library's place; in one graph too."""
    stand_in = types.ModuleType(library)
    setattr(stand_in, call.__name__, call)
    monkeypatch.setitem(sys.modules, library, stand_in)
    monkeypatch.setitem(sys.modules, library.partition(".")[0], types.ModuleType(library) if "." in library else stand_in)

    def fast(qkv):
        return module.BACKENDS[backend].function(qkv, qkv.shape[-1] ** -0.5)

    _, (qkv, _) = streams()
    hold({"qkv": qkv}, fast=fast)
    check_compiled(fast, hold, lambda batch: problem(batch, 20, 2, 16), batched=["qkv"])


def refuse(qkv, **options):
    with pytest.raises(NotImplementedError) as refusal:
        function(ops, **options)(qkv)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("backend", "wanted"),
    {
        "flash_attn": (
            "needs a CUDA device, got cpu",
            "takes bfloat16, float16, got torch.float64",
            "fill 16 bytes, got 5 of 8",
        ),
        "xformers": ("needs a CUDA device, got cpu", "takes bfloat16, float16, float32, got torch.float64"),
        "sdpa_cudnn": ("needs a CUDA device, got cpu", "got torch.float64", "takes 2 tokens or more, got 1"),
        "sdpa_efficient": ("needs a CUDA device, got cpu", "got torch.float64"),
    }.items(),
)
def test_every_reason_is_given(backend, wanted):
    message = refuse(problem(2, 1, 2, 5, dtype=torch.float64)["qkv"], backend=backend)
    assert message.startswith(f"spatial_attention: backend={backend!r} was asked for, but ")
    assert all(reason in message for reason in wanted), message


def test_reasons_of_layout_and_size():
    assert "heads of up to 256 channels, got 264" in refuse(problem(1, 3, 1, 264)["qkv"], backend="flash_attn")
    offset = problem(2, 3, 1, 16, dtype=torch.float16, strides="offset")["qkv"]
    assert "strides and offset must be multiples of 16 bytes" in refuse(offset, backend="flash_attn")
    transposed = problem(2, 3, 2, 16, strides="transposed")["qkv"]
    assert "the channels of a head must lie side by side, got stride 2" in refuse(transposed, backend="flash_attn")


def test_reasons_of_autocast():
    """What counts is the dtype that the backend would see."""
    qkv = problem(2, 3, 2, 16)["qkv"]
    assert "got torch.float32" in refuse(qkv, backend="flash_attn")
    with torch.autocast("cpu", torch.bfloat16):
        assert "got torch" not in refuse(qkv, backend="flash_attn")


def test_reasons_of_determinism(poisoned_memory):
    qkv = problem(2, 3, 2, 16, dtype=torch.float16)["qkv"]
    reason = "its backward is not deterministic, and torch.use_deterministic_algorithms is on"
    assert reason not in refuse(qkv, backend="sdpa_cudnn")
    assert reason in refuse(qkv.requires_grad_(), backend="sdpa_cudnn")
    assert reason not in refuse(qkv, backend="flash_attn")


def test_reasons_of_old_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=7, minor=5))
    assert module.backend_refusals("sdpa_flash") == ["it needs compute capability 8.0, got 7.5"]
    assert module.backend_refusals("sdpa_efficient") == module.backend_refusals("sdpa_math") == []


def test_reasons_of_packages(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setitem(sys.modules, "xformers", None)
    module._import_error.cache_clear()
    qkv = problem(2, 3, 2, 16)["qkv"]
    assert "flash_attn cannot be imported: undefined symbol; it needs a CUDA" in refuse(qkv, backend="flash_attn")
    assert "is not installed; it needs a CUDA" in refuse(qkv, backend="xformers")
    module._import_error.cache_clear()


def test_backend_and_impl():
    """A backend runs under the implementations that use it."""
    qkv = problem(2, 9, 2, 16)["qkv"]
    for impl in ("auto", "triton", "torch"):
        assert torch.equal(function(ops, backend="sdpa_flash", impl=impl)(qkv), function(ops)(qkv))
    assert "impl='reference' does not use it" in refuse(qkv, backend="sdpa_flash", impl="reference")
    assert "impl='torch' does not use it" in refuse(qkv, backend="flash_attn", impl="torch")
    with pytest.raises(ValueError, match="backend: got 'flash', allowed are 'auto', 'flash_attn', "):
        function(ops, backend="flash")(qkv)
    with pytest.raises(ValueError, match="impl: got 'cuda'"):
        function(ops, backend="sdpa_flash", impl="cuda")(qkv)

"""Which implementation serves an operator: an explicit choice runs as asked or raises with every reason."""

import inspect
import logging
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.ops import dispatch
from stgcma_fast.ops.dispatch import REGISTRY, Implementation, refusals, select
from tests.support.inputs import adapter_weights, draw

PARAMS = ops.AdapterParams(**adapter_weights(0, 12, 4))
X, GATE = draw(0, 2, 9, 12), torch.ones(1)
CALLS = {
    "adapter": lambda x=X, **impl: ops.adapter(x, PARAMS, **impl),
    "av_adapter": lambda x=X, **impl: ops.av_adapter(x, x, PARAMS, PARAMS, GATE, GATE, **impl),
    "cross_modal_attention": lambda x=X, **impl: ops.cross_modal_attention(x, x, GATE, GATE, **impl),
    "gelu": lambda x=X, **impl: ops.gelu(x, quick=True, **impl),
    "layer_norm": lambda x=X, **impl: ops.layer_norm(x, GATE.expand(12), GATE.expand(12), **impl),
    "spatial_attention": lambda **impl: ops.spatial_attention(draw(0, 2, 9, 3, 2, 4), scale=0.5, **impl),
    "temporal_attention": lambda **impl: ops.temporal_attention(draw(0, 1, 4, 9, 3, 2, 4), None, scale=0.5, **impl),
    "window_attention": lambda **impl: ops.window_attention(
        draw(0, 2, 4, 4, 3, 2, 4), draw(1, 2, 4, 4), window=2, shift=1, scale=0.5, **impl
    ),
}
each_op = pytest.mark.parametrize("op", CALLS)
IMPLS = ("triton", "torch", "reference")


def test_every_operator_is_registered_and_called_here():
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert public == REGISTRY.keys() == CALLS.keys()
    assert all(hasattr(reference, name) for name in public)
    assert all(set(IMPLS) == implementations.keys() for implementations in REGISTRY.values())


@each_op
def test_explicit_implementations(op):
    outs = {impl: CALLS[op](impl=impl) for impl in ("auto", *IMPLS)}
    torch.testing.assert_close(outs["auto"], outs["torch"], rtol=0, atol=0)
    torch.testing.assert_close(outs["torch"], outs["reference"])
    torch.testing.assert_close(outs["triton"], outs["reference"])


@each_op
def test_the_choice_decides_what_runs(op, monkeypatch):
    """Each name runs its own function; "auto" on the CPU that of "torch", be there an interpreter or not."""
    for impl in IMPLS:
        monkeypatch.setitem(REGISTRY[op], impl, Implementation(lambda *args, impl=impl, **kwargs: [impl]))
    ran = [CALLS[op](impl=impl) for impl in ("auto", *IMPLS)]
    assert [out[0] if isinstance(out, list) else out for out in ran] == ["torch", "triton", "torch", "reference"]


@each_op
def test_without_triton_every_operator_still_runs(op, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert refusals(op, "triton") == ["triton is not installed"]
    with pytest.raises(NotImplementedError, match=f"{op}: impl='triton' was asked for, but triton is not installed"):
        CALLS[op](impl="triton")
    CALLS[op](impl="auto")


OWN_KERNELS = [op for op in CALLS if op != "spatial_attention"]


@pytest.mark.parametrize("op", OWN_KERNELS)
def test_every_reason_is_given(op, monkeypatch):
    """What the machine lacks and what the call asks too much."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setitem(REGISTRY[op], "triton", REGISTRY[op]["triton"]._replace(limits=lambda *args, **kwargs: ["too much"]))
    with pytest.raises(
        NotImplementedError, match=r"triton is not installed; its kernels need a CUDA device, got cpu.*too much"
    ):
        CALLS[op](impl="triton")


@pytest.mark.parametrize("op", ["adapter", "av_adapter", "cross_modal_attention", "gelu", "layer_norm"])
def test_kernels_refuse_float64(op):
    double = {"x": X.double()}
    with pytest.raises((NotImplementedError, ValueError), match=r"take float32, bfloat16 and float16, got|one floating dtype"):
        CALLS[op](**double, impl="triton")


@each_op
def test_unknown_names(op):
    with pytest.raises(ValueError, match="impl: got 'cuda', allowed are 'auto', 'triton', 'torch', 'reference'"):
        CALLS[op](impl="cuda")


def _on_cuda(monkeypatch, capability=(9, 0), dtype=torch.float32):
    """A stand-in for a tensor on a GPU: what the choice looks at and nothing else."""
    gpu = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0), shape=(2, 9, 12))


def test_auto_takes_triton_on_cuda(monkeypatch):
    x = _on_cuda(monkeypatch)
    assert select("adapter", "auto", x, PARAMS) is REGISTRY["adapter"]["triton"].function


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "its kernels take float32, bfloat16 and float16, got torch.float64"),
        ({"capability": (7, 5)}, "its kernels need compute capability 8.0, got 7.5"),
    ],
    ids=["float64", "old-gpu"],
)
def test_auto_falls_back_on_cuda_and_says_why_once(monkeypatch, caplog, options, reason):
    monkeypatch.setattr(dispatch, "_logged", set())
    x = _on_cuda(monkeypatch, **options)
    with caplog.at_level(logging.INFO, "stgcma_fast"):
        for _ in range(2):
            assert select("adapter", "auto", x, PARAMS) is REGISTRY["adapter"]["torch"].function
    assert caplog.messages == [f"adapter is served by PyTorch: {reason}"]
    with pytest.raises(NotImplementedError, match=reason):
        select("adapter", "triton", x, PARAMS)


def test_auto_takes_pytorch_where_limits_say_so(monkeypatch):
    wide = ops.AdapterParams(**adapter_weights(0, 12, 129))
    assert select("adapter", "auto", _on_cuda(monkeypatch), wide) is REGISTRY["adapter"]["torch"].function


def test_an_old_triton_is_refused(monkeypatch):
    """Its language lacks what the kernels use: "auto" must not take it."""
    monkeypatch.setattr(dispatch, "TRITON_VERSION", (3, 2))
    with pytest.raises(NotImplementedError, match=r"its kernels need triton 3.6, got 3.2"):
        CALLS["adapter"](impl="triton")
    assert select("adapter", "auto", _on_cuda(monkeypatch), PARAMS) is REGISTRY["adapter"]["torch"].function


def test_two_devices():
    with pytest.raises(ValueError, match="adapter: expected one device, got x meta, down_weight cpu"):
        CALLS["adapter"](x=X.to("meta"))


@pytest.mark.parametrize("setting", ["matmul.allow_tf32 = True", "matmul.fp32_precision = 'tf32'", "none"])
def test_either_switch_of_tf32_is_read(setting):
    """The older switch raises once the newer one was used."""
    code = f"""
        import torch
        from stgcma_fast.kernels import launch
        launch.INTERPRETED = False
        {"pass" if setting == "none" else "torch.backends.cuda." + setting}
        print(launch.precision(torch.float32))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("ieee" if setting == "none" else "tf32")

"""Which implementation serves an operator: an explicit choice runs as asked or raises with every reason."""

import importlib.util
import inspect

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.ops.dispatch import REGISTRY, refusals, select
from tests.support.inputs import adapter_weights, draw

PARAMS = ops.AdapterParams(**adapter_weights(0, 12, 4))
X, GATE = draw(0, 2, 9, 12), torch.ones(1)
CALLS = {
    "adapter": lambda **impl: ops.adapter(X, PARAMS, **impl),
    "av_adapter": lambda **impl: ops.av_adapter(X, X, PARAMS, PARAMS, GATE, GATE, **impl),
    "cross_modal_attention": lambda **impl: ops.cross_modal_attention(X, X, GATE, GATE, **impl),
    "layer_norm": lambda **impl: ops.layer_norm(X, GATE.expand(12), GATE.expand(12), **impl),
    "spatial_attention": lambda **impl: ops.spatial_attention(draw(0, 2, 9, 3, 2, 4), scale=0.5, **impl),
    "temporal_attention": lambda **impl: ops.temporal_attention(draw(0, 1, 4, 9, 3, 2, 4), None, scale=0.5, **impl),
    "window_attention": lambda **impl: ops.window_attention(
        draw(0, 2, 4, 4, 3, 2, 4), draw(1, 2, 4, 4), window=2, shift=1, scale=0.5, **impl
    ),
}
each_op = pytest.mark.parametrize("op", CALLS)


def test_every_operator_is_registered_and_called_here():
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert public == REGISTRY.keys() == CALLS.keys()
    assert all(hasattr(reference, name) for name in public)


@each_op
def test_explicit_implementations(op):
    outs = {impl: CALLS[op](impl=impl) for impl in ("auto", "torch", "reference")}
    torch.testing.assert_close(outs["auto"], outs["torch"], rtol=0, atol=0)
    torch.testing.assert_close(outs["torch"], outs["reference"])


@each_op
def test_the_choice_decides_what_runs(op, monkeypatch):
    """Each name runs its own function, and "auto" that of "torch"."""
    for impl in ("torch", "reference"):
        monkeypatch.setitem(REGISTRY[op], impl, lambda *args, impl=impl, **kwargs: impl)
    assert [CALLS[op](impl=impl) for impl in ("auto", "torch", "reference")] == ["torch", "torch", "reference"]


@each_op
def test_triton_is_refused_with_the_reason(op):
    with pytest.raises(NotImplementedError, match=f"impl='triton' was asked for, but .*no triton implementation of {op}"):
        CALLS[op](impl="triton")


@each_op
def test_every_reason_is_given(op, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "triton" else found(name, *args))
    assert len(refusals(op, "triton")) == 2
    with pytest.raises(NotImplementedError, match=f"no triton implementation of {op}; triton is not installed"):
        CALLS[op](impl="triton")


@each_op
def test_unknown_names(op):
    with pytest.raises(ValueError, match="impl: got 'cuda', allowed are 'auto', 'triton', 'torch', 'reference'"):
        CALLS[op](impl="cuda")


def test_nothing_is_refused_that_is_there():
    assert all(refusals(op, impl) == [] for op in CALLS for impl in ("torch", "reference"))
    assert select("adapter", "reference") is reference.adapter

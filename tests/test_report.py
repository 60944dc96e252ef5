"""The report of what is installed and what serves each operator."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from stgcma_fast import report
from stgcma_fast.ops import dispatch
from stgcma_fast.ops.dispatch import REGISTRY
from stgcma_fast.ops.spatial_attention import BACKENDS, backend_refusals


def lines():
    return {name: row for name, *row in report.operators()}


def test_every_operator_has_a_line_and_reasons():
    assert REGISTRY.keys() < lines().keys()
    for op in REGISTRY:
        on_cpu, on_cuda, why = lines()[op]
        assert on_cpu == "torch"
        assert on_cuda == ("triton" if torch.cuda.is_available() else "no device")
        assert "triton: " in why
        assert "reference: can serve, but only if asked for" in why


@pytest.mark.parametrize(
    ("capability", "has_triton", "taken", "reason"),
    [
        ((9, 0), True, "triton", "triton: on the CPU its kernels run in tests alone"),
        ((7, 5), True, "torch", "triton: its kernels need compute capability 8.0, got 7.5"),
        ((9, 0), False, "torch", "triton: triton is not installed"),
    ],
    ids=["hopper", "turing", "no-triton"],
)
def test_machines_with_a_gpu(monkeypatch, capability, has_triton, taken, reason):
    major, minor = capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=minor))
    monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
    for op in REGISTRY:
        on_cpu, on_cuda, why = lines()[op]
        assert (on_cpu, on_cuda) == ("torch", taken)
        assert why.startswith(reason)


@pytest.mark.parametrize(
    ("capability", "taken", "why"),
    [
        ((9, 0), "PyTorch", "on CUDA it can serve, but only if asked for"),
        ((8, 6), "none", "on CUDA it needs compute capability 8.9, got 8.6"),
    ],
    ids=["hopper", "ampere"],
)
def test_float8(monkeypatch, capability, taken, why):
    major, minor = capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=minor))
    assert lines()["frozen linear layers,\nfp8-frozen"] == ["none", taken, why]


def test_every_attention_backend_has_its_reasons():
    _, _, why = lines()["spatial_attention"]
    for name in BACKENDS:
        assert f"{name}: {'; '.join(backend_refusals(name)) or 'can serve'}" in why


def test_versions_name_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(report, "_installed", lambda *names: None)
    assert report.versions()["triton"] is None
    assert report.main() == 0
    out = capsys.readouterr().out
    assert "not installed" in out
    assert "threads" in out


def test_import_touches_no_device():
    code = "import torch, stgcma_fast.report; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The operators on a CUDA device, beyond their numbers: CUDA graphs, repeats, streams, memory, other devices, sanitizers."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.shapes import CASES, Case, tensors
from stgcma_fast import kernels
from stgcma_fast.kernels import launch
from tests.support.inputs import dtype_id

ROOT = Path(__file__).resolve().parents[2]
# Together they launch every kernel.
SMALL = (
    ("layer_norm", "swin_b stage 4"),
    ("layer_norm", "clip_b16 both streams"),
    ("layer_norm", "clip_b16 class token"),
    ("temporal_attention", "swin_b stage 4"),
    ("temporal_attention", "clip_b16 audio"),
    ("spatial_attention", "clip_b16 audio"),
    ("window_attention", "swin_b stage 4 shift 0"),
    ("window_attention", "swin_b stage 3 shift 3"),
    ("window_attention", "window 12 shift 6"),
    ("adapter", "swin_b stage 4"),
    ("adapter", "clip_l14 audio stochastic depth"),
    ("cross_modal_attention", "clip_b16"),
    ("cross_modal_attention", "swin_b stage 3 windows"),
    ("av_adapter", "clip_b16"),
    ("av_adapter", "swin_b stage 3 windows shift 3"),
    ("gelu", "swin_b stage 4 both streams"),
    ("gelu", "clip_b16 both streams"),
)
BY_NAME = {(case.op, case.label): case for case in CASES}

each_gpu_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)


class Call:
    """An operator on given values with random upstream gradients; gives detached outputs and gradients."""

    def __init__(self, case: Case, arguments: tuple) -> None:
        self.case, self.arguments = case, arguments
        self.leaves = [x for x in tensors(arguments) if x.requires_grad]
        self.upstream = [torch.randn_like(y) for y in self._forward()]

    def _forward(self) -> list[Tensor]:
        args, kwargs = self.arguments
        return list(tensors(self.case.function(*args, **kwargs, impl="triton")))

    def __call__(self) -> list[Tensor]:
        outputs = self._forward()
        gradients = torch.autograd.grad(outputs, self.leaves, self.upstream)
        return [x.detach() for x in (*outputs, *gradients)]

    def redraw(self) -> None:
        """Other values in the same memory."""
        with torch.no_grad():
            for x in (*self.leaves, *self.upstream):
                x.copy_(x.square().mean().sqrt() * torch.randn_like(x))


def same_bits(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(got, wanted, strict=True)
    )


@pytest.fixture(params=SMALL, ids=" ".join)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A small case. What kernels leave unwritten is NaN, and the libraries' attention is asked for the same bits each time."""
    torch.use_deterministic_algorithms(True, warn_only=request.param[0] != "spatial_attention")
    yield BY_NAME[request.param]
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def call(case: Case, dtype: torch.dtype) -> Call:
    """It, run once: what is compiled or allocated only once is there."""
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    call = Call(case, case.fill(dtype, "cuda"))
    assert all(x.isfinite().all() for x in call())
    return call


@pytest.mark.gpu
@each_gpu_dtype
def test_a_replayed_cuda_graph_gives_the_bits_of_eager(call):
    """Also where the values have changed since the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        call.redraw()
        graph.replay()
        assert same_bits(captured, call())


@pytest.mark.gpu
@each_gpu_dtype
def test_never_waits_for_the_device(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@each_gpu_dtype
def test_a_hundred_repeats_give_the_same_bits(call):
    first = call()
    assert all(same_bits(call(), first) for _ in range(99))


@pytest.mark.gpu
@each_gpu_dtype
def test_memory_is_returned(call):
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        call()
    # Without gc.collect(): a cycle of references would hold a step's memory until Python happens to look.
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@each_gpu_dtype
def test_runs_on_its_tensors_device(call):
    """The current device is another one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("has one CUDA device")
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("its two CUDA devices differ, and so may their bits")
    assert torch.cuda.current_device() == 0
    there = Call(
        call.case,
        tree_map_only(Tensor, lambda x: x.detach().to("cuda:1").requires_grad_(x.requires_grad), call.arguments),
    )
    there.upstream = [x.to("cuda:1") for x in call.upstream]
    got = there()
    assert all(x.device.index == 1 for x in got)
    assert same_bits([x.to("cuda:0") for x in got], call())


def test_the_small_cases_launch_every_kernel():
    names = {
        name
        for module in pkgutil.iter_modules(kernels.__path__)
        for name in vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        if name.startswith("_") and name.endswith("_kernel")
    }
    launched = set()
    for name in SMALL:
        if name[0] != "spatial_attention":
            with launch.record((9, 0)) as recorded:
                Call(BY_NAME[name], BY_NAME[name].build(torch.float32, "cpu"))()
            launched |= {one.kernel.__name__ for one in recorded}
    # Rows are quantized inside the float8 layers, which have GPU tests of their own.
    assert launched == names - {"_quantize_fwd_kernel"}


def sanitizer() -> str:
    """NVIDIA's compute-sanitizer; the test is skipped where there is none."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    return found


DONE = "every small case ran"


def run_small_cases() -> None:
    """What the sanitizer watches, in a process of its own."""
    for name in SMALL:
        Call(BY_NAME[name], BY_NAME[name].fill(torch.bfloat16, "cuda"))()
    torch.cuda.synchronize()
    print(DONE)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    program = [sys.executable, "-c", "from tests.ops.test_cuda import run_small_cases; run_small_cases()"]
    # Without PyTorch's cache every tensor has bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    command = [sanitizer(), "--tool", tool, *options, *program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device or its virtual machine")
    assert DONE in text, text[-4000:]
    assert "SUMMARY" in text, text[-4000:]
    # Libraries' kernels are not ours to judge.
    assert not _ours(text), text[:8000]


def _ours(text: str) -> list[str]:
    """The kernels of this project that a report names."""
    return sorted(set(re.findall(r"(?<!\w)_\w+_kernel\b", text)))


def test_a_report_names_our_kernels():
    text = "Invalid read\n=========     at _gelu_fwd_kernel+0x30\n in void at::native::elementwise_kernel<128>"
    assert _ours(text) == ["_gelu_fwd_kernel"]

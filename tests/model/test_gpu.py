"""FastSTGCMA on a CUDA device: numbers, compiled graphs, CUDA graphs. Run by `make test-gpu`."""

import copy

import pytest
import torch
import torch.nn.functional as F

import stgcma_fast as sf
from tests.support.models import inputs, seed, task_inputs, tiny_config

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _device():
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    before = torch.cuda.memory_allocated()
    yield
    torch._dynamo.reset()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 64 * 2**20, "a test left memory behind"


def _batch(config, dtype=torch.float32):
    return [x.cuda().to(dtype) for x in inputs(config)]


def _gradients(model, audio, video, target):
    model.zero_grad()
    logits = model(audio, video)
    F.cross_entropy(logits.float(), target.float()).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_autocast_errors_are_those_of_the_reference(arch, dtype):
    config = tiny_config(arch)
    batch = _batch(config)
    exact = _gradients(seed(sf.reference.ReferenceSTGCMA(config)).cuda().double().eval(), *(x.double() for x in batch))
    errors = []
    for cls in (sf.reference.ReferenceSTGCMA, sf.FastSTGCMA):
        model = seed(cls(config)).cuda().eval()
        if cls is sf.FastSTGCMA:
            model.cast_frozen(dtype)
        with torch.autocast("cuda", dtype):
            got = _gradients(model, *batch)
        assert all(x.isfinite().all() for x in got)
        errors.append([float((g.double() - w).norm() / w.norm()) for g, w in zip(got, exact, strict=True)])
    low, fast = errors
    assert fast[0] <= 2 * low[0] + torch.finfo(dtype).eps
    assert fast[1] <= 3 * low[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", ["avs", "avqa"])
def test_other_tasks_err_as_the_reference(task, dtype):
    """The scores, and the gradients all in one vector."""
    config = tiny_config("swin", task=task)
    arguments, loss_of = task_inputs(config, dtype=torch.float64)
    arguments = [x.cuda() for x in arguments]

    def run(model, *arguments):
        out = model(*arguments)
        # The loss on the CPU, where its targets are.
        loss_of([x.cpu().double() for x in (out if task == "avqa" else out[:1])]).backward()
        return out[0].detach().double(), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        ).double()

    exact = seed(sf.reference.ReferenceSTGCMA(config)).cuda().double().eval()
    wanted = run(exact, *arguments)
    arguments = [x.float() if x.is_floating_point() else x for x in arguments]
    errors = []
    for cls in (sf.reference.ReferenceSTGCMA, sf.FastSTGCMA):
        model = seed(cls(config)).cuda().eval()
        with torch.autocast("cuda", dtype):
            got = run(model, *arguments)
        errors.append([float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)])
    low, fast = errors
    assert fast[0] <= 2 * low[0] + torch.finfo(dtype).eps
    assert fast[1] <= 3 * low[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_compiled_equals_eager(arch):
    model = seed(sf.FastSTGCMA(tiny_config(arch))).cuda().eval()
    batch = _batch(model.config)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    for got, wanted in zip(_gradients(compiled, *batch), _gradients(model, *batch), strict=True):
        assert (got - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_train_step_replays_as_a_cuda_graph(arch):
    model = seed(sf.FastSTGCMA(tiny_config(arch))).cuda().eval()
    batch = _batch(model.config)
    wanted = _gradients(model, *batch)

    def step():
        logits = model(*batch[:2])
        F.cross_entropy(logits, batch[2]).backward()
        return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    graph.replay()
    torch.cuda.synchronize()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (logits - wanted[0]).norm() < 1e-3 * wanted[0].norm()
    assert (gradients - wanted[1]).norm() < 1e-3 * wanted[1].norm()


def test_a_train_step_never_waits_for_the_device():
    model = seed(sf.FastSTGCMA(tiny_config("swin"))).cuda().train()
    batch = _batch(model.config)
    _gradients(model, *batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(model, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")

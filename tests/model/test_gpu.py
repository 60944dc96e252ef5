"""FastSTGCMA on a CUDA device: numbers, compiled graphs, CUDA graphs. Run by `make test-gpu`."""

import copy

import pytest
import torch
import torch.nn.functional as F

import stgcma_fast as sf
from stgcma_fast.heads.avqa import avqa_loss
from stgcma_fast.heads.avs import avs_loss
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


def _eval(model):
    """Evaluation mode but for LSTMs, which draw nothing: cuDNN has no backward of theirs there."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LSTM):
            module.train()
    return model


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

    exact = _eval(seed(sf.reference.ReferenceSTGCMA(config)).cuda().double())
    wanted = run(exact, *arguments)
    arguments = [x.float() if x.is_floating_point() else x for x in arguments]
    errors = []
    for cls in (sf.reference.ReferenceSTGCMA, sf.FastSTGCMA):
        model = _eval(seed(cls(config)).cuda())
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


def _step(arch, task):
    """A model in evaluation mode, and what makes a train step of it on a batch that stays where it is."""
    config = tiny_config(arch, task=task)
    model = _eval(seed(sf.FastSTGCMA(config)).cuda())
    if task == "ave":
        audio, video, target = _batch(config)
        return model, lambda: _backward((model(audio, video),), lambda out: F.cross_entropy(out[0], target))
    arguments = [x.cuda() for x in task_inputs(config)[0]]
    if task == "avs":
        size = config.backbone.image_size
        mask = (torch.arange(2 * size * size, device="cuda") % 3 == 0).float().view(2, 1, 1, size, size)
        return model, lambda: _backward(model(*arguments), lambda out: avs_loss(out[0], mask))
    label = torch.arange(2, device="cuda")
    return model, lambda: _backward(model(*arguments), lambda out: avqa_loss(*out, label))


def _backward(out, loss_of):
    loss_of(out).backward()
    return out[0].detach()


def _gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


each_step = pytest.mark.parametrize(
    ("arch", "task"), [("swin", "ave"), ("clip", "ave"), ("swin", "avs"), ("swin", "avqa")], ids=lambda name: name
)


@each_step
def test_train_step_replays_as_a_cuda_graph(arch, task):
    model, step = _step(arch, task)
    wanted = step(), _gradient(model)
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
        out = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, exact in zip((out, _gradient(model)), wanted, strict=True):
        assert (got - exact).norm() < 1e-3 * exact.norm()


@each_step
def test_a_train_step_never_waits_for_the_device(arch, task):
    model, step = _step(arch, task)
    model.train()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_saved_on_the_device_loads(tmp_path):
    """AVQA's LSTM has its weights in one piece of memory there."""
    model = seed(sf.FastSTGCMA(tiny_config("swin", task="avqa"))).cuda()
    model.save_pretrained(tmp_path)
    loaded = sf.FastSTGCMA.from_pretrained(tmp_path).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value.cpu()), key

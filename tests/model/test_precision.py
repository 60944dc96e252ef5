"""`FastSTGCMA(precision="fp8-frozen")`: refusals, float8 copies that follow the weights, and its error, emulated on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

from stgcma_fast import FastSTGCMA, preset
from stgcma_fast.config import ClipConfig, ModelConfig
from stgcma_fast.ops import fp8, stream
from stgcma_fast.ops.fp8 import quantize_weight
from stgcma_fast.reference.fp8 import scaled_product
from stgcma_fast.reference.model import Block
from tests.support.models import golden, golden_config, inputs, seed, tiny_config

each_arch = pytest.mark.parametrize("arch", ["swin", "clip"])


@pytest.fixture
def products(monkeypatch):
    """The model on the CPU, float8 products being the law's. Gives the weights' shapes of all products."""
    shapes = []
    quantize = fp8._quantize

    def product(rows, row_scale, weight, weight_scale, bias=None):
        shapes.append(tuple(weight.shape))
        return scaled_product(rows, row_scale, weight, weight_scale, bias).bfloat16()

    monkeypatch.setattr(fp8, "fp8_refusals", lambda device: ())
    monkeypatch.setattr(fp8, "_product", product)
    # Triton's interpreter rounds to float8 wrongly.
    monkeypatch.setattr(fp8, "_quantize", lambda x, kernel: quantize(x, False))
    # Whatever the size, all of a stream at once, as on a GPU.
    monkeypatch.setattr(stream, "PIECE_BYTES", 2**60)
    return shapes


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine make tiny problems several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, Block)]


def copies(model):
    return [block.quantized for block in blocks(model)]


def fresh(model):
    """What the copies have to be."""
    return [{name: quantize_weight(weight) for name, weight in frozen_weights(block).items()} for block in blocks(model)]


def frozen_weights(block):
    if hasattr(block, "ln_1"):
        keys = "attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    else:
        keys = "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"
    return {name: block.get_parameter(key) for name, key in zip(("qkv", "proj", "fc1", "fc2"), keys, strict=True)}


def assert_equal(got, wanted):
    assert len(got) == len(wanted) > 0
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert all(torch.equal(x.float(), y.float()) for x, y in zip(mine[name], theirs[name], strict=True)), name


@each_arch
def test_refuses_on_the_cpu(arch):
    model = FastSTGCMA(tiny_config(arch), precision="fp8-frozen")
    audio, video, _ = inputs(model.config)
    with pytest.raises(NotImplementedError, match="needs a CUDA device, got cpu; it needs bfloat16, or autocast to it"):
        model(audio, video)


def test_refuses_what_no_model_has():
    with pytest.raises(ValueError, match=r"precision: got 'fp8', allowed are 'full', 'fp8-frozen'"):
        FastSTGCMA(tiny_config("clip"), precision="fp8")
    with pytest.raises(ValueError, match=r"precision: got 'fp8-frozen' with impl='reference'"):
        FastSTGCMA(tiny_config("clip"), precision="fp8-frozen", impl="reference")
    odd = ModelConfig(ClipConfig(32, 16, 40, 1, 2, 16, 32), adapter_ratio=0.5, num_frames=2)
    with pytest.raises(NotImplementedError, match=r"block.*qkv: it takes weights of sizes .* got \[120, 40\]; .*fc2: it takes"):
        FastSTGCMA(odd, precision="fp8-frozen")


def test_refuses_trained_layers(products):
    model = FastSTGCMA(tiny_config("clip"), precision="fp8-frozen").bfloat16()
    frozen_weights(blocks(model)[0])["fc1"].requires_grad_()
    audio, video, _ = inputs(model.config, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="it gives weight and bias no gradients, and they are trained"):
        model(audio, video)


@each_arch
def test_copies_follow_the_weights_and_are_not_saved(arch):
    model = FastSTGCMA(tiny_config(arch), precision="fp8-frozen")
    assert_equal(copies(model), fresh(model))
    full = seed(FastSTGCMA(tiny_config(arch)))
    assert model.state_dict().keys() == full.state_dict().keys()
    for change in (
        lambda: model.load_state_dict(full.state_dict()),
        # A module that holds the model, as torch.compile's and DDP's do, does not call its `load_state_dict`.
        lambda: torch.nn.ModuleDict({"held": model}).load_state_dict({f"held.{k}": v for k, v in full.state_dict().items()}),
        lambda: model.cast_frozen(torch.bfloat16),
        lambda: model.double(),
    ):
        before = copies(model)
        change()
        assert_equal(copies(model), fresh(model))
        assert all(mine is not theirs for mine, theirs in zip(copies(model), before, strict=True))
    assert_equal(copies(copy.deepcopy(model)), copies(model))


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
@each_arch
def test_which_products(products, one_thread, arch, fold):
    """Of each block qkv twice, of time and of space, then proj, fc1 and fc2; the temporal projection never."""
    model = seed(FastSTGCMA(tiny_config(arch), precision="fp8-frozen", fold_temporal=fold)).bfloat16()
    audio, video, _ = inputs(model.config, dtype=torch.bfloat16)
    with torch.no_grad():
        model(audio, video)
    wanted = []
    for block in blocks(model):
        shapes = {name: tuple(weight.shape) for name, weight in frozen_weights(block).items()}
        # Frames of two sizes are projected one stream after the other.
        spatial = ["proj"] * (2 if arch == "clip" else 1)
        wanted += [shapes[name] for name in (*(["qkv"] if block.has_temporal else []), "qkv", *spatial, "fc1", "fc2")]
    assert products == wanted


def relative_errors(config, state, batch, mode, device="cpu", compiled=False):
    """Of logits and of all gradients as one vector, relative to float32: of bfloat16, and of float8 in the frozen layers."""

    def run(low, **options):
        model = FastSTGCMA(config, **options).eval().to(device)
        model.load_state_dict(state)
        if low:
            model.cast_frozen(torch.bfloat16)
        call = torch.compile(model) if compiled and options else model
        audio, video, target = (x.to(device) for x in batch)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            logits = call(audio, video, mode)
        F.cross_entropy(logits.float(), target).backward()
        return logits.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = run(False)
    return {
        name: [((x - hi).norm() / hi.norm()).item() for x, hi in zip(run(True, **options), exact, strict=True)]
        for name, options in {"bfloat16": {}, "fp8-frozen": {"precision": "fp8-frozen"}}.items()
    }


def check_errors(name, errors):
    """A factor of a float8 product is rounded by 2**-4 at most, that of a bfloat16 product by 2**-8: 16 times as much."""
    print(name, {kind: [f"{e:.2e}" for e in pair] for kind, pair in errors.items()})
    for low, fast in zip(errors["bfloat16"], errors["fp8-frozen"], strict=True):
        assert low < fast < 16 * low


@pytest.mark.parametrize("name", ["clip_tiny_fusion", "swin_tiny_fusion"])
def test_error_on_the_goldens(products, one_thread, name):
    meta, tensors = golden(f"ave_{name}")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    batch = tensors["input.audio"], tensors["input.video"], tensors["target"]
    check_errors(name, relative_errors(golden_config(meta), state, batch, meta["mode"]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["clip_b16", "swin_l"])
def test_error_at_full_size(products, arch):
    config = preset(arch, "base")
    state = seed(FastSTGCMA(config)).state_dict()
    check_errors(arch, relative_errors(config, state, inputs(config, batch=1), "fusion"))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["clip_tiny_fusion", "swin_tiny_fusion"])
def test_error_on_a_gpu(name, compiled):
    meta, tensors = golden(f"ave_{name}")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    batch = tensors["input.audio"], tensors["input.video"], tensors["target"]
    check_errors(name, relative_errors(golden_config(meta), state, batch, meta["mode"], "cuda", compiled))


@pytest.mark.gpu
@each_arch
def test_cuda_graph(arch):
    """A forward replayed on other inputs gives the bits of an eager one."""
    model = seed(FastSTGCMA(tiny_config(arch), precision="fp8-frozen")).bfloat16().eval().cuda()
    audio, video, _ = (x.cuda() for x in inputs(model.config, dtype=torch.bfloat16))
    with torch.no_grad():
        wanted = model(audio.flip(0), video.flip(0))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(audio, video)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(audio, video)
        audio.copy_(audio.flip(0))
        video.copy_(video.flip(0))
        graph.replay()
    assert torch.equal(logits, wanted)

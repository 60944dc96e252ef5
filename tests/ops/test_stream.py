"""A frozen step run piece by piece: same outputs and gradients as in one go, nothing kept but its inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F

import stgcma_fast as sf
from stgcma_fast.ops import stream as module
from stgcma_fast.ops.linear import linear
from stgcma_fast.ops.stream import piece_size, stream
from tests.support.inputs import draw, dtype_id, each_stride
from tests.support.numerics import check, evaluate

WIDE, D = 24, 8
TAIL = (draw(90, D, WIDE, scale=0.2), draw(91, D))


def narrow_step(x, along, weight, bias):
    """[..., D] to [..., D]: a layer, and what goes along."""
    y = torch.tanh(linear(x, weight, bias))
    return y if along is None else y * along


def wide_step(x, along, weight, bias):
    """[..., D] to [..., WIDE], for a tail."""
    y = linear(x.square(), weight, bias)
    return y if along is None else y * along


def problem(shape=(7, 5), *, strides="packed", tail=False, dtype=torch.float32):
    return {
        "x": draw(0, *shape, D, strides=strides, dtype=dtype),
        "weight": draw(1, WIDE if tail else D, D, scale=0.4, dtype=dtype),
        "bias": draw(2, WIDE if tail else D, dtype=dtype),
    }


def both_ways(*, dim=0, size=3, tail=None, along=None):
    """The step piece by piece, and in one go."""
    step = narrow_step if tail is None else wide_step

    def pieces(x, weight, bias):
        return stream(step, x, weight, bias, dim=dim, size=size, tail=tail, along=along)

    def whole(x, weight, bias):
        y = step(x, None if along is None else along.to(x.dtype), weight, bias)
        return y if tail is None else F.linear(y, *(t.to(y.dtype) for t in tail))

    return pieces, whole


def hold(tensors, *, frozen=(), upstream="packed", autocast=None, **options):
    pieces, whole = both_ways(**options)
    rows = tensors["x"].shape[:-1].numel()
    return check(
        "stream", pieces, whole, tensors, reductions=[D, WIDE, rows], frozen=frozen, upstream=upstream, autocast=autocast
    )


@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100], ids="size{}".format)
def test_pieces(size, tail, poisoned_memory):
    """Sizes that divide 7 and that do not, one piece for all included."""
    hold(problem(tail=tail is not None), size=size, tail=tail)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
def test_dimensions(dim, tail, poisoned_memory):
    hold(problem((4, 5, 6), tail=tail is not None), dim=dim, size=4, tail=tail)


@pytest.mark.parametrize("width", [1, D], ids=["broadcast", "full"])
@pytest.mark.parametrize("dim", [0, 1])
def test_along(dim, width, poisoned_memory):
    """A constant that is cut with ``x``, like the mask of stochastic depth."""
    along = draw(3, 7, 5, width)
    got = hold(problem(), dim=dim, size=3, along=along)
    assert not torch.equal(got["out0"], evaluate(both_ways()[1], problem())["out0"])


@each_stride
def test_strided_inputs(strides, poisoned_memory):
    hold(problem(strides=strides))


@each_stride
def test_strided_upstream_gradients(strides, poisoned_memory):
    hold(problem(tail=True), upstream=strides, tail=TAIL)


FROZEN = {"x": {"x"}, "weight": {"weight"}, "bias": {"bias"}, "shared": {"weight", "bias"}, "all-but-bias": {"x", "weight"}}


@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_gradients_that_are_wanted(frozen, tail, poisoned_memory):
    got = hold(problem(tail=tail is not None), frozen=frozen, tail=tail)
    assert got.keys() == {"out0", *(f"grad_{name}" for name in ("x", "weight", "bias") if name not in frozen)}


@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
def test_nothing_but_inputs_is_kept(tail):
    tensors = {name: x.requires_grad_() for name, x in problem(tail=tail is not None).items()}
    along = draw(3, 7, 5, 1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        both_ways(tail=tail, along=along)[0](**tensors)
    assert set(saved) == {x.data_ptr() for x in (*tensors.values(), along)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("tail", [None, TAIL], ids=["bare", "tail"])
def test_autocast(tail, dtype):
    hold(problem(tail=tail is not None), tail=tail, autocast=dtype)


@pytest.mark.parametrize("inside", [True, False], ids=["on", "off"])
def test_backward_runs_the_step_as_forward_did(inside):
    """Under the forward's autocast, whatever holds where the backward is called."""
    seen = []

    def step(x, along, weight, bias):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu") if inside else None))
        return narrow_step(x, along, weight, bias)

    tensors = {name: x.requires_grad_() for name, x in problem().items()}
    with torch.autocast("cpu", torch.float16, enabled=inside):
        out = stream(step, *tensors.values(), dim=0, size=3)
    assert torch.is_autocast_enabled("cpu") is False
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        torch.autograd.grad(out, list(tensors.values()), draw(9, *out.shape).to(out.dtype))
        assert torch.is_autocast_enabled("cpu") is not inside
    assert len(seen) == 2 * 3
    assert set(seen) == {(inside, torch.float16 if inside else None)}


def test_no_second_derivative():
    """A second derivative would be silently wrong, so asking for it raises."""
    tensors = problem()
    x = tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(both_ways()[0](**tensors).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().mean().backward()


def test_without_gradients():
    tensors = problem()
    with torch.no_grad():
        out = both_ways()[0](**tensors)
    torch.testing.assert_close(out, both_ways()[1](**tensors))


def test_piece_size(monkeypatch):
    """As many indices as keep the widest intermediate within the bound; None where that is all of them."""
    x = torch.empty(10, 6, 8)
    one = 3 * 6 * 8 * 4  # bytes of one index along dim 0, three times as wide
    for size, expected in ((one - 1, 1), (one, 1), (4 * one, 4), (5 * one - 1, 4), (9 * one, 9), (10 * one, None)):
        monkeypatch.setattr(module, "PIECE_BYTES", size)
        assert piece_size(x, 0, 3) == expected
    assert piece_size(x.to("meta"), 0, 3) is None


def tiny(arch, **switches):
    """A model of every kind of block, every parameter drawn: as built, adapters and gates are zero and hide their inputs."""
    backbone = {
        "swin": sf.SwinConfig(image_size=56, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window=7),
        "clip": sf.ClipConfig(image_size=32, patch_size=8, embed_dim=32, layers=2, heads=2, audio_frames=24, mel_bins=32),
    }[arch]
    model = sf.FastSTGCMA(sf.ModelConfig(backbone=backbone, num_frames=3, num_classes=5, drop_path=0.5, **switches))
    for i, parameter in enumerate(model.parameters()):
        scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data = draw(i, *parameter.shape, scale=scale, shift=float(i % 2 == 0 and parameter.ndim == 1) * 0.5)
    return model


def run_model(model, dtype):
    model = copy.deepcopy(model).to(dtype).train()
    config = model.config
    audio = draw(7000, 1, config.num_frames, *config.backbone.audio_shape, dtype=dtype)
    video = draw(7001, 1, 3, config.num_frames, *[config.backbone.image_size] * 2, dtype=dtype)
    torch.manual_seed(3)  # the same drops in every run
    logits = model(audio, video)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(logits, trained, draw(7002, *logits.shape, dtype=dtype), allow_unused=True)
    return {"logits": logits.detach()} | dict(zip(names, grads, strict=True))


ARCHS = ("swin", "clip")
SWITCHES = {
    "fusion": {},
    "frozen-temporal": {"use_temporal": False, "temporal_without_adapter": True},
    "visual": {"modalities": ("visual",), "fusion": "none"},
}


MODELS = [
    *(pytest.param(arch, s, torch.float64, id=f"{arch}-{name}-float64") for arch in ARCHS for name, s in SWITCHES.items()),
    *(pytest.param(arch, {}, torch.float32, id=f"{arch}-float32") for arch in ARCHS),
]


@pytest.mark.parametrize(("arch", "switches", "dtype"), MODELS)
def test_model_in_pieces(arch, switches, dtype, monkeypatch):
    """Packed layers and layers in small pieces are the same model, logits and every gradient, stochastic depth on."""
    model = tiny(arch, **switches)
    pieces = []
    streamed = module._Stream.apply
    monkeypatch.setattr(module._Stream, "apply", lambda *args: pieces.append(args[3]) or streamed(*args))
    monkeypatch.setattr(module, "PIECE_BYTES", 2**40)
    packed = run_model(model, dtype)
    assert not pieces
    monkeypatch.setattr(module, "PIECE_BYTES", 20_000)
    got = run_model(model, dtype)
    assert pieces
    assert got.keys() == packed.keys()
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for name, x in got.items():
        if packed[name] is None:
            assert x is None
            continue
        error = (x - packed[name]).norm() / packed[name].norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def test_gradients_of_pieces_are_not_written_into_one_another():
    """The first piece's gradient served as the sum, although it may be the caller's upstream gradient or shared by two."""
    x, p, q = (torch.randn(3, 1, requires_grad=i > 0) for i in range(3))
    p, q = (t.detach()[:1].requires_grad_() for t in (p, q))
    upstream = torch.tensor([[1.0], [2.0], [4.0]])
    y = stream(lambda piece, _, a, b: piece + a + b, x, p, q, dim=0, size=1)
    gradients = torch.autograd.grad(y, (p, q), upstream)
    assert [g.item() for g in gradients] == [7.0, 7.0]
    assert upstream.flatten().tolist() == [1.0, 2.0, 4.0]


def test_low_precision_gradients_of_many_pieces_are_summed_in_float32():
    """Summed in bfloat16, 256 pieces of one stop growing."""
    x, p = torch.zeros(512, 1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    y = stream(lambda piece, _, a: piece + a, x, p, dim=0, size=1)
    assert torch.autograd.grad(y, p, torch.ones_like(y))[0].item() == 512

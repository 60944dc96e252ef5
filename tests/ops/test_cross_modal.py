"""The two-way cross-attention of the AV-adapter."""

from functools import partial

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.ops import cross_modal as module
from stgcma_fast.ops import short_attention
from tests.support.inputs import Device, draw, each_dtype, each_kernel_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

FUSIONS = ("both", "a2v", "v2a", "none")
SIZES = {
    "window": (4, 49, 49, 96),
    "clip": (2, 50, 49, 48),
    "wide": (1, 70, 33, 100),
    "narrow": (3, 17, 90, 4),
    "one-token": (2, 1, 1, 16),
    "one-group": (1, 5, 1, 24),
    "long": (1, 784, 196, 16),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
each_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def problem(groups, n, m, rank, *, dtype=torch.float32, strides="packed", scale=0.3, gates=(0.7, -0.4), seed=0):
    return {
        "visual": draw(seed, groups, n, rank, dtype=dtype, scale=scale, strides=strides),
        "audio": draw(seed + 1, groups, m, rank, dtype=dtype, scale=scale, strides=strides),
        "gate_visual": torch.tensor([gates[0]], dtype=dtype, device=Device.name),
        "gate_audio": torch.tensor([gates[1]], dtype=dtype, device=Device.name),
    }


def hold(problems, *, fast=None, fusion="both", **options):
    visual, audio = ((problems if isinstance(problems, dict) else problems[0])[name] for name in ("visual", "audio"))
    return check(
        "cross_modal_attention",
        fast or partial(ops.cross_modal_attention, fusion=fusion),
        partial(reference.cross_modal_attention, fusion=fusion),
        problems,
        reductions=[visual.shape[2], visual.shape[1], audio.shape[1]],
        gates={"gate_visual": visual.shape, "gate_audio": audio.shape},
        **{"gate_roundings": 4} | options,
    )


@each_dtype
@each_size
def test_sizes(size, dtype):
    hold(problem(*size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_stride
def test_strided_inputs(strides, dtype):
    hold(problem(3, 20, 13, 24, dtype=dtype, strides=strides))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_stride
def test_strided_upstream_gradients(strides, dtype):
    hold(problem(3, 20, 13, 24, dtype=dtype), upstream=strides)


@each_dtype
@each_fusion
def test_fusions(fusion, dtype):
    hold(problem(2, 30, 21, 16, dtype=dtype), fusion=fusion)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("fusion", "passed"), [("a2v", ["audio"]), ("v2a", ["visual"]), ("none", ["visual", "audio"])])
def test_a_stream_that_does_not_listen_is_passed_on(fusion, passed, impl):
    tensors = problem(2, 30, 21, 16)
    outs = dict(zip(("visual", "audio"), ops.cross_modal_attention(**tensors, fusion=fusion, impl=impl), strict=True))
    for name, out in outs.items():
        assert (out is tensors[name]) == (name in passed)


@each_dtype
def test_gradients_of_gates(dtype):
    """One gate's gradient may be right by luck; those of 20 problems together are not."""
    hold([problem(2, 30, 21, 16, dtype=dtype, seed=10 * seed) for seed in range(20)], gate_roundings=1)


@pytest.mark.parametrize("gates", [(0.0, 0.0), (0.0, 0.5), (-1.5, 0.0)], ids=["closed", "visual-closed", "audio-closed"])
@each_dtype
def test_closed_gates(dtype, gates):
    """Training starts with gates at zero: outputs are the inputs, yet the gates' own gradients are not zero."""
    tensors = problem(2, 30, 21, 16, dtype=dtype, gates=gates)
    got = hold(tensors)
    for out, gate, name in (("out0", gates[0], "visual"), ("out1", gates[1], "audio")):
        assert torch.equal(got[out], tensors[name]) == (gate == 0)
        assert got[f"grad_gate_{name}"] != 0


@each_dtype
def test_large_scores(dtype):
    """Scores are not scaled: here they reach hundreds, and the softmax is all but one-hot."""
    tensors = problem(2, 49, 40, 96, dtype=dtype, scale=30**0.5)
    assert (tensors["visual"].double() @ tensors["audio"].double().mT).abs().max() > 800
    hold(tensors)


def test_scores_beyond_float16_do_not_overflow():
    """Scores past 65504 overflow in a float16 product; the library's fused attention keeps them in float32."""
    tensors = problem(2, 20, 20, 96, dtype=torch.float16, scale=100)
    law = reference.cross_modal_attention
    assert not all(out.isfinite().all() for out in law(**tensors))
    got = ops.cross_modal_attention(**tensors)
    for out, hi in zip(got, law(**{name: x.double() for name, x in tensors.items()}), strict=True):
        # The softmax is one-hot: three roundings of sums of two numbers.
        assert (out.double() - hi).abs().max() <= 3 * torch.finfo(torch.float16).eps * hi.abs().max()


@each_fusion
@each_size
def test_equals_the_reference_in_float64(size, fusion):
    fast = partial(ops.cross_modal_attention, fusion=fusion, impl="torch")
    law = partial(ops.cross_modal_attention, fusion=fusion, impl="reference")
    check_equal_in_float64(fast, law, problem(*size))


@pytest.mark.parametrize("gates", [(0.7, -0.4), (0.0, 0.0)], ids=["open", "closed"])
def test_gradients_are_the_closed_formulas(gates):
    """The formulas of the card, written out with whole score matrices, against automatic differentiation."""
    tensors = problem(2, 9, 7, 5, dtype=torch.float64, gates=gates)
    v, a, alpha, beta = tensors.values()
    gv, ga = draw(1000, *v.shape, dtype=torch.float64), draw(1001, *a.shape, dtype=torch.float64)
    scores = v @ a.mT
    p, q = scores.softmax(-1), scores.mT.softmax(-1)
    heard_v, heard_a = p @ a, q @ v
    d, e = (gv * heard_v).sum(-1, keepdim=True), (ga * heard_a).sum(-1, keepdim=True)
    ds = alpha * p * (gv @ a.mT - d) + beta * (q * (ga @ v.mT - e)).mT
    formulas = {
        "out0": v + alpha * heard_v,
        "out1": a + beta * heard_a,
        "grad_visual": gv + ds @ a + beta * q.mT @ ga,
        "grad_audio": ga + ds.mT @ v + alpha * p.mT @ gv,
        "grad_gate_visual": d.sum().view(1),
        "grad_gate_audio": e.sum().view(1),
    }
    for impl in ("torch", "reference"):
        got = evaluate(partial(ops.cross_modal_attention, impl=impl), tensors)
        torch.testing.assert_close(got, formulas, rtol=1e-12, atol=1e-12)


FROZEN = {
    "visual": ({"visual"}, FUSIONS),
    "audio": ({"audio"}, FUSIONS),
    "gates": ({"gate_visual", "gate_audio"}, FUSIONS),
    "inputs": ({"visual", "audio"}, ("both", "a2v", "v2a")),
    "all-but-alpha": ({"visual", "audio", "gate_audio"}, ("both", "a2v")),
}


@pytest.mark.parametrize(
    ("frozen", "fusion"),
    [pytest.param(names, f, id=f"{key}-{f}") for key, (names, fusions) in FROZEN.items() for f in fusions],
)
def test_frozen_inputs_change_nothing_else(fusion, frozen):
    hold(problem(2, 30, 21, 16), fusion=fusion, frozen=frozen)


def test_without_gradients():
    tensors = problem(2, 30, 21, 16)
    with torch.inference_mode():
        outs = ops.cross_modal_attention(**tensors)
    for out, expected in zip(outs, ops.cross_modal_attention(**tensors), strict=True):
        assert torch.equal(out, expected)


def test_repeated_runs_are_bit_equal(all_threads):
    tensors = problem(4, 196, 150, 48)
    first = evaluate(ops.cross_modal_attention, tensors)
    for _ in range(5):
        again = evaluate(ops.cross_modal_attention, tensors)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@each_low_dtype
@each_fusion
def test_autocast(fusion, dtype):
    hold(problem(2, 49, 40, 24), fusion=fusion, autocast=dtype)


@each_fusion
def test_gradcheck_of_the_reference(fusion):
    tensors = [x.requires_grad_() for x in problem(2, 4, 3, 2, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(partial(reference.cross_modal_attention, fusion=fusion), tensors)


def test_compiled():
    check_compiled(ops.cross_modal_attention, hold, lambda batch: problem(batch, 20, 13, 8), batched=["visual", "audio"])


@pytest.fixture
def tiled(monkeypatch, poisoned_memory):
    """Frames of every size go through the tiled form, in tiles of a few rows; the number of calls it served."""
    calls = []
    apply = module._TiledAttention.apply
    monkeypatch.setattr(module._TiledAttention, "apply", lambda *args: calls.append(1) or apply(*args))
    monkeypatch.setattr(module, "_SMALL_SCORES", 0)
    monkeypatch.setattr(short_attention, "_LONGEST", {})
    monkeypatch.setattr(module, "TILE_BYTES", 2000)
    yield
    assert calls


@each_size
def test_tiled_sizes(size, tiled):
    hold(problem(*size))


@pytest.mark.parametrize("fusion", ["both", "a2v", "v2a"])
@pytest.mark.parametrize("gates", [(0.7, -0.4), (0.0, 0.0)], ids=["open", "closed"])
def test_tiled_fusions(fusion, gates, tiled):
    hold([problem(2, 30, 21, 16, gates=gates, seed=10 * seed) for seed in range(5)], fusion=fusion, gate_roundings=1)


@each_stride
def test_tiled_strided_inputs(strides, tiled):
    hold(problem(3, 20, 13, 24, strides=strides))


@each_stride
def test_tiled_strided_upstream_gradients(strides, tiled):
    hold(problem(3, 20, 13, 24), upstream=strides)


def test_tiled_large_scores(tiled):
    tensors = problem(2, 49, 40, 96, scale=30**0.5)
    hold(tensors, scores=(tensors["visual"].double() @ tensors["audio"].double().mT).abs().max().item())


@pytest.mark.parametrize(
    ("frozen", "fusion"),
    [pytest.param(names, f, id=f"{key}-{f}") for key, (names, fusions) in FROZEN.items() for f in fusions if f != "none"],
)
def test_tiled_frozen_inputs_change_nothing_else(fusion, frozen, tiled):
    hold(problem(2, 30, 21, 16), fusion=fusion, frozen=frozen)


def test_tiled_repeated_runs_are_bit_equal(tiled):
    tensors = problem(2, 60, 50, 48)
    first = evaluate(ops.cross_modal_attention, tensors)
    for _ in range(5):
        again = evaluate(ops.cross_modal_attention, tensors)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("used", [0, 1], ids=["visual", "audio"])
def test_tiled_loss_of_one_stream(used, tiled):
    """The other output is never differentiated."""
    check(
        "cross_modal_attention",
        lambda **tensors: ops.cross_modal_attention(**tensors)[used],
        lambda **tensors: reference.cross_modal_attention(**tensors)[used],
        problem(2, 30, 21, 16),
        reductions=[16, 30, 21],
        gates={("gate_visual", "gate_audio")[used]: (2, (30, 21)[used], 16)},
        gate_roundings=4,
        frozen={("gate_audio", "gate_visual")[used]},
    )


@pytest.mark.parametrize(("tokens", "served"), [(300, False), (600, True)], ids=["small", "large"])
def test_large_frames_are_tiled(tokens, served, all_threads):
    """On the CPU in float32; nothing the size of the scores is kept for the backward."""
    tensors = {name: x.requires_grad_() for name, x in problem(1, tokens, tokens, 8).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out, _ = ops.cross_modal_attention(**tensors)
    names = set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert any("TiledAttention" in name for name in names) == served
    assert max(saved) == tokens * 8
    hold(problem(1, tokens, tokens, 8))


ERRORS = {
    "rank": ({"audio": draw(0, 2, 13, 5)}, r"audio: expected shape \[2, m, 8\], got \[2, 13, 5\]"),
    "groups": ({"audio": draw(0, 3, 13, 8)}, r"audio: expected shape \[2, m, 8\], got \[3, 13, 8\]"),
    "dimensions": ({"visual": draw(0, 20, 8)}, r"visual: expected shape \[G, n, r\], got \[20, 8\]"),
    "gate_visual": ({"gate_visual": draw(0, 2)}, r"gate_visual: expected shape \[1\], got \[2\]"),
    "gate_audio": ({"gate_audio": torch.zeros(())}, r"gate_audio: expected shape \[1\], got \[\]"),
    "dtype": ({"audio": draw(0, 2, 13, 8).half()}, "expected one floating dtype.*visual torch.float32, audio torch.float16"),
    "integers": ({"gate_audio": torch.zeros(1).long()}, "expected one floating dtype.*gate_audio torch.int64"),
    "fusion": ({"fusion": "audio"}, "fusion: got 'audio', allowed are 'both', 'a2v', 'v2a', 'none'"),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed, message):
    with pytest.raises(ValueError, match=message):
        ops.cross_modal_attention(**problem(2, 20, 13, 8) | changed)


@pytest.mark.parametrize("longest", [{}, {torch.float32: 64}], ids=["tiled", "batched"])
def test_backward_may_run_under_autocast(longest, monkeypatch):
    """A forward outside autocast and a backward inside mixed two dtypes in one product."""
    monkeypatch.setattr(module, "_SMALL_SCORES", 0)
    monkeypatch.setattr(short_attention, "_LONGEST", longest)
    v, a = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(2))
    gates = torch.ones(1), torch.ones(1)
    out = ops.cross_modal_attention(v, a, *gates)
    upstream = [torch.randn_like(x) for x in out]
    wanted = torch.autograd.grad(out, (v, a), upstream, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, (v, a), upstream)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


KERNEL_SIZES = SIZES | {"long": (1, 130, 70, 16), "two-tiles": (1, 40, 96, 128)}
KERNEL = partial(ops.cross_modal_attention, impl="triton")


@each_kernel_dtype
@pytest.mark.parametrize("size", KERNEL_SIZES.values(), ids=KERNEL_SIZES.keys())
def test_kernel_sizes(kernels, size, dtype):
    hold(problem(*size, dtype=dtype), fast=KERNEL)


@pytest.mark.parametrize("gates", [(0.7, -0.4), (0.0, 0.0)], ids=["open", "closed"])
@each_fusion
def test_kernel_fusions(kernels, fusion, gates):
    problems = [problem(2, 30, 21, 16, gates=gates, seed=10 * seed) for seed in range(5)]
    hold(problems, fast=partial(KERNEL, fusion=fusion), fusion=fusion, gate_roundings=1)


@each_stride
def test_kernel_strides(kernels, strides):
    hold(problem(3, 20, 13, 24, strides=strides), fast=KERNEL, upstream=strides)


@each_kernel_dtype
def test_kernel_large_scores(kernels, dtype):
    """Scores are not scaled: they reach hundreds, of either sign, and stay in float32 until the maximum is taken."""
    tensors = problem(2, 49, 40, 96, dtype=dtype, scale=30**0.5)
    hold(tensors, fast=KERNEL, scores=(tensors["visual"].double() @ tensors["audio"].double().mT).abs().max().item())


def test_kernel_scores_that_are_all_negative(kernels):
    """Past the last token scores are 0, whose exponential against a log-sum-exp of -300 is infinite."""
    tensors = problem(1, 33, 35, 16)
    tensors |= {"visual": tensors["visual"].abs() + 4, "audio": -tensors["audio"].abs() - 4}
    hold(tensors, fast=KERNEL, scores=(tensors["visual"].double() @ tensors["audio"].double().mT).abs().max().item())


@pytest.mark.parametrize(
    ("frozen", "fusion"),
    [pytest.param(names, f, id=f"{key}-{f}") for key, (names, fusions) in FROZEN.items() for f in fusions],
)
def test_kernel_frozen_inputs_change_nothing_else(kernels, fusion, frozen):
    hold(problem(2, 30, 21, 16), fast=partial(KERNEL, fusion=fusion), fusion=fusion, frozen=frozen)


@each_fusion
def test_kernel_autocast(kernels, fusion):
    # float16: the interpreter truncates where a GPU rounds to bfloat16.
    hold(problem(2, 49, 40, 24), fast=partial(KERNEL, fusion=fusion), fusion=fusion, autocast=torch.float16)


@each_fusion
def test_kernel_compiled(kernels, fusion):
    fast = partial(KERNEL, fusion=fusion)
    hold_one = partial(hold, fusion=fusion)
    check_compiled(fast, hold_one, lambda batch: problem(batch, 20, 13, 8), batched=["visual", "audio"])


def test_kernel_saves_no_scores(kernels):
    """Hidden tokens, what they heard, and two log-sum-exps: nothing of n x m."""
    tensors = {name: x.requires_grad_() for name, x in problem(2, 90, 70, 4).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        KERNEL(**tensors)
    assert sorted(saved) == [1, 1, 2 * 70, 2 * 90, *[4 * 2 * 70] * 2, *[4 * 2 * 90] * 2]


def test_kernel_repeats_bit_equal(kernels):
    tensors = problem(2, 70, 50, 24)
    first = evaluate(KERNEL, tensors)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(KERNEL, tensors).items())


@pytest.mark.parametrize("fusion", ["both", "a2v", "v2a"])
def test_kernel_as_pytorch_sees_it(kernels, fusion):
    """Schema, fake and dispatch keys of the registered operators."""
    tensors = list(problem(2, 20, 13, 8).values())
    operators = torch.ops.stgcma_fast
    torch.library.opcheck(operators.cross_modal_fwd.default, (*tensors, fusion, torch.float32))
    _, _, *kept = operators.cross_modal_fwd(*tensors, fusion, torch.float32)
    for needed in (True, False):
        torch.library.opcheck(operators.cross_modal_bwd.default, (*tensors[:2], *tensors, *kept, fusion, needed))


def test_kernel_refuses_wide_hidden_tokens(kernels):
    with pytest.raises(NotImplementedError, match="hidden tokens of at most 128 channels, got 129"):
        KERNEL(**problem(1, 5, 5, 129))


@pytest.mark.parametrize("empty", ["visual", "audio"])
def test_kernel_refuses_empty_streams(kernels, empty):
    """Nothing to hear: the softmax of no scores is 0 / 0."""
    with pytest.raises(NotImplementedError, match="need a token in each stream"):
        KERNEL(**problem(2, 5, 4, 8) | {empty: draw(0, 2, 0, 8)})


def test_kernel_outputs_are_as_wide_as_their_gates(kernels):
    """Under autocast, half tokens beside float32 gates."""
    tensors = problem(2, 5, 4, 8, dtype=torch.float16) | {"gate_visual": torch.ones(1, device=Device.name)}
    with torch.autocast(Device.name, torch.float16):
        got, wanted = KERNEL(**tensors), reference.cross_modal_attention(**tensors)
    assert [x.dtype for x in got] == [x.dtype for x in wanted] == [torch.float32, torch.float16]

"""FastSTGCMA against the reference: every switch, dtype, and way of being run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import stgcma_fast as sf
from stgcma_fast.ops import dispatch, stream
from stgcma_fast.reference.model import is_trainable
from tests.support.models import inputs, seed, tiny_config

SWITCHES = {
    "both": {},
    "a2v": {"fusion": "a2v"},
    "v2a": {"fusion": "v2a"},
    "none": {"fusion": "none"},
    "visual_only": {"modalities": ("visual",)},
    "audio_only": {"modalities": ("audio",)},
    "adapt_visual": {"adapt": ("visual",), "fusion": "none"},
    "adapt_audio": {"adapt": ("audio",), "fusion": "none"},
    "no_temporal": {"use_temporal": False},
    "frozen_temporal": {"use_temporal": False, "temporal_without_adapter": True},
    "no_spatial": {"use_spatial": False},
    "no_global": {"use_global": False},
    "no_global_visual_only": {"use_global": False, "modalities": ("visual",)},
    "one_frame": {"num_frames": 1},
}


def _pair(arch, dtype=torch.float64, **switches):
    options = {key: switches.pop(key) for key in ("impl", "fold_temporal", "checkpointing") if key in switches}
    config = tiny_config(arch, **switches)
    return seed(sf.reference.ReferenceSTGCMA(config)).to(dtype), seed(sf.FastSTGCMA(config, **options)).to(dtype)


def _run(model, audio, video, target, random_seed=0):
    model.zero_grad()
    torch.manual_seed(random_seed)
    logits = model(audio, video)
    F.cross_entropy(logits, target).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(got, wanted, rtol=1e-9):
    (logits, gradients), (wanted_logits, wanted_gradients) = got, wanted
    torch.testing.assert_close(logits, wanted_logits, rtol=rtol, atol=rtol)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 100 * rtol, f"{name}: {error:.2e}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_every_switch_equals_the_reference(arch, switches, training):
    """In float64; in training mode both draw the same drop-path and dropout masks from one seed."""
    reference, fast = _pair(arch, drop_path=0.5, **SWITCHES[switches])
    batch = inputs(reference.config, dtype=torch.float64)
    reference.train(training), fast.train(training)
    _assert_same(_run(fast, *batch), _run(reference, *batch))


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_training_mode_drops_paths(arch):
    """Guards the test above: with drop path on, two seeds give two results."""
    _, fast = _pair(arch, drop_path=0.5)
    batch = inputs(fast.config, dtype=torch.float64)
    fast.train()
    fast.mlp_head.eval()
    assert not torch.equal(_run(fast, *batch, random_seed=0)[0], _run(fast, *batch, random_seed=1)[0])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{"fold_temporal": False}, {"checkpointing": True}, {"impl": "reference"}], ids=str)
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_options_change_nothing(arch, options, training):
    reference, fast = _pair(arch, drop_path=0.5, **options)
    batch = inputs(reference.config, dtype=torch.float64)
    reference.train(training), fast.train(training)
    _assert_same(_run(fast, *batch), _run(reference, *batch))


@pytest.mark.parametrize("switches", ["both", "visual_only", "frozen_temporal", "adapt_visual"])
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_streaming_changes_nothing(arch, switches, monkeypatch):
    reference, fast = _pair(arch, drop_path=0.5, **SWITCHES[switches])
    batch = inputs(reference.config, dtype=torch.float64)
    pieces = []
    monkeypatch.setattr(stream, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(stream, "_pieces", lambda *a, f=stream._pieces: pieces.append(len(f(*a))) or f(*a))
    reference.train(), fast.train()
    _assert_same(_run(fast, *batch), _run(reference, *batch))
    assert max(pieces) > 2


def test_trained_backbone_is_not_streamed(monkeypatch):
    """Streaming gives frozen layers no gradient, so a user's own unfrozen layer must take the other way."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 20_000)
    reference, fast = _pair("swin")
    for model in (reference, fast):
        model.layers[0].blocks[0].mlp.fc1.weight.requires_grad_(True)
        model.layers[1].blocks[0].attn.qkv.bias.requires_grad_(True)
        model.layers[0].blocks[1].attn.relative_position_bias_table.requires_grad_(True)
    batch = inputs(reference.config, dtype=torch.float64)
    got, wanted = _run(fast.eval(), *batch), _run(reference.eval(), *batch)
    assert "layers.0.blocks.0.mlp.fc1.weight" in wanted[1]
    _assert_same(got, wanted)


def test_trained_bias_table_alone_is_not_streamed(monkeypatch):
    """The attention reads the table through a closure: its gradient was lost when nothing else was unfrozen."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 20_000)
    _, fast = _pair("swin")
    table = fast.layers[0].blocks[1].attn.relative_position_bias_table.requires_grad_(True)
    _run(fast.eval(), *inputs(fast.config, dtype=torch.float64))
    assert table.grad.abs().max() > 0


def test_packed_path_copies_no_hidden_tensor_of_the_ffn():
    """The widest tensor of a block was taken apart and put together again between two products."""
    _, fast = _pair("swin", dtype=torch.float32)
    widths = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.cat.default:
                widths.append(out.shape[-1])
            return out

    with Watch(), torch.inference_mode():
        fast.eval()(*inputs(fast.config)[:2])
    dim = fast.config.backbone.width(1)
    assert dim in widths
    assert 4 * dim not in widths


def _errors(arch, dtype, run_low, run_fast):
    """Errors of logits and of the flattened gradient against float64, for the reference and for FastSTGCMA in ``dtype``."""
    config = tiny_config(arch)
    exact = seed(sf.reference.ReferenceSTGCMA(config)).to(dtype).double().eval()
    low, fast = (seed(cls(config)).eval() for cls in (sf.reference.ReferenceSTGCMA, sf.FastSTGCMA))
    audio, video, target = (x.to(dtype) for x in inputs(config))
    logits, gradients = _run(exact, audio.double(), video.double(), target.double())
    wanted = logits, torch.cat([g.flatten() for g in gradients.values()])

    def error(model, run):
        logits, gradients = run(model, audio, video, target)
        got = logits.double(), torch.cat([g.flatten() for g in gradients.values()]).double()
        assert all(x.isfinite().all() for x in got)
        return [float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)]

    return error(low, run_low), error(fast, run_fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_own_dtype(arch, dtype):
    """The whole model in one dtype: no worse than twice the reference in that dtype, gradients three times."""

    def run(model, *batch):
        return _run(model.to(dtype), *batch)

    low, fast = _errors(arch, dtype, run, run)
    assert fast[0] <= 2 * low[0] + torch.finfo(dtype).eps
    assert fast[1] <= 3 * low[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("cast", [False, True], ids=["fp32_weights", "cast_frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_autocast(arch, dtype, cast):
    """Under autocast, with frozen weights in float32 or held in the compute dtype; trained weights stay float32."""

    def run(model, audio, video, target):
        if cast and isinstance(model, sf.FastSTGCMA):
            model.cast_frozen(dtype)
        with torch.autocast("cpu", dtype):
            logits, gradients = _run(model, audio.float(), video.float(), target.float())
        assert all(g.dtype == torch.float32 for g in gradients.values())
        return logits, gradients

    low, fast = _errors(arch, dtype, run, run)
    assert fast[0] <= 2 * low[0] + torch.finfo(dtype).eps
    assert fast[1] <= 3 * low[1] + torch.finfo(dtype).eps


def test_cast_frozen_needs_autocast():
    model = sf.FastSTGCMA(tiny_config("swin")).cast_frozen(torch.bfloat16)
    with pytest.raises(ValueError, match=r"got torch.float32, expected torch.bfloat16.*autocast"):
        model(*inputs(model.config)[:2])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_inputs_of_another_dtype_are_named(impl):
    model = sf.FastSTGCMA(tiny_config("swin"), impl=impl)
    audio, video, _ = inputs(model.config)
    with pytest.raises(ValueError, match=r"audio: got torch.float64, expected torch.float32"):
        model(audio.double(), video)


def test_cast_frozen_holds_weights_once():
    model = sf.FastSTGCMA(tiny_config("clip"))
    before = {name: p.dtype for name, p in model.named_parameters()}
    model.cast_frozen(torch.bfloat16)
    changed = {name for name, p in model.named_parameters() if p.dtype != before[name]}
    assert "transformer.resblocks.0.attn.in_proj_weight" in changed
    assert "conv1.weight" in changed
    assert not any(is_trainable(name) or ".ln_" in name or "embedding" in name for name in changed)


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_inference_mode_then_training(arch):
    """Nothing made under inference_mode may be kept and break a later backward."""
    _, fast = _pair(arch)
    batch = inputs(fast.config, dtype=torch.float64)
    fast.eval()
    with torch.inference_mode():
        first = fast(*batch[:2])
    logits, _ = _run(fast, *batch)
    torch.testing.assert_close(logits, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_compiles_whole_and_once(arch):
    """fullgraph, equal to eager in outputs and gradients, and no second compilation for other batch sizes."""
    _, fast = _pair(arch, dtype=torch.float32)
    fast.eval()
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch_size in (2, 3, 5):
        batch = inputs(fast.config, batch=batch_size, seed=batch_size)
        with torch._dynamo.config.patch(error_on_recompile=batch_size > 2):
            logits = compiled(*batch[:2])
        gradients = torch.autograd.grad(F.cross_entropy(logits, batch[2]), compiled.trainable_parameters())
        wanted_logits, wanted = _run(fast, *batch)
        torch.testing.assert_close(logits.detach(), wanted_logits, rtol=1e-4, atol=1e-5)
        for got, parameter in zip(gradients, fast.trainable_parameters(), strict=True):
            assert (got - parameter.grad).norm() < 1e-3 * parameter.grad.norm()
    assert len(wanted) == len(gradients)


SMALLEST = {
    "swin": sf.SwinConfig(image_size=28, embed_dim=32, depths=(2,), num_heads=(1,)),
    "clip": sf.ClipConfig(image_size=32, patch_size=16, embed_dim=32, layers=1, heads=1, audio_frames=48, mel_bins=32),
}


@pytest.mark.parametrize("arch", SMALLEST)
def test_kernels_compile_whole(arch):
    """The graph of a train step holds every kernel as one operator, and gives what eager gives."""
    config = sf.ModelConfig(SMALLEST[arch], adapter_ratio=0.5, num_frames=2, num_classes=3)
    model = seed(sf.FastSTGCMA(config, impl="triton")).eval()
    batch = inputs(config, batch=1)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    logits = compiled(*batch[:2])
    gradients = torch.autograd.grad(F.cross_entropy(logits, batch[2]), compiled.trainable_parameters())
    wanted_logits, _ = _run(model, *batch)
    torch.testing.assert_close(logits.detach(), wanted_logits, rtol=1e-5, atol=1e-6)
    for got, parameter in zip(gradients, model.trainable_parameters(), strict=True):
        assert (got - parameter.grad).norm() < 1e-5 * parameter.grad.norm()
    assert len(gradients) == sum(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_compiles_with_inductor(arch):
    _, fast = _pair(arch, dtype=torch.float32)
    fast.eval()
    batch = inputs(fast.config)
    with torch.inference_mode():
        got = torch.compile(fast, fullgraph=True)(*batch[:2])
        torch.testing.assert_close(got, fast(*batch[:2]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_only_what_the_paper_trains_requires_grad(arch):
    model = sf.FastSTGCMA(tiny_config(arch))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not any("Adapter" in n or "gate_" in n or n.startswith("mlp_head") or "temporal" in n for n in frozen)
    allowed = ("Adapter", "gate_", "mlp_head", "temporal_embedding", "temporal_position_bias_table", "ln_post")
    assert all(any(part in name for part in allowed) for name in trained)
    assert {id(p) for p in model.trainable_parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_parameter_groups_are_the_published_ones():
    model = sf.FastSTGCMA(tiny_config("swin"))
    adapters, head = model.parameter_groups(5e-5, 0.1)
    assert (adapters["lr"], head["lr"]) == (5e-5, pytest.approx(5e-6))
    assert {id(p) for p in head["params"]} == {id(p) for p in model.mlp_head.parameters()}
    assert {id(p) for g in (adapters, head) for p in g["params"]} == {id(p) for p in model.trainable_parameters()}
    torch.optim.Adam(model.parameter_groups(5e-5), betas=(0.95, 0.999), weight_decay=5e-7)


def test_frozen_weights_get_no_gradient():
    _, fast = _pair("swin")
    _, gradients = _run(fast, *inputs(fast.config, dtype=torch.float64))
    assert gradients.keys() == {name for name, p in fast.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("arch", ["swin", "clip"])
def test_starts_as_the_frozen_transformer(arch):
    """At initial values the adapters add nothing: each frame alone gives the same scores."""
    torch.manual_seed(0)
    model = sf.FastSTGCMA(tiny_config(arch)).eval()
    audio, video, _ = inputs(model.config, batch=1)
    turned = [2, 0, 1]
    with torch.inference_mode():
        logits, shuffled = model(audio, video), model(audio[:, turned], video[:, :, turned])
    torch.testing.assert_close(shuffled, logits[turned], rtol=1e-4, atol=1e-5)


def test_gates_get_no_gradient_before_the_first_update():
    """``D_fc2`` starts at zero, so the exchange is invisible: the published first step."""
    torch.manual_seed(0)
    model = sf.FastSTGCMA(tiny_config("swin")).eval()
    _, gradients = _run(model, *inputs(model.config))
    assert all(gradients[name].abs().max() == 0 for name in gradients if "gate_" in name)
    assert any(gradients[name].abs().max() > 0 for name in gradients if "D_fc2" in name)


def test_same_run_same_bits():
    _, fast = _pair("swin", dtype=torch.float32)
    fast.eval()
    batch = inputs(fast.config)
    (first, gradients), (second, again) = _run(fast, *batch), _run(fast, *batch)
    assert torch.equal(first, second)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_learns_like_the_reference():
    """Twenty steps from one seed: the same loss curve."""
    reference, fast = _pair("swin", dtype=torch.float32)
    batch = inputs(reference.config)
    curves = []
    for model in (reference, fast):
        model.train()
        torch.manual_seed(1)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.95, 0.999))
        losses = []
        for _ in range(20):
            loss = F.cross_entropy(model(*batch[:2]), batch[2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


WRONG_INPUTS = {
    "frames": (lambda a, v: (a[:, :2], v), r"audio: expected .*\[B, 3, 56, 56\], got shape \[2, 2, 56, 56\]"),
    "video_frames": (lambda a, v: (a, v[:, :, :2]), r"video: expected .*\[B, 3, 3, 56, 56\], got shape \[2, 3, 2, 56, 56\]"),
    "image_size": (lambda a, v: (a, v[..., :48, :48]), r"video: .*got shape \[2, 3, 3, 48, 48\]"),
    "mel_bins": (lambda a, v: (a[..., :48], v), r"audio: .*got shape \[2, 3, 56, 48\]"),
    "batch": (lambda a, v: (a[:1], v), r"audio has 1 clips, video has 2"),
    "empty": (lambda a, v: (a[:0], v[:0]), r"got shape \[0, 3, 56, 56\]"),
    "rank": (lambda a, v: (a[0], v), r"audio: .*got shape \[3, 56, 56\]"),
    "none": (lambda a, v: (None, v), r"audio: .*got None"),
    "integer": (lambda a, v: (a.long(), v), r"audio: .*got dtype torch.int64"),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
@pytest.mark.parametrize("cls", [sf.FastSTGCMA, sf.reference.ReferenceSTGCMA], ids=["fast", "reference"])
def test_wrong_input_is_named_before_any_work(cls, wrong):
    model = cls(tiny_config("swin"))
    break_it, message = WRONG_INPUTS[wrong]
    model.patch_embed.register_forward_pre_hook(lambda *_: pytest.fail("work was done before the check"))
    model.patch_embed_audio.register_forward_pre_hook(lambda *_: pytest.fail("work was done before the check"))
    with pytest.raises(ValueError, match=message):
        model(*break_it(*inputs(model.config)[:2]))


def test_modes_are_the_published_names():
    model = sf.FastSTGCMA(tiny_config("clip")).eval()
    audio, video, _ = inputs(model.config)
    with torch.inference_mode():
        assert torch.equal(model(audio, video, "fusion"), model(audio, video, mode="multimodal"))
        for mode in ("videoonly", "audioonly", "both"):
            with pytest.raises(ValueError, match=f"mode: got '{mode}'.*'fusion', 'multimodal'"):
                model(audio, video, mode)
    visual = sf.FastSTGCMA(tiny_config("clip", modalities=("visual",))).eval()
    assert visual(None, video, "videoonly").shape == (6, 7)


def test_an_explicit_implementation_never_falls_back(monkeypatch):
    model = sf.FastSTGCMA(tiny_config("swin"), impl="triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="impl='triton' was asked for, but its kernels need a CUDA device, got cpu"):
        model(*inputs(model.config)[:2])
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(NotImplementedError, match="impl='triton' was asked for, but triton is not installed"):
        sf.FastSTGCMA(tiny_config("swin"), impl="triton")
    with pytest.raises(ValueError, match="impl: got 'cuda', allowed are 'auto'"):
        sf.FastSTGCMA(tiny_config("swin"), impl="cuda")


def test_presets_by_name_and_switches():
    with torch.device("meta"):
        model = sf.FastSTGCMA("swin_l", adapters="base", task="ave", num_classes=12)
    assert model.config == sf.preset("swin_l", "base", num_classes=12)
    for arguments in ({"num_classes": 3}, {"adapters": "tiny"}):
        with pytest.raises(ValueError, match=f"got \\['{next(iter(arguments))}'\\] beside a whole configuration"):
            sf.FastSTGCMA(tiny_config("swin"), **arguments)
    with pytest.raises(ValueError, match="config: got None, expected a ModelConfig"):
        sf.FastSTGCMA(None)
    with pytest.raises(ValueError, match="checkpointing: got True with impl='reference'"):
        sf.FastSTGCMA(tiny_config("swin"), impl="reference", checkpointing=True)

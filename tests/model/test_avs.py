"""Segmentation of what sounds: the head's pieces against formulas, the fast model against the reference, published keys."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import stgcma_fast as sf
from stgcma_fast.heads import avs as fast_head
from stgcma_fast.heads.avs import avs_loss
from stgcma_fast.reference import avs as head
from stgcma_fast.reference.model import is_trainable
from tests.support.models import seed, task_inputs

# Grids of 8 and 4 tokens a side: some dilations reach across the map, others do not.
SWIN = sf.SwinConfig(image_size=32, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window=4)
MODELS = {"reference": sf.reference.ReferenceSTGCMA, "fast": sf.FastSTGCMA}
each_model = pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)


def config(**switches) -> sf.ModelConfig:
    return sf.ModelConfig(**{"backbone": SWIN, "adapter_ratio": 0.5, "num_frames": 2, "task": "avs"} | switches)


def flat(out):
    prediction, maps, aligned = out
    return [prediction, *maps, *aligned]


def run(model, arguments, loss_of, random_seed=0):
    """Outputs, gradients and buffers after one step."""
    torch.manual_seed(random_seed)
    out = model(*arguments)
    loss_of(out).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in flat(out)], gradients, dict(model.named_buffers())


@each_model
@pytest.mark.parametrize(("batch", "frames"), [(2, 3), (1, 1)])
def test_shapes(cls, batch, frames):
    model = seed(cls(config(num_frames=frames))).eval()
    arguments, _ = task_inputs(model.config, batch)
    with torch.inference_mode():
        prediction, maps, aligned = model(*arguments, "fusion")
    assert prediction.shape == (batch * frames, 1, 32, 32)
    assert [x.shape for x in maps] == [(batch * frames, 256, side, side) for side in (8, 4)]
    assert [x.shape for x in aligned] == [(batch, frames, 256)] * 2
    # As published, whose first ReLU overwrites the maps.
    assert all((x >= 0).all() and (x == 0).any() for x in maps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("switches", [{}, {"num_frames": 1}, {"fusion": "none", "use_temporal": False}], ids=str)
def test_fast_equals_the_reference(switches, training):
    """In float64; batch norm's statistics, too."""
    arguments, loss_of = task_inputs(config(**switches), batch=2, dtype=torch.float64)
    models = [seed(cls(config(**switches))).double().train(training) for cls in MODELS.values()]
    (wanted, wanted_gradients, wanted_buffers), (got, gradients, buffers) = (run(m, arguments, loss_of) for m in models)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == wanted_gradients.keys()
    size = max(float(g.norm()) for g in wanted_gradients.values())
    for name, gradient in wanted_gradients.items():
        # A bias before batch norm has no gradient in training but rounding errors.
        allowed = 1e-12 * size if training and name.endswith("W_z.0.bias") else 1e-7 * gradient.norm()
        assert (gradients[name] - gradient).norm() <= allowed, name
    torch.testing.assert_close(buffers, wanted_buffers, rtol=1e-9, atol=1e-9)
    counted = [int(b) for name, b in buffers.items() if name.endswith("num_batches_tracked")]
    assert counted == [int(training)] * 2


@each_model
def test_the_first_frame_alone(cls):
    """Its logits, and the loss's gradients, are those of a call that gives all frames; so are batch norm's statistics."""
    arguments, _ = task_inputs(config(num_frames=3), batch=2, dtype=torch.float64)
    mask = (torch.rand(2, 1, 1, 32, 32, dtype=torch.float64) > 0.5).double()
    whole, first = (seed(cls(config(num_frames=3))).double().train() for _ in range(2))
    torch.manual_seed(0)
    wanted = whole(*arguments)
    avs_loss(wanted[0], mask).backward()
    torch.manual_seed(0)
    got = first(*arguments, first_frame=True)
    avs_loss(got[0], mask).backward()
    torch.testing.assert_close(got[0], wanted[0][::3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-10, atol=1e-10)
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in first.named_parameters() if p.grad is not None}
    size = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (first.get_parameter(name).grad - gradient).norm() <= 1e-9 * gradient.norm() + 1e-13 * size, name
    torch.testing.assert_close(dict(first.named_buffers()), dict(whole.named_buffers()))


def test_only_avs_has_a_first_frame():
    other = sf.FastSTGCMA(sf.ModelConfig(SWIN, 0.5, num_frames=2))
    with pytest.raises(ValueError, match="first_frame: got True with task 'ave', expected 'avs'"):
        other(*task_inputs(other.config)[0], first_frame=True)


@pytest.mark.parametrize("options", [{"impl": "reference"}, {"impl": "triton"}, {"checkpointing": True}], ids=str)
def test_options_change_nothing(options):
    arguments, loss_of = task_inputs(config(), batch=1)
    wanted, wanted_gradients, _ = run(seed(sf.FastSTGCMA(config())).eval(), arguments, loss_of)
    got, gradients, _ = run(seed(sf.FastSTGCMA(config(), **options)).eval(), arguments, loss_of)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    assert all((gradients[name] - g).norm() <= 1e-3 * g.norm() for name, g in wanted_gradients.items())


def test_autocast():
    """Under autocast no worse than twice the reference, gradients three times."""
    arguments, loss_of = task_inputs(config(), batch=1)
    exact = run(seed(sf.reference.ReferenceSTGCMA(config())).eval(), arguments, loss_of)
    errors = []
    for cls in MODELS.values():
        with torch.autocast("cpu", torch.bfloat16):
            got, gradients, _ = run(seed(cls(config())).eval(), arguments, lambda out: loss_of([out[0].float()]))
        joined = [torch.cat([g[name].flatten() for name in exact[1]]) for g in (gradients, exact[1])]
        errors.append([float((got[0].float() - exact[0][0]).norm()), float((joined[0] - joined[1]).norm())])
    (low, low_gradients), (fast, fast_gradients) = errors
    assert fast <= 2 * low
    assert fast_gradients <= 3 * low_gradients


def modules(seed_value=0):
    torch.manual_seed(seed_value)
    tpavi = head.Tpavi().double()
    torch.nn.init.normal_(tpavi.W_z[1].weight)
    torch.nn.init.normal_(tpavi.W_z[1].bias)
    return tpavi


def test_tpavi_is_its_formula():
    """Written out with loops over pixels and statistics by hand."""
    tpavi, B, T, R = modules().train(), 2, 3, 2
    x, audio = torch.randn(B, 256, T, R, R, dtype=torch.float64), torch.randn(B, T, 128, dtype=torch.float64)
    z, aligned = tpavi(x, audio)

    def apply(conv, v):
        return conv.weight.flatten(1) @ v + conv.bias

    raw = torch.empty_like(x)
    pixels = [(t, i, j) for t in range(T) for i in range(R) for j in range(R)]
    for b in range(B):
        assert torch.allclose(aligned[b, 0], tpavi.align_channel.weight @ audio[b, 0] + tpavi.align_channel.bias)
        for t, i, j in pixels:
            theta = apply(tpavi.theta, x[b, :, t, i, j])
            y = sum(
                (theta @ apply(tpavi.phi, aligned[b, s])) / len(pixels) * apply(tpavi.g, x[b, :, s, k, m]) for s, k, m in pixels
            )
            raw[b, :, t, i, j] = apply(tpavi.W_z[0], y)
    mean, var = raw.mean((0, 2, 3, 4)), raw.var((0, 2, 3, 4), correction=0)
    norm = tpavi.W_z[1]
    scaled = (raw.movedim(1, -1) - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias + x.movedim(1, -1)
    centred = scaled - scaled.mean(-1, keepdim=True)
    wanted = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(z.movedim(1, -1), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * raw.var((0, 2, 3, 4)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("B", "T", "R"), [(2, 3, 5), (1, 1, 3), (3, 2, 1)])
def test_tpavi_without_its_matrix_of_pixels(training, B, T, R):
    """The factorised form against the literal one, in float64, with gradients of inputs and parameters."""
    literal = modules().train(training)
    factorised = copy.deepcopy(literal)
    x, audio = torch.randn(B, 256, T, R, R, dtype=torch.float64), torch.randn(B, T, 128, dtype=torch.float64)
    upstream = torch.randn(B, T, R * R, 256, dtype=torch.float64), torch.randn(B, T, 256, dtype=torch.float64)
    results = []
    for module, call in ((literal, literal), (factorised, lambda *a: fast_head.tpavi(factorised, *a))):
        tokens, heard = x.flatten(3).permute(0, 2, 3, 1).clone().requires_grad_(), audio.clone().requires_grad_()
        if module is literal:
            z, aligned = call(tokens.permute(0, 3, 1, 2).unflatten(3, (R, R)), heard)
            z = z.flatten(3).permute(0, 2, 3, 1)
        else:
            z, aligned = call(tokens, heard)
        torch.autograd.backward([z, aligned], upstream)
        results.append([z.detach(), aligned.detach(), tokens.grad, heard.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dict(factorised.named_buffers()), dict(literal.named_buffers()), rtol=1e-9, atol=1e-9)


def test_tpavi_makes_no_matrix_of_pixels():
    """At the published size the matrix is a gigabyte; here it is twice as large as the map."""
    tpavi, x, audio = head.Tpavi().eval(), torch.randn(1, 2, 16 * 16, 256), torch.randn(1, 2, 128)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Watch():
        fast_head.tpavi(tpavi, x, audio)
    assert largest == x.numel() < 512**2


def test_residual_is_that_of_a_relu_in_place():
    unit, x = head.ResidualConvs().double(), torch.randn(1, 256, 4, 4, dtype=torch.float64)
    skip = x.clone()
    hidden = F.relu(skip, inplace=True)
    wanted = unit.conv2(F.relu(unit.conv1(hidden))) + skip
    torch.testing.assert_close(unit(x), wanted)
    assert not torch.allclose(unit(x), unit.conv2(F.relu(unit.conv1(F.relu(x)))) + x)


@pytest.mark.parametrize("side", [3, 4, 7, 19])
def test_dilated_convolutions_skip_only_padding(side):
    convs, x = head.DilatedConvs(8).double(), torch.randn(2, 8, side, side, dtype=torch.float64)
    upstream = torch.randn(2, 256, side, side, dtype=torch.float64)
    results = []
    for call in (convs, lambda x: fast_head._dilated(convs, x)):
        convs.zero_grad()
        y = call(x)
        y.backward(upstream)
        results.append([y.detach(), *(p.grad for p in convs.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def shapes(arch):
    """The published keys of the head."""
    E = sf.preset(arch).backbone.embed_dim
    table = {"avstask_audio_linear.weight": [128, 8 * E], "avstask_audio_linear.bias": [128]}
    for n, V in enumerate((64, 128, 320, 512), 1):
        for i in range(4):
            table |= {f"avstask_conv{n}.conv2d_list.{i}.weight": [256, V, 3, 3], f"avstask_conv{n}.conv2d_list.{i}.bias": [256]}
        for unit in ("resConfUnit1", "resConfUnit2"):
            for conv in ("conv1", "conv2"):
                key = f"avstask_path{n}.{unit}.{conv}"
                table |= {f"{key}.weight": [256, 256, 3, 3], f"{key}.bias": [256]}
        table |= {f"avstask_x{n}_linear.weight": [V, E * 2 ** (n - 1)], f"avstask_x{n}_linear.bias": [V]}
        tpavi = f"avstask_tpavi_b{n}"
        table |= {f"{tpavi}.align_channel.weight": [256, 128], f"{tpavi}.align_channel.bias": [256]}
        table |= {f"{tpavi}.norm_layer.{part}": [256] for part in ("weight", "bias")}
        for conv in ("g", "theta", "phi"):
            table |= {f"{tpavi}.{conv}.weight": [128, 256, 1, 1, 1], f"{tpavi}.{conv}.bias": [128]}
        table |= {f"{tpavi}.W_z.0.weight": [256, 128, 1, 1, 1], f"{tpavi}.W_z.0.bias": [256]}
        table |= {f"{tpavi}.W_z.1.{part}": [256] for part in ("weight", "bias", "running_mean", "running_var")}
        table |= {f"{tpavi}.W_z.1.num_batches_tracked": []}
    for i, size in {0: [128, 256, 3, 3], 2: [32, 128, 3, 3], 4: [1, 32, 1, 1]}.items():
        table |= {f"avstask_output_conv.{i}.weight": size, f"avstask_output_conv.{i}.bias": size[:1]}
    return table


@pytest.mark.parametrize("arch", ["swin_b", "swin_l"])
def test_published_keys(arch):
    with torch.device("meta"):
        model, ave = (sf.FastSTGCMA(arch, task=task, num_frames=5) for task in ("avs", "ave"))
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert (len(state), len(list(model.parameters())), len(list(model.buffers()))) == (1090, 1019, 71)
    trunk = {key: list(value.shape) for key, value in ave.state_dict().items() if not key.startswith("mlp_head")}
    assert state == trunk | shapes(arch)


def test_what_is_trained():
    model = seed(sf.FastSTGCMA(config()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name in trained for name, _ in model.named_parameters() if name.startswith("avstask_"))
    assert "norm.weight" not in trained
    (group,) = model.parameter_groups(3e-4, head_lr=0.1)
    assert group["lr"] == 3e-4
    assert {id(p) for p in group["params"]} == {id(p) for p in model.trainable_parameters()}
    _, gradients, _ = run(model, *task_inputs(model.config))
    # As published: one unit is never used.
    assert trained - gradients.keys() == {name for name in trained if name.startswith("avstask_path2.resConfUnit1")}
    assert gradients.keys() <= trained


def test_starting_values():
    torch.manual_seed(0)
    model = sf.FastSTGCMA(config()).eval()
    assert not model.avstask_tpavi_b1.W_z[1].weight.any()
    assert not model.avstask_tpavi_b1.W_z[1].bias.any()
    assert abs(float(model.avstask_conv1.conv2d_list[2].weight.detach().std()) - 0.01) < 1e-3
    assert abs(float(model.avstask_audio_linear.weight.detach().std()) - 0.02) < 2e-3
    x = torch.randn(1, 2, 16, 256)
    z, _ = fast_head.tpavi(model.avstask_tpavi_b1, x, torch.randn(1, 2, 128))
    torch.testing.assert_close(z, F.layer_norm(x, (256,)))


def test_checkpoints_hold_the_statistics(tmp_path):
    """Batch norm's buffers are trained, in effect: whole checkpoints and adapters alone bring them, and are not refused."""
    trained = seed(sf.FastSTGCMA(config())).train()
    run(trained, *task_inputs(trained.config))
    trained.eval()
    arguments, _ = task_inputs(trained.config, seed=1)
    with torch.inference_mode():
        wanted = trained(*arguments)[0]
        whole = sf.FastSTGCMA(config()).eval()
        whole.load_state_dict({f"module.{key}": value for key, value in trained.state_dict().items()})
        assert torch.equal(whole(*arguments)[0], wanted)
        sf.save_adapters(trained, tmp_path / "adapters.safetensors")
        saved = load_file(tmp_path / "adapters.safetensors")
        assert sum(key.startswith("avstask_") for key in saved) == sum(k.startswith("avstask_") for k in trained.state_dict())
        assert all(is_trainable(key) for key in saved)
        adapted = seed(sf.FastSTGCMA(config())).eval()
        assert not torch.equal(adapted(*arguments)[0], wanted)
        sf.load_adapters(adapted, tmp_path / "adapters.safetensors")
        assert torch.equal(adapted(*arguments)[0], wanted)
    with pytest.raises(ValueError, match="buffers of another window, shift or number of frames"):
        whole.load_state_dict(sf.FastSTGCMA(config(num_frames=3)).state_dict())


def test_pretrained_folder(tmp_path):
    model = seed(sf.FastSTGCMA(config())).eval()
    model.save_pretrained(tmp_path)
    loaded = sf.FastSTGCMA.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


WRONG_INPUTS = {
    "layout": (lambda a, v: (a, v.transpose(1, 2)), r"video: expected .*\[B, 2, 3, 32, 32\], got shape \[2, 3, 2, 32, 32\]"),
    "audio": (lambda a, v: (a[..., :16], v), r"audio: .*got shape \[2, 2, 32, 16\]"),
    "batch": (lambda a, v: (a[:1], v), "audio has 1 clips, video has 2"),
    "mode": (lambda a, v: (a, v, "videoonly"), "mode: got 'videoonly'.*'fusion', 'multimodal'"),
    "negative": (lambda a, v: (a, v, v), "negative, question: task 'avs' has neither"),
}


@each_model
@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_input_is_named(cls, wrong):
    break_it, message = WRONG_INPUTS[wrong]
    with pytest.raises(ValueError, match=message):
        cls(config())(*break_it(*task_inputs(config())[0]))


def test_loss():
    B, T = 2, 3
    prediction, masks = torch.randn(B * T, 1, 4, 5), torch.rand(B, T, 1, 4, 5)
    first = F.binary_cross_entropy(prediction[0::T].sigmoid(), masks[:, 0])
    torch.testing.assert_close(avs_loss(prediction, masks), first)
    torch.testing.assert_close(avs_loss(prediction, masks[:, :1]), first)
    every = F.binary_cross_entropy(prediction.sigmoid(), masks.flatten(0, 1))
    torch.testing.assert_close(avs_loss(prediction, masks, all_frames=True), every)
    ious = []
    for p, m in zip(prediction.sigmoid(), masks.flatten(0, 1), strict=True):
        ious.append(((p * m).sum() + 1) / (p.sum() + m.sum() - (p * m).sum() + 1))
    torch.testing.assert_close(
        avs_loss(prediction, masks, all_frames=True, iou_weight=0.5), every + 0.5 * (1 - torch.stack(ious).mean())
    )
    assert avs_loss(torch.full((1, 1, 2, 2), 200.0), torch.zeros(1, 1, 1, 2, 2)) == 200


def test_loss_of_half_precision():
    """Over all pixels of a frame the probabilities' sum is more than float16 has, and than bfloat16 can count."""
    masks = (torch.rand(2, 1, 1, 224, 224) > 0.5).float()
    sure = (40 * masks - 20).flatten(0, 1)
    for dtype in (torch.float16, torch.bfloat16):
        wanted = avs_loss(sure.to(dtype).float(), masks, iou_weight=1.0)
        got = avs_loss(sure.to(dtype), masks, iou_weight=1.0)
        torch.testing.assert_close(got, wanted)
        assert got < 1e-4


@pytest.mark.parametrize(
    ("shape", "all_frames"),
    [
        ((2, 1, 1, 4, 5), True),
        ((2, 2, 1, 4, 5), False),
        ((4, 1, 1, 4, 5), False),
        ((7, 1, 1, 4, 5), False),
        ((2, 1, 4, 5), False),
    ],
)
def test_loss_of_wrong_masks(shape, all_frames):
    with pytest.raises(ValueError, match="mask: got shape"):
        avs_loss(torch.randn(6, 1, 4, 5), torch.zeros(shape), all_frames=all_frames)


@pytest.mark.slow
def test_compiles_whole_and_once():
    backbone = sf.SwinConfig(image_size=16, embed_dim=16, depths=(1,), num_heads=(1,), window=4)
    model = seed(sf.FastSTGCMA(config(backbone=backbone, num_frames=3))).eval()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager", dynamic=True)
    # PyTorch convolves fewer than 16 images on the CPU in another way, and compiles that anew.
    for batch in (6, 7, 9):
        arguments, _ = task_inputs(model.config, batch, seed=batch)
        with torch._dynamo.config.patch(error_on_recompile=batch > 6):
            got = compiled(*arguments)[0]
        torch.testing.assert_close(got, model(*arguments)[0], rtol=1e-4, atol=1e-5)


def test_frames_are_those_of_the_data():
    assert replace(config(), num_frames=None).num_frames == 5

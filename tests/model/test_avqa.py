"""Question answering: the head against its formulas, the negative frames' way, published keys, grounding files."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import stgcma_fast as sf
from stgcma_fast.heads.avqa import avqa_loss
from stgcma_fast.reference import avqa as head_module
from stgcma_fast.reference.model import is_trainable
from tests.support.models import seed, task_inputs

SWIN = sf.SwinConfig(image_size=16, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window=2)
MODELS = {"reference": sf.reference.ReferenceSTGCMA, "fast": sf.FastSTGCMA}
HEADS = ("dgsct1536", "lavish512", "shipped512_128")
each_model = pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)
each_head = pytest.mark.parametrize("head", HEADS)


def config(head="dgsct1536", **switches) -> sf.ModelConfig:
    defaults = {"adapter_ratio": 0.5, "num_frames": 3, "task": "avqa", "head": head, "num_classes": 5, "vocabulary": 11}
    return sf.ModelConfig(SWIN, **defaults | switches)


def run(model, arguments, loss_of, random_seed=0):
    model.zero_grad()
    torch.manual_seed(random_seed)
    out = model(*arguments)
    loss_of(out).backward()
    return [x.detach() for x in out], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, wanted, rtol=1e-9):
    torch.testing.assert_close(got[0], wanted[0], rtol=rtol, atol=rtol)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= 100 * rtol * gradient.norm().clamp_min(1e-6), name


@each_model
@each_head
@pytest.mark.parametrize(("batch", "frames"), [(2, 3), (1, 1)])
def test_shapes(cls, head, batch, frames):
    """One clip of one frame, too: the published code's squeezes lost a dimension there."""
    model = seed(cls(config(head, num_frames=frames))).eval()
    arguments, loss_of = task_inputs(model.config, batch)
    out = model(*arguments, "fusion")
    assert [x.shape for x in out] == [(batch, 5), (batch * frames, 2), (batch * frames, 2)]
    loss_of(out).backward()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@each_head
def test_fast_equals_the_reference(head, training):
    """In float64; in training mode both draw the same masks of drop path and dropout from one seed."""
    arguments, loss_of = task_inputs(config(head), dtype=torch.float64)
    models = [seed(cls(config(head, drop_path=0.5))).double().train(training) for cls in MODELS.values()]
    wanted, got = (run(model, arguments, loss_of) for model in models)
    assert_same(got, wanted)
    assert got[1].keys() == {name for name, p in models[0].named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{"impl": "reference"}, {"impl": "triton"}, {"checkpointing": True}], ids=str)
def test_options_change_nothing(options):
    arguments, loss_of = task_inputs(config(), batch=1)
    wanted = run(seed(sf.FastSTGCMA(config())).train(), arguments, loss_of)
    assert_same(run(seed(sf.FastSTGCMA(config(), **options)).train(), arguments, loss_of), wanted, rtol=1e-5)


@each_head
def test_head_is_its_formulas(head):
    """Clip by clip and frame by frame, from what the head reads."""
    model = seed(sf.reference.ReferenceSTGCMA(config(head))).double().eval()
    (audio, video, negative, question), _ = task_inputs(model.config, dtype=torch.float64)
    tokens, _ = model.tokens({"visual": video, "audio": audio[:, :, None], "negative": negative})
    answers, positive, unlike = model(audio, video, negative, question)
    layer = {name.removeprefix("avqatask_"): module for name, module in model.named_children() if name.startswith("avqatask_")}
    B, T = audio.shape[:2]
    for b in range(B):
        heard, grounded = [], []
        for t in range(T):
            a = tokens["audio"][b, t]
            if head == "dgsct1536":
                a = a.mean(0)
            elif head == "lavish512":
                a = layer["yb_fc_a"](a).mean(0)
            else:
                a = layer["fc_a1"](layer["yb_fc_a"](a).mean(0))
            a = layer["fc_a2"](F.relu(a))
            heard.append(a)
            for stream, logits in (("visual", positive), ("negative", unlike)):
                f = tokens[stream][b, t]
                if head != "dgsct1536":
                    f = layer["yb_fc_v"](f)
                n = f / f.norm(dim=-1, keepdim=True)
                w = torch.softmax(n @ (a / a.norm()), 0)
                g = layer["fc_gl"](torch.tanh(torch.cat([f.mean(0), (w[:, None] * n).sum(0)])))
                if stream == "visual":
                    grounded.append(g)
                x = torch.cat([a, g])
                for name in ("fc1", "fc2", "fc3"):
                    x = F.relu(layer[name](x))
                torch.testing.assert_close(logits[b * T + t], layer["fc4"](x))
        encoder = layer["question_encoder"]
        h = c = torch.zeros(encoder.fc.out_features, dtype=torch.float64)
        lstm = encoder.lstm
        for word in question[b]:
            e = torch.tanh(encoder.word2vec.weight[word])
            gates = lstm.weight_ih_l0 @ e + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
            i, f, g, o = gates.chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        q = encoder.fc(torch.tanh(torch.cat([h, c])))
        ys = []
        for frames, name, linears, norm in (
            (heard, "attn_a", ("linear21", "linear22"), "norm2"),
            (grounded, "attn_v", ("linear11", "linear12"), "norm1"),
        ):
            frames, attention = torch.stack(frames), layer[name]
            d = q.shape[0] // 4
            weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
            query, key, value = (F.linear(x, weight[i], bias[i]) for i, x in enumerate((q[None], frames, frames)))
            heads = []
            for k in range(4):
                part = slice(k * d, (k + 1) * d)
                heads.append(torch.softmax(query[:, part] @ key[:, part].T / d**0.5, -1) @ value[:, part])
            o = attention.out_proj(torch.cat(heads, -1))[0]
            y = layer[norm](o + layer[linears[1]](F.relu(layer[linears[0]](o))))
            ys.append(y + frames.mean(0))
        z = layer["fc_fusion"](torch.tanh(torch.cat(ys)))
        torch.testing.assert_close(answers[b], layer["fc_ans"](torch.tanh(z * q)))


@pytest.mark.parametrize("modality", ["visual", "audio"])
def test_dropout_in_training(modality, monkeypatch):
    """Of the attention's weights, of the hidden layer and of what is added: with a dropout that doubles each time."""
    model = seed(sf.reference.ReferenceSTGCMA(config())).double().train()
    number = {"visual": 1, "audio": 2}[modality]
    attention = getattr(model, f"avqatask_attn_{modality[0]}")
    first, second = (getattr(model, f"avqatask_linear{number}{k}") for k in (1, 2))
    query, frames = torch.randn(2, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    assert attention.dropout == 0.1
    attention.dropout = 0.0
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x * 2 if training and p == 0.1 else x)
    x = attention(query[:, None], frames, frames)[0][:, 0]
    wanted = getattr(model, f"avqatask_norm{number}")(x + 2 * second(2 * first(x).relu()))
    torch.testing.assert_close(head_module.attend(model, query, frames, modality), wanted)


@each_model
def test_answers_need_no_negative_frames(cls):
    model = seed(cls(config())).eval()
    (audio, video, negative, question), _ = task_inputs(model.config)
    with torch.inference_mode():
        answers, positive, _ = model(audio, video, negative, question, "fusion")
        alone, alone_positive, none = model(audio, video, None, question)
        named = model(audio=audio, video=video, question=question, mode="fusion")
    assert none is None
    for got, wanted in ((alone, answers), (alone_positive, positive), (named[0], answers)):
        torch.testing.assert_close(got, wanted)


def images(model, **switches):
    (audio, video, negative, _), _ = task_inputs(model.config, **switches)
    return {"visual": video, "audio": audio[:, :, None], "negative": negative}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_negative_frames_keep_nothing_for_a_backward(impl, training):
    model = seed(sf.FastSTGCMA(config(), impl=impl)).train(training)
    kept, streams = [], images(model)
    for given in (streams, {m: x for m, x in streams.items() if m != "negative"}):
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        with saved_tensors_hooks(count, lambda x: x):
            tokens, _ = model.tokens(given)
        assert tokens["visual"].requires_grad
        assert "negative" not in tokens or not tokens["negative"].requires_grad
    assert kept[0] == kept[1] > 0


@each_model
def test_negative_frames_pass_the_frozen_transformer_alone(cls):
    torch.manual_seed(0)
    model = cls(config()).eval()
    streams = images(model)
    with torch.no_grad():
        # At starting values adapters add nothing, and the positive way is the frozen transformer, too.
        tokens, _ = model.tokens(streams | {"negative": streams["visual"]})
        torch.testing.assert_close(tokens["negative"], tokens["visual"])
        before = model.tokens(streams)[0]["negative"]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        changed = model.tokens(streams)[0]
    torch.testing.assert_close(changed["negative"], before)
    assert not torch.allclose(changed["visual"], tokens["visual"])


def test_negative_frames_drop_paths_by_frame():
    """In training each frame loses, or has at double weight, either residual of a block of rate one half."""
    model = seed(sf.reference.ReferenceSTGCMA(config(drop_path=0.5))).double()
    block, x = model.layers[1].blocks[0], torch.randn(4, 3, 16, 32, dtype=torch.float64)
    assert block.drop_rate == 0.5
    x = x[:, :, : block.resolution**2]
    dropped, found = block.train().frozen(x), []
    block.eval()
    with torch.no_grad():
        ways = {}
        for first in (0, 2):
            middle = x + first * block.mhsa(x)
            ways |= {(first, second): middle + second * block.ffn(middle) for second in (0, 2)}
    for b in range(4):
        for t in range(3):
            (way,) = (way for way, y in ways.items() if torch.allclose(y[b, t], dropped[b, t]))
            found.append(way)
    assert len(set(found)) > 2


def test_a_trained_backbone_learns_from_negative_frames():
    arguments, loss_of = task_inputs(config(), dtype=torch.float64)
    results = []
    for cls in MODELS.values():
        model = seed(cls(config())).double().eval()
        model.layers[0].blocks[1].mlp.fc1.weight.requires_grad_(True)
        results.append(run(model, arguments, loss_of))
        model.zero_grad()
        unlike = model(*arguments)[2]
        unlike.backward(torch.randn(unlike.shape, dtype=unlike.dtype, generator=torch.Generator().manual_seed(3)))
        results[-1][1]["negative alone"] = model.layers[0].blocks[1].mlp.fc1.weight.grad
    assert "layers.0.blocks.1.mlp.fc1.weight" in results[0][1]
    assert_same(results[1], results[0])


def shapes(head):
    """The published keys of the head on Swin-L."""
    d = 1536 if head == "dgsct1536" else 512
    table = {}

    def linear(name, inputs, outputs):
        table.update({f"avqatask_{name}.weight": [outputs, inputs], f"avqatask_{name}.bias": [outputs]})

    for name in ("fc_a2", "linear11", "linear12", "linear21", "linear22", "attn_a.out_proj", "attn_v.out_proj"):
        linear(name, d, d)
    for name in ("fc_fusion", "fc_gl", "question_encoder.fc"):
        linear(name, 2 * d, d)
    for name, inputs, outputs in (
        ("fc1", 2 * d, 512),
        ("fc2", 512, 256),
        ("fc3", 256, 128),
        ("fc4", 128, 2),
        ("fc_ans", d, 42),
    ):
        linear(name, inputs, outputs)
    for name in ("attn_a", "attn_v"):
        table |= {f"avqatask_{name}.in_proj_weight": [3 * d, d], f"avqatask_{name}.in_proj_bias": [3 * d]}
    for name in ("norm1", "norm2"):
        table |= {f"avqatask_{name}.weight": [d], f"avqatask_{name}.bias": [d]}
    for kind in ("ih", "hh"):
        table[f"avqatask_question_encoder.lstm.weight_{kind}_l0"] = [4 * d, d]
        table[f"avqatask_question_encoder.lstm.bias_{kind}_l0"] = [4 * d]
    table["avqatask_question_encoder.word2vec.weight"] = [93, d]
    if head != "dgsct1536":
        linear("yb_fc_v", 1536, 512)
        linear("yb_fc_a", 1536, 128 if head == "shipped512_128" else 512)
    if head == "shipped512_128":
        linear("fc_a1", 128, 512)
    return table


@pytest.mark.parametrize(("head", "keys"), [("dgsct1536", 985), ("shipped512_128", 991), ("lavish512", 989)])
def test_published_keys(head, keys):
    with torch.device("meta"):
        model, ave = sf.FastSTGCMA("swin_l", task="avqa", head=head), sf.FastSTGCMA("swin_l")
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert (len(state), len(list(model.buffers()))) == (keys, 59)
    trunk = {key: list(value.shape) for key, value in ave.state_dict().items() if not key.startswith("mlp_head")}
    assert state == trunk | shapes(head)


def test_what_is_trained():
    model = sf.FastSTGCMA(config())
    assert all(p.requires_grad for name, p in model.named_parameters() if name.startswith("avqatask_"))
    (group,) = model.parameter_groups(2.5e-5)
    assert group["lr"] == 2.5e-5
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_starting_values():
    torch.manual_seed(0)
    model = sf.FastSTGCMA(config("lavish512", vocabulary=93))
    assert abs(float(model.avqatask_fc_a2.weight.detach().std()) - 0.02) < 1e-3
    assert abs(float(model.avqatask_attn_a.out_proj.weight.detach().std()) - 0.02) < 1e-3
    assert not model.avqatask_fc_a2.bias.any()
    assert abs(float(model.avqatask_question_encoder.word2vec.weight.detach().std()) - 1) < 0.05


@each_head
def test_adapters_alone(head, tmp_path):
    trained = seed(sf.FastSTGCMA(config(head))).eval()
    sf.save_adapters(trained, tmp_path / "adapters.safetensors")
    model = seed(sf.FastSTGCMA(config(head))).eval()
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(1)
    sf.load_adapters(model, tmp_path / "adapters.safetensors")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())


def test_weights_in_one_storage_are_saved(tmp_path):
    """As PyTorch lays those of an LSTM on a GPU, where safetensors' writer of whole models refuses them."""
    model = seed(sf.FastSTGCMA(config())).eval()
    weights = list(model.avqatask_question_encoder.lstm.parameters())
    storage = torch.cat([p.detach().flatten() for p in weights])
    for p, part in zip(weights, storage.split([p.numel() for p in weights]), strict=True):
        p.data = part.view(p.shape)
    model.save_pretrained(tmp_path / "whole")
    loaded = sf.FastSTGCMA.from_pretrained(tmp_path / "whole")
    sf.save_adapters(model, tmp_path / "adapters.safetensors")
    adapted = sf.FastSTGCMA(config())
    adapted.load_state_dict(model.state_dict() | {k: 0 * v for k, v in model.state_dict().items() if is_trainable(k)})
    sf.load_adapters(adapted, tmp_path / "adapters.safetensors")
    for other in (loaded, adapted):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def grounding(model, prefix="module."):
    """A file's state: the layers that the model has, one of another model's, and what it was trained with."""
    names = ("fc_a2", "fc_gl", "fc1", "fc2", "fc3", "fc4", *(["fc_a1"] if hasattr(model, "avqatask_fc_a1") else []))
    state = {}
    for name in names:
        for part, value in getattr(model, f"avqatask_{name}").named_parameters():
            state[f"{prefix}{name}.{part}"] = torch.randn(value.shape)
    if "fc_a1" not in names:
        state[f"{prefix}fc_a1.weight"] = torch.randn(7, 3)
    return state | {f"{prefix}visual_net.conv1.weight": torch.randn(2, 3)}


@each_head
@pytest.mark.parametrize("prefix", ["", "module."])
def test_grounding_files(head, prefix, tmp_path):
    model = sf.FastSTGCMA(config(head))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = grounding(model, prefix)
    torch.save(state, tmp_path / "grounding.pt")
    report = sf.load_grounding(model, tmp_path / "grounding.pt")
    after = model.state_dict()
    loaded = {key for key in after if not torch.equal(after[key], before[key])}
    assert loaded == set(report.loaded) == {f"avqatask_{key.removeprefix(prefix)}" for key in state} & after.keys()
    assert len(loaded) == (14 if head == "shipped512_128" else 12)
    assert all(torch.equal(after[key], state[prefix + key.removeprefix("avqatask_")]) for key in loaded)
    unused = {f"{prefix}visual_net.conv1.weight"} | ({f"{prefix}fc_a1.weight"} if head != "shipped512_128" else set())
    assert set(report.ignored) == unused
    assert "visual_net" in str(report)


MISFITS = {
    "misshapen": (
        lambda state: state.update({"module.fc1.weight": torch.ones(512, 6)}),
        r"misshapen: avqatask_fc1\.weight \[512, 6\], expected \[512, 64\]$",
    ),
    "missing": (lambda state: state.pop("module.fc_gl.bias"), r"missing: avqatask_fc_gl\.bias$"),
    "not finite": (lambda state: state["module.fc4.bias"].fill_(torch.inf), r"not finite: avqatask_fc4\.bias$"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_grounding_files_that_do_not_fit(misfit, tmp_path):
    model = sf.FastSTGCMA(config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change, message = MISFITS[misfit]
    state = grounding(model)
    change(state)
    torch.save(state, tmp_path / "grounding.pt")
    with pytest.raises(ValueError, match=f"does not fit the model: {message}"):
        sf.load_grounding(model, tmp_path / "grounding.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_grounding_is_avqa_s(tmp_path):
    with pytest.raises(ValueError, match="got one for task 'avs', expected one for 'avqa'"):
        sf.load_grounding(sf.reference.ReferenceSTGCMA(sf.ModelConfig(SWIN, 0.5, task="avs")), tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        sf.load_grounding(sf.FastSTGCMA(config()), tmp_path / "none.pt")


WRONG_INPUTS = {
    "layout": (lambda a, v, n, q: (a, v.transpose(1, 2), n, q), r"video: .*\[B, 2, 3, 16, 16\], got shape \[2, 3, 2, 16, 16\]"),
    "negative": (lambda a, v, n, q: (a, v, n[:, :2], q), r"negative: .*\[B, 3, 3, 16, 16\], got shape \[2, 2, 3, 16, 16\]"),
    "negative_batch": (lambda a, v, n, q: (a, v, n[:1], q), "video has 2 clips, negative has 1 clips, question has 2"),
    "question": (lambda a, v, n, q: (a, v, n), r"question: expected an integer tensor of shape \[B, L\], got None"),
    "question_batch": (lambda a, v, n, q: (a, v, n, q[:1]), "question has 1 clips"),
    "question_floating": (lambda a, v, n, q: (a, v, n, q.float()), "question: .*got dtype torch.float32"),
    "question_empty": (lambda a, v, n, q: (a, v, n, q[:, :0]), r"question: .*got shape \[2, 0\]"),
    "mode": (lambda a, v, n, q: (a, v, n, q, "audioonly"), "mode: got 'audioonly'"),
}


@each_model
@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_input_is_named(cls, wrong):
    break_it, message = WRONG_INPUTS[wrong]
    model = cls(config(num_frames=3 if wrong != "layout" else 2))
    with pytest.raises(ValueError, match=message):
        model(*break_it(*task_inputs(model.config)[0]))


def test_inputs_of_another_dtype_are_named():
    model = sf.FastSTGCMA(config())
    (audio, video, negative, question), _ = task_inputs(model.config)
    with pytest.raises(ValueError, match=r"negative: got torch.float64, expected torch.float32"):
        model(audio, video, negative.double(), question)


def test_loss():
    B, T = 2, 3
    answers, label = torch.randn(B, 5), torch.tensor([4, 0])
    positive, unlike = torch.randn(B * T, 2), torch.randn(B * T, 2)
    wanted = F.cross_entropy(answers, label) - 0.5 * sum(
        logits.log_softmax(-1)[wanted]
        for pair in zip(positive, unlike, strict=True)
        for logits, wanted in zip(pair, (1, 0), strict=True)
    ) / (2 * B * T)
    torch.testing.assert_close(avqa_loss(answers, positive, unlike, label), wanted)
    torch.testing.assert_close(avqa_loss(answers, positive, unlike, label, match_weight=0.0), F.cross_entropy(answers, label))


def test_loss_without_negative_frames():
    with pytest.raises(ValueError, match="match_negative: got None"):
        avqa_loss(torch.randn(2, 5), torch.randn(6, 2), None, torch.tensor([4, 0]))


def test_autocast():
    """Under autocast no worse than twice the reference, gradients three times. PyTorch has no LSTM in float16 on the CPU."""
    arguments, loss_of = task_inputs(config())
    exact = run(seed(sf.reference.ReferenceSTGCMA(config())).eval(), arguments, loss_of)
    errors = []
    for cls in MODELS.values():
        model = seed(cls(config())).eval()
        if cls is sf.FastSTGCMA:
            model.cast_frozen(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            out, gradients = run(model, arguments, loss_of)
        got, wanted = (torch.cat([g[name].flatten() for name in exact[1]]) for g in (gradients, exact[1]))
        errors.append(
            [*(float((o.float() - e).norm()) for o, e in zip(out, exact[0], strict=True)), float((got - wanted).norm())]
        )
    *outputs, gradients = zip(*errors, strict=True)
    assert all(fast <= 2 * low for low, fast in outputs)
    assert gradients[1] <= 3 * gradients[0]


def test_ranges_name_the_negative_way():
    for cls in MODELS.values():
        model = cls(config()).eval()
        with sf.annotate(model), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            model(*task_inputs(model.config)[0])
        ranges = [event for event in profiler.events() if event.is_user_annotation]
        names = {event.name for event in ranges}
        for block in ("stage 1/block 1", "stage 1/block 2", "stage 2/block 1"):
            assert {block, f"{block}/negative", f"{block}/negative/spatial", f"{block}/spatial"} <= names
        assert [event.name for event in ranges].count("head") == 1


@pytest.mark.slow
def test_compiled_equals_eager():
    """In parts, for PyTorch does not trace the LSTM between them."""
    small = sf.SwinConfig(image_size=16, embed_dim=16, depths=(1,), num_heads=(1,), window=2)
    switches = {"adapter_ratio": 0.5, "num_frames": 2, "num_classes": 5, "vocabulary": 11}
    model = seed(sf.FastSTGCMA(sf.ModelConfig(small, task="avqa", **switches))).eval()
    arguments, loss_of = task_inputs(model.config, 1)
    wanted = run(model, arguments, loss_of)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    assert_same(run(model, arguments, loss_of), wanted, rtol=1e-6)
    assert counter.frame_count > 1

"""Published backbone files load whole and unchanged, or not at all."""

import os
import pickle
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from stgcma_fast import ClipConfig, FastSTGCMA, ModelConfig, load_pretrained
from stgcma_fast.reference import ReferenceSTGCMA
from stgcma_fast.reference.model import is_trainable
from tests.support.models import TINY_CLIP, TINY_SWIN, seed, tiny_config

# OpenAI publishes CLIP in this format, so it is written here although torch means to drop it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CLIP = replace(TINY_CLIP, embed_dim=128)  # 2 heads of 64 channels, as CLIP has them


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr("stgcma_fast.pretrained.hf_hub_download", refuse)


def random(*shapes):
    return [torch.randn(shape) for shape in shapes]


def clip_tower(config):
    """The vision tower of a CLIP archive, without the prefix ``visual.``, at random."""
    dim, patch = config.embed_dim, config.patch_size
    shapes = {
        "class_embedding": (dim,),
        "positional_embedding": (config.visual_tokens, dim),
        "conv1.weight": (dim, 3, patch, patch),
        "ln_pre.weight": (dim,),
        "ln_pre.bias": (dim,),
        "ln_post.weight": (dim,),
        "ln_post.bias": (dim,),
    }
    for layer in range(config.layers):
        block = {
            "attn.in_proj_weight": (3 * dim, dim),
            "attn.in_proj_bias": (3 * dim,),
            "attn.out_proj.weight": (dim, dim),
            "attn.out_proj.bias": (dim,),
            "ln_1.weight": (dim,),
            "ln_1.bias": (dim,),
            "mlp.c_fc.weight": (4 * dim, dim),
            "mlp.c_fc.bias": (4 * dim,),
            "mlp.c_proj.weight": (dim, 4 * dim),
            "mlp.c_proj.bias": (dim,),
            "ln_2.weight": (dim,),
            "ln_2.bias": (dim,),
        }
        shapes |= {f"transformer.resblocks.{layer}.{key}": shape for key, shape in block.items()}
    return dict(zip(shapes, random(*shapes.values()), strict=True))


def openai(tower):
    """The state dictionary of a CLIP archive; its text tower has keys like those of the vision tower without prefix."""
    text = {
        "positional_embedding": (5, 8),
        "text_projection": (8, 4),
        "logit_scale": (),
        "token_embedding.weight": (9, 8),
        "transformer.resblocks.0.attn.in_proj_weight": (24, 8),
        "ln_final.weight": (8,),
    }
    own = dict(zip(text, random(*text.values()), strict=True)) | {"input_resolution": torch.tensor(64)}
    return {f"visual.{key}": value for key, value in tower.items()} | {"visual.proj": torch.randn(8, 4)} | own


class Shell(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_torchscript(state, path):
    root = Shell()
    for key, value in state.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Shell())
            module = module._modules[parent]
        module.register_buffer(name, value)
    torch.jit.trace(root, torch.zeros(1)).save(path)


def save_clip(tower, folder, kind):
    """Write a vision tower as ``kind`` of file; its path, and the keys that a reader has no use for."""
    state = openai(tower)
    ignored = {key for key in state if not key.startswith("visual.")} | {"visual.proj"}
    if kind == "torchscript":
        save_torchscript(state, folder / "clip.pt")
        return folder / "clip.pt", ignored
    if kind == "state_dict":
        torch.save(state, folder / "clip.pt")
        return folder / "clip.pt", ignored
    renamed = {}
    for key, value in tower.items():
        if ".in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace("attn.in_proj_", f"self_attn.{name}_proj.")] = part
        else:
            renamed[key] = value
    table = [
        ("transformer.resblocks.", "encoder.layers."),
        (".attn.out_proj", ".self_attn.out_proj"),
        (".ln_1", ".layer_norm1"),
        (".ln_2", ".layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
        ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"),
        ("conv1", "embeddings.patch_embedding"),
        ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
    ]
    for old, new in table:
        renamed = {key.replace(old, new): value for key, value in renamed.items()}
    ignored = {}
    if kind == "transformers":  # a whole CLIP; "transformers_vision" is the tower alone, as new versions write it
        renamed = {f"vision_model.{key}": value for key, value in renamed.items()}
        ignored = {
            "vision_model.embeddings.position_ids": torch.arange(17),
            "visual_projection.weight": torch.ones(4, 8),
            "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(8),
            "logit_scale": torch.tensor(1.0),
        }
    save_file({key: value.contiguous() for key, value in (renamed | ignored).items()}, folder / "model.safetensors")
    return folder / "model.safetensors", set(ignored)


def timm_swin(config=TINY_SWIN):
    """timm's model with every parameter at random."""
    model = SwinTransformer(
        img_size=config.image_size, embed_dim=config.embed_dim, depths=config.depths, num_heads=config.num_heads, num_classes=5
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def microsoft(model):
    """The state of a timm model under the names of Microsoft's files, which hold the buffers too."""
    state = {}
    for key, value in model.state_dict().items():
        for stage in range(1, len(model.layers)):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        state[key.replace("head.fc.", "head.")] = value
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            state[f"layers.{stage}.blocks.{index}.attn.relative_position_index"] = block.attn.relative_position_index
            if block.attn_mask is not None:
                state[f"layers.{stage}.blocks.{index}.attn_mask"] = block.attn_mask
    return state


def save_swin(model, folder, kind):
    if kind == "timm":
        save_file(model.state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"
    torch.save({"model": microsoft(model), "epoch": 3}, folder / "swin.pth")
    return folder / "swin.pth"


def build(backbone, model=FastSTGCMA):
    """A model whose every tensor differs from the values it starts with."""
    switches = {} if backbone is TINY_SWIN else {"backbone": backbone}
    return seed(model(replace(tiny_config("swin" if backbone is TINY_SWIN else "clip"), **switches)))


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(state, expected, keys=None):
    keys = expected.keys() if keys is None else keys
    assert [key for key in keys if not torch.equal(state[key], expected[key])] == []


CLIP_KINDS = ["torchscript", "state_dict", "transformers", "transformers_vision"]


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_clip(kind, tmp_path):
    tower = clip_tower(CLIP)
    path, ignored = save_clip(tower, tmp_path, kind)
    model = build(CLIP)
    before = snapshot(model)
    report = load_pretrained(model, path)

    after = model.state_dict()
    assert_same(after, tower)
    assert torch.equal(after["conv1_audio.weight"], tower["conv1.weight"].sum(1, keepdim=True))
    # 4 x 4 patches, of which audio's 4 mel bands by 3 time steps are the middle.
    middle = [0] + [1 + 4 * row + column for row in range(4) for column in (1, 2, 3)]
    assert torch.equal(after["positional_embedding_audio"], tower["positional_embedding"][middle])
    kept = {key for key in before if is_trainable(key)} - {"ln_post.weight", "ln_post.bias"}
    assert_same(after, before, kept)

    assert set(report.loaded) == before.keys() - kept
    assert report.missing == ()
    assert set(report.ignored) == ignored
    assert report.notes == ()
    assert path.name in str(report)
    assert f"{len(report.loaded)} tensors loaded" in str(report)


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_clip_half(kind, tmp_path):
    """CLIP is published in half precision: its values load exactly, and audio weights are not summed in half precision."""
    tower = {key: value.half() for key, value in clip_tower(CLIP).items()}
    path, _ = save_clip(tower, tmp_path, kind)
    model = build(CLIP)
    load_pretrained(model, path)
    after = model.state_dict()
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert_same(after, {key: value.float() for key, value in tower.items()})
    assert torch.equal(after["conv1_audio.weight"], tower["conv1.weight"].float().sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("patch_size", "rows", "columns", "side"), [(16, range(3, 11), range(4, 10), 14), (14, range(4, 13), range(5, 12), 16)]
)
def test_published_audio_positions(patch_size, rows, columns, side, tmp_path):
    """The rows and columns of CLIP's grid that the published ViT-B/16 and ViT-L/14 models keep, frequency-major."""
    backbone = ClipConfig(patch_size=patch_size, embed_dim=64, layers=1, heads=1)
    tower = clip_tower(backbone)
    path, _ = save_clip(tower, tmp_path, "state_dict")
    model = build(backbone)
    load_pretrained(model, path)
    kept = [0] + [1 + side * row + column for row in rows for column in columns]
    assert torch.equal(model.positional_embedding_audio, tower["positional_embedding"][kept])


def test_stretched_audio_positions(tmp_path):
    """A grid smaller than audio's is interpolated, linearly and with clamped ends, along time and along frequency."""
    backbone = ClipConfig(image_size=48, patch_size=16, embed_dim=64, layers=1, heads=1, audio_frames=80, mel_bins=112)
    tower = clip_tower(backbone)
    path, _ = save_clip(tower, tmp_path, "state_dict")
    model = build(backbone)
    load_pretrained(model, path)

    def stretch(x, axis, size):
        at = (np.arange(size) + 0.5) * x.shape[axis] / size - 0.5
        return np.apply_along_axis(lambda line: np.interp(at, np.arange(len(line)), line), axis, x)

    table = tower["positional_embedding"].double().numpy()
    grid = stretch(stretch(table[1:].reshape(3, 3, 64), 1, 5), 0, 7).reshape(-1, 64)
    expected = torch.from_numpy(np.concatenate([table[:1], grid])).float()
    torch.testing.assert_close(model.positional_embedding_audio.detach(), expected)


def test_other_number_of_heads(tmp_path):
    """The published ViT-B/16 model has 8 heads where CLIP has 12: said aloud, for it changes the frozen attention."""
    path, _ = save_clip(clip_tower(CLIP), tmp_path, "state_dict")
    with pytest.warns(UserWarning, match="trained with 2 heads, the model has 4"):
        report = load_pretrained(build(replace(CLIP, heads=4)), path)
    assert "trained with 2 heads, the model has 4" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(build(CLIP), path)


@pytest.mark.parametrize("kind", ["microsoft", "timm"])
@pytest.mark.parametrize("implementation", [FastSTGCMA, ReferenceSTGCMA])
def test_swin(kind, implementation, tmp_path):
    timm_model = timm_swin()
    path = save_swin(timm_model, tmp_path, kind)
    model = build(TINY_SWIN, implementation)
    before = snapshot(model)
    report = load_pretrained(model, path)

    after, published = model.state_dict(), microsoft(timm_model)
    patches = published.pop("patch_embed.proj.weight")
    assert torch.equal(after["patch_embed.proj.weight"][:, :, 0], patches)
    torch.testing.assert_close(after["patch_embed_audio.proj.weight"][:, 0, 0], patches.mean(1))
    for name in ("proj.bias", "norm.weight", "norm.bias"):
        assert torch.equal(after[f"patch_embed_audio.{name}"], published[f"patch_embed.{name}"])
    head = {key for key in published if key.startswith("head.")}
    assert_same(after, published, published.keys() - head)
    assert_same(after, before, [key for key in before if is_trainable(key)])

    frozen = {key for key in before if not is_trainable(key)}
    missing = {key for key in frozen if key.rpartition(".")[2].startswith("t_relative_coords")}
    if kind == "timm":
        missing |= {key for key in frozen if key.endswith(("attn_mask", "relative_position_index"))}
    assert set(report.missing) == missing
    assert set(report.loaded) == frozen - missing
    assert set(report.ignored) == ({"head.fc.weight", "head.fc.bias"} if kind == "timm" else head)


def test_one_stream(tmp_path):
    model = FastSTGCMA(replace(tiny_config("swin"), modalities=("visual",), adapt=("visual",), fusion="none"))
    timm_model = timm_swin()
    load_pretrained(model, save_swin(timm_model, tmp_path, "timm"))
    assert torch.equal(model.layers[0].downsample.reduction.weight, timm_model.layers[1].downsample.reduction.weight)


@pytest.mark.parametrize("arch", ["clip", "swin"])
def test_adapters_stay_silent(arch, tmp_path):
    """A new model with a loaded backbone is the frozen transformer: its adapters' output is zero whatever the gates."""
    torch.manual_seed(1)
    model = FastSTGCMA(ModelConfig(CLIP, num_frames=3)) if arch == "clip" else FastSTGCMA(tiny_config("swin"))
    load_pretrained(
        model,
        save_clip(clip_tower(CLIP), tmp_path, "state_dict")[0] if arch == "clip" else save_swin(timm_swin(), tmp_path, "timm"),
    )
    outputs = {key: value for key, value in model.state_dict().items() if ".D_fc2." in key}
    assert outputs
    assert all(not value.any() for value in outputs.values())


def test_dtypes_are_kept(tmp_path):
    tower = clip_tower(CLIP)
    path, _ = save_clip(tower, tmp_path, "torchscript")
    model = build(CLIP).cast_frozen(torch.bfloat16)
    load_pretrained(model, path)
    assert torch.equal(model.conv1.weight, tower["conv1.weight"].bfloat16())
    assert torch.equal(model.ln_pre.weight, tower["ln_pre.weight"])


BLOCK = "visual.transformer.resblocks.1"
CLIP_FAULTS = {
    "frozen key missing": (lambda s: s.pop(f"{BLOCK}.mlp.c_fc.bias"), r"missing: transformer\.resblocks\.1\.mlp\.c_fc\.bias$"),
    "ln_post missing": (lambda s: s.pop("visual.ln_post.weight"), r"missing: ln_post\.weight$"),
    "one block more": (
        lambda s: s.update({f"visual.transformer.resblocks.2.ln_1.{k}": torch.ones(128) for k in ("weight", "bias")}),
        r"unexpected: transformer\.resblocks\.2\.ln_1\.bias, transformer\.resblocks\.2\.ln_1\.weight$",
    ),
    "another width": (
        lambda s: s.update({f"{BLOCK}.mlp.c_fc.weight": torch.ones(256, 128)}),
        r"c_fc\.weight \[256, 128\], expected \[512, 128\]$",
    ),
    "another image size": (
        lambda s: s.update({"visual.positional_embedding": torch.ones(26, 128)}),
        "got a position table of 26 tokens, expected 17 for image_size 64 and patch_size 16$",
    ),
    "not finite": (lambda s: s[f"{BLOCK}.ln_2.bias"].fill_(torch.nan), r"not finite: transformer\.resblocks\.1\.ln_2\.bias$"),
}


@pytest.mark.parametrize("fault", CLIP_FAULTS)
def test_clip_that_does_not_fit(fault, tmp_path):
    change, text = CLIP_FAULTS[fault]
    state = openai(clip_tower(CLIP))
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    _assert_refused(build(CLIP), tmp_path / "clip.pt", text)


SWIN_FAULTS = {
    "frozen key missing": (lambda s: s.pop("layers.0.downsample.norm.bias"), r"missing: layers\.0\.downsample\.norm\.bias$"),
    "another shift": (
        lambda s: s["layers.0.blocks.1.attn_mask"].fill_(0),
        r"buffers of another window.*layers\.0\.blocks\.1\.attn_mask$",
    ),
    "another window order": (
        lambda s: s.update({"layers.1.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long)}),
        r"buffers of another window.*layers\.1\.blocks\.0\.attn\.relative_position_index$",
    ),
    "another window": (
        lambda s: s.update({"layers.1.blocks.0.attn.relative_position_bias_table": torch.ones(529, 2)}),
        r"layers\.1\.blocks\.0\.attn\.relative_position_bias_table \[529, 2\], expected \[169, 2\]$",
    ),
    "absolute positions": (lambda s: s.update(absolute_pos_embed=torch.ones(1, 196, 32)), "unexpected: absolute_pos_embed$"),
    "not finite": (
        lambda s: s["patch_embed.norm.weight"].fill_(torch.inf),
        r"not finite: patch_embed\.norm\.weight, patch_embed_audio\.norm\.weight$",
    ),
}


@pytest.mark.parametrize("fault", SWIN_FAULTS)
def test_swin_that_does_not_fit(fault, tmp_path):
    change, text = SWIN_FAULTS[fault]
    state = {key: value.clone() for key, value in microsoft(timm_swin()).items()}
    change(state)
    torch.save({"model": state}, tmp_path / "swin.pth")
    _assert_refused(build(TINY_SWIN), tmp_path / "swin.pth", text)


def test_other_backbone(tmp_path):
    clip, _ = save_clip(clip_tower(CLIP), tmp_path, "torchscript")
    swin = save_swin(timm_swin(), tmp_path, "microsoft")
    _assert_refused(build(TINY_SWIN), clip, "got OpenAI CLIP weights, expected those of a Swin backbone")
    _assert_refused(build(CLIP), swin, "got Swin weights, expected those of a CLIP backbone")


def test_unknown_format(tmp_path):
    save_file({"module.conv.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    _assert_refused(build(CLIP), tmp_path / "other.safetensors", r"keys of no known backbone .*: module\.conv\.weight$")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    _assert_refused(build(CLIP), tmp_path / "other.pth", "expected a dictionary of tensors")


def test_checkpoint_of_the_whole_model(tmp_path):
    """A Swin model with adapters is not its backbone: taking only the frozen part would lose what was trained."""
    torch.save(build(TINY_SWIN).state_dict(), tmp_path / "best.pth")
    _assert_refused(build(TINY_SWIN), tmp_path / "best.pth", "unexpected: .*Adapter")


def _assert_refused(model, path, text):
    """`load_pretrained` names the file and the fault, and has changed nothing."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=text) as raised:
        load_pretrained(model, path)
    assert str(path) in str(raised.value)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("kind", ["torchscript", "state_dict", "transformers"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_truncated(kind, part, tmp_path):
    path, _ = save_clip(clip_tower(CLIP), tmp_path, kind)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    _assert_refused(build(CLIP), path, "is truncated|is damaged")


def test_damaged_torchscript(tmp_path):
    """A flipped bit in the weights does not go unnoticed."""
    tower = clip_tower(CLIP)
    path, _ = save_clip(tower, tmp_path, "torchscript")
    content = bytearray(path.read_bytes())
    content[content.index(tower["conv1.weight"].numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    _assert_refused(build(CLIP), path, "is damaged")


class WithCode(nn.Module):
    """Runs when `torch.jit.load` reads it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        raise ValueError("code of the file ran")


def test_torchscript_code_is_not_run(tmp_path):
    root = Shell()
    root.add_module("other", WithCode())
    root.add_module("layer", nn.Linear(2, 2))
    torch.jit.script(root).save(tmp_path / "code.pt")
    with pytest.raises(Exception, match="code of the file ran"):
        torch.jit.load(tmp_path / "code.pt")
    _assert_refused(build(CLIP), tmp_path / "code.pt", r"keys of no known backbone .*: layer\.bias, layer\.weight$")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["torchscript", "state_dict"])
def test_pickled_code_is_refused(kind, tmp_path):
    made = tmp_path / "made"
    code = pickle.dumps(Call(os.mkdir, str(made)), protocol=2)
    pickle.loads(code)
    made.rmdir()  # the code works, where it is run

    path = tmp_path / "code.pt"
    if kind == "torchscript":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/data.pkl", code)
            archive.writestr("clip/constants.pkl", pickle.dumps(()))
    else:
        torch.save({"visual.class_embedding": Call(os.mkdir, str(made))}, path)
    _assert_refused(build(CLIP), path, r"mkdir")
    assert not made.exists()


def test_no_file(tmp_path):
    """A path, even one that reads like a hub id, never goes to the network."""
    for source in (tmp_path / "none.pt", "owner/name/model.safetensors"):
        with pytest.raises(FileNotFoundError, match=str(source)):
            load_pretrained(build(CLIP), source)


def test_hub(tmp_path, monkeypatch):
    tower = clip_tower(CLIP)
    path, _ = save_clip(tower, tmp_path, "transformers")
    asked = []
    monkeypatch.setattr("stgcma_fast.pretrained.hf_hub_download", lambda *args: asked.append(args) or str(path))
    model = build(CLIP)
    report = load_pretrained(model, "hf://owner/name/folder/model.safetensors")
    assert asked == [("owner/name", "folder/model.safetensors")]
    assert_same(model.state_dict(), tower)
    assert report.source.startswith("hf://owner/name/folder/model.safetensors")
    with pytest.raises(ValueError, match="got 'hf://owner/name', expected a hub id of the form hf://owner/name/file"):
        load_pretrained(model, "hf://owner/name")
    assert len(asked) == 1

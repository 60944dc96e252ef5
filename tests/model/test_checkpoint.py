"""Checkpoints load strictly, name what is wrong with them, and leave the model as it was when they are refused."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stgcma_fast import FastSTGCMA, load_adapters, load_checkpoint, save_adapters
from stgcma_fast.config import ModelConfig
from stgcma_fast.reference.model import is_trainable
from tests.support.models import golden, golden_config, inputs, seed, tiny_config

each_arch = pytest.mark.parametrize("arch", ["clip", "swin"])
each_suffix = pytest.mark.parametrize("suffix", [".pth", ".safetensors"])


def build(arch, weights=True):
    model = FastSTGCMA(tiny_config(arch)).eval()
    return seed(model) if weights else model


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def differing(state, other):
    return [key for key in state if not torch.equal(state[key], other[key])]


def save(state, path):
    (torch.save if path.suffix == ".pth" else save_file)(state, path)


@torch.no_grad()
def logits(model):
    return model(*inputs(model.config)[:2])


@pytest.mark.parametrize("name", ["ave_clip_tiny_fusion", "ave_swin_tiny_fusion"])
@each_suffix
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_checkpoint(name, suffix, prefix, tmp_path):
    """A published state has the model's keys and buffers exactly, with the prefix of DataParallel or without."""
    meta, tensors = golden(name)
    published = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    save({prefix + key: value for key, value in published.items()}, tmp_path / f"best{suffix}")
    model = FastSTGCMA(golden_config(meta))
    load_checkpoint(model, tmp_path / f"best{suffix}")
    state = model.state_dict()
    assert state.keys() == published.keys()
    assert differing(state, published) == []


MISFITS = {
    "missing": (lambda state, key: state.pop(key), r"Missing key.*{key}"),
    "unexpected": (lambda state, key: state.update({f"{key}.more": torch.ones(1)}), r"Unexpected key.*{key}\.more"),
    "misshapen": (lambda state, key: state.update({key: torch.ones(2, 3)}), r"size mismatch for {key}.*\[2, 3\]"),
}


@each_arch
@pytest.mark.parametrize("key", ["mlp_head.2.weight", "frozen"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_keys_that_do_not_fit_are_named(arch, key, misfit, tmp_path):
    model = build(arch)
    if key == "frozen":
        key = "transformer.resblocks.1.attn.in_proj_weight" if arch == "clip" else "layers.1.blocks.0.attn.qkv.weight"
    change, text = MISFITS[misfit]
    state = snapshot(model)
    change(state, key)
    save(state, tmp_path / "best.pth")
    with pytest.raises(RuntimeError, match="(?s)" + text.format(key=key.replace(".", r"\."))):
        load_checkpoint(model, tmp_path / "best.pth")


@each_arch
def test_weights_that_are_not_finite_are_named(arch):
    model = build(arch)
    before, state = snapshot(model), snapshot(model)
    state["mlp_head.0.weight"][0, 0] = torch.nan
    state["mlp_head.2.bias"][1] = torch.inf
    with pytest.raises(ValueError, match=r"not finite: mlp_head\.0\.weight, mlp_head\.2\.bias$"):
        model.load_state_dict({f"module.{key}": value for key, value in state.items()})
    assert differing(before, model.state_dict()) == []


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.blocks.1.attn_mask",
        "layers.1.blocks.0.attn.relative_position_index",
        "layers.0.blocks.0.attn.t_relative_coords",
        "layers.0.blocks.0.attn.t_relative_coords_a",
    ],
)
def test_buffers_of_another_geometry(key):
    """A buffer in a checkpoint says which window, shift and number of frames it was trained with: it has to agree."""
    model = build("swin")
    before, state = snapshot(model), snapshot(model)
    state[key] = state[key] + 1
    with pytest.raises(ValueError, match="buffers of another window.*" + key.replace(".", r"\.") + "$"):
        model.load_state_dict(state)
    state[key] = state[key].flatten()[:-1]
    with pytest.raises(ValueError, match="buffers of another window.*" + key.replace(".", r"\.") + "$"):
        model.load_state_dict(state)
    assert differing(before, model.state_dict()) == []


def test_other_number_of_frames():
    with pytest.raises(ValueError, match=r"buffers of another window, shift or number of frames.*t_relative_coords"):
        build("swin").load_state_dict(FastSTGCMA(replace(tiny_config("swin"), num_frames=5)).state_dict())


@each_suffix
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("load", [load_checkpoint, load_adapters])
def test_truncated(suffix, part, load, tmp_path):
    model = build("clip")
    path = tmp_path / f"best{suffix}"
    save(snapshot(model), path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path} is truncated or is no checkpoint"):
        load(model, path)


def test_truncated_in_the_old_format(tmp_path):
    path = tmp_path / "best.pth"
    torch.save(build("clip").state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    load_checkpoint(build("clip"), path)
    for part in (0.01, 0.5, 0.999):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=f"{path} is truncated or is no checkpoint"):
            load_checkpoint(build("clip"), path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path / 'none.pth'}"):
        load_checkpoint(build("clip"), tmp_path / "none.pth")


def test_no_dictionary_of_tensors(tmp_path):
    torch.save({"epoch": 3, "model": {}}, tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"best\.pth: expected a dictionary of tensors, got dict"):
        load_checkpoint(build("clip"), tmp_path / "best.pth")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("new_format", [True, False])
def test_code_is_not_run(new_format, tmp_path):
    made, path = tmp_path / "made", tmp_path / "best.pth"
    torch.save({"mlp_head.2.bias": Call(os.mkdir, str(made))}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"(?s)best\.pth.*mkdir"):
        load_checkpoint(build("clip"), path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the code works, where it is run


@each_arch
def test_adapters(arch, tmp_path):
    """Saving adapters keeps exactly what the paper trains; loading them restores the model on the same backbone."""
    trained, path = build(arch), tmp_path / "adapters.safetensors"
    save_adapters(trained, path)
    saved = load_file(path)
    assert saved.keys() == {name for name, _ in trained.named_parameters() if is_trainable(name)}
    assert len(saved) == len(trained.trainable_parameters())
    assert sum(value.numel() for value in saved.values()) == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    with safe_open(path, "pt") as file:
        assert ModelConfig.from_dict(json.loads(file.metadata()["config"])) == trained.config

    model = build(arch, weights=False)
    model.load_state_dict({key: value for key, value in trained.state_dict().items() if not is_trainable(key)}, strict=False)
    wanted, before = logits(trained), logits(model)
    assert not torch.equal(before, wanted)
    load_adapters(model, path)
    assert torch.equal(logits(model), wanted)


@each_arch
def test_adapters_keep_the_backbone(arch, tmp_path):
    save_adapters(build(arch), tmp_path / "adapters.safetensors")
    model = build(arch, weights=False)
    before = snapshot(model)
    load_adapters(model, tmp_path / "adapters.safetensors")
    changed = differing(before, model.state_dict())
    assert changed
    assert all(is_trainable(key) for key in changed)


ADAPTER_MISFITS = {
    "missing": (lambda state: state.pop("mlp_head.2.bias"), RuntimeError, r"missing: mlp_head\.2\.bias$"),
    "unexpected": (lambda state: state.update({"norm.weight": torch.ones(1)}), RuntimeError, r"unexpected: norm\.weight$"),
    "misshapen": (
        lambda state: state.update({"mlp_head.2.bias": torch.ones(9)}),
        RuntimeError,
        r"misshapen: mlp_head\.2\.bias \[9\], expected \[7\]$",
    ),
    "not finite": (lambda state: state["mlp_head.2.bias"].fill_(torch.nan), ValueError, r"not finite: mlp_head\.2\.bias$"),
}


@each_arch
@pytest.mark.parametrize("misfit", ADAPTER_MISFITS)
def test_adapters_that_do_not_fit(arch, misfit, tmp_path):
    change, error, text = ADAPTER_MISFITS[misfit]
    path = tmp_path / "adapters.safetensors"
    save_adapters(build(arch), path)
    state = load_file(path)
    change(state)
    save_file(state, path)
    model = build(arch, weights=False)
    before = snapshot(model)
    with pytest.raises(error, match=text):
        load_adapters(model, path)
    assert differing(before, model.state_dict()) == []


@each_arch
def test_pretrained_folder(arch, tmp_path):
    model = build(arch)
    model.save_pretrained(tmp_path)
    loaded = FastSTGCMA.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_pretrained_folder_is_loaded_strictly(tmp_path):
    build("clip").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    removed = state.pop("transformer.resblocks.1.attn.in_proj_bias")
    save_file(state, file)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*transformer\.resblocks\.1\.attn\.in_proj_bias"):
        FastSTGCMA.from_pretrained(tmp_path)
    save_file(state | {"transformer.resblocks.1.attn.in_proj_bias": removed}, file)
    FastSTGCMA.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or is no checkpoint"):
        FastSTGCMA.from_pretrained(tmp_path)


def test_values_that_are_no_tensors_are_named():
    model = FastSTGCMA(tiny_config("swin"))
    with pytest.raises(ValueError, match="got other values: model, epoch"):
        model.load_state_dict({"model": model.state_dict(), "epoch": 3})


def test_a_key_with_and_without_prefix_is_refused():
    model = FastSTGCMA(tiny_config("swin"))
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"both with and without 'module\.'"):
        model.load_state_dict(state | {"module.norm.weight": state["norm.weight"]})


def test_a_model_on_the_meta_device_can_be_filled():
    state = FastSTGCMA(tiny_config("swin")).state_dict()
    with torch.device("meta"):
        model = FastSTGCMA(tiny_config("swin"))
    model.load_state_dict(state, assign=True)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())

"""Ranges for profilers: their names, what becomes of them, and that they change nothing."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import stgcma_fast as sf
from stgcma_fast import blocks, ops
from stgcma_fast.backbones import clip, swin
from stgcma_fast.reference import model as reference

SWIN = sf.ModelConfig(
    backbone=sf.SwinConfig(image_size=56, embed_dim=16, depths=(2, 1), num_heads=(2, 2), window=7),
    adapter_ratio=0.25,
    num_frames=2,
)
CLIP = sf.ModelConfig(
    backbone=sf.ClipConfig(image_size=32, patch_size=16, embed_dim=32, layers=2, heads=2), adapter_ratio=0.25, num_frames=2
)
MODELS = {
    "reference": sf.reference.ReferenceSTGCMA,
    "fast": sf.FastSTGCMA,
    "fast reference": lambda config: sf.FastSTGCMA(config, impl="reference"),
    "checkpointing": lambda config: sf.FastSTGCMA(config, checkpointing=True),
}


def inputs(config: sf.ModelConfig) -> tuple[Tensor, Tensor]:
    size, frames = config.backbone.image_size, config.num_frames
    return torch.randn(1, frames, *config.backbone.audio_shape), torch.randn(1, 3, frames, size, size)


def recorded(model: torch.nn.Module, config: sf.ModelConfig, backward: bool = False) -> list:
    """Ranges of a forward, or of a forward and backward, in the order they open."""
    audio, video = inputs(config)
    with sf.annotate(model), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        logits = model(audio, video)
        if backward:
            logits.backward(torch.randn_like(logits))
    return [event for event in profiler.events() if event.is_user_annotation]


def expected(config: sf.ModelConfig) -> list[str]:
    """Every name, each once."""
    depths = getattr(config.backbone, "depths", (2,))
    names = ["embed"]
    for s, depth in enumerate(depths, 1):
        names.append(f"stage {s}")
        for b in range(1, depth + 1):
            block = f"stage {s}/block {b}"
            temporal = config is CLIP or b % 2 == 1
            names += [block, *(f"{block}/temporal{tail}" for tail in ("", "/attention", "/adapter") if temporal)]
            names += [f"{block}/spatial{tail}" for tail in ("", "/attention", "/adapter", "/adapter/cross-modal")]
            names += [f"{block}/global{tail}" for tail in ("", "/adapter", "/adapter/cross-modal")]
        names += [f"stage {s}/merge"] if s < len(depths) else []
    return [*names, "head"]


def replaced() -> list:
    """What stands in the package where functions are replaced."""
    owners = [blocks, ops, swin, clip, reference, reference.Block, reference.SwinBlock, reference.ClipBlock]
    owners += [reference.PatchMerging, reference.ReferenceSTGCMA]
    owners += [importlib.import_module(f"stgcma_fast.{room}.av_adapter") for room in ("reference", "ops")]
    return [{name: f for name, f in vars(owner).items() if inspect.isfunction(f)} for owner in owners]


@pytest.mark.parametrize("config", [SWIN, CLIP], ids=["swin", "clip"])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_has_its_range(name, config):
    ranges = recorded(MODELS[name](config), config)
    assert sorted({event.name for event in ranges}) == sorted(expected(config))
    for event in ranges:
        parent = event.cpu_parent
        while parent is not None and not parent.is_user_annotation:
            parent = parent.cpu_parent
        assert (parent.name if parent else "") == "/".join(event.name.split("/")[:-1])


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left(name):
    before = replaced()
    model = MODELS[name](SWIN)
    with sf.annotate(model):
        assert replaced() != before
    assert replaced() == before
    with pytest.raises(ValueError, match="video"), sf.annotate(model):
        model(inputs(SWIN)[0], None)
    assert replaced() == before


def test_an_exception_in_a_block_closes_all(monkeypatch):
    model = sf.FastSTGCMA(SWIN)
    audio, video = inputs(SWIN)
    with sf.annotate(model), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        with monkeypatch.context() as patched:
            patched.setattr(blocks, "temporal_attentions", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(audio, video)
        model(audio, video)
    assert [event.name for event in profiler.events() if event.is_user_annotation and event.cpu_parent is None] == [
        *("embed", "stage 1"),
        *("embed", "stage 1", "stage 2", "head"),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_numbers_stay_the_same(name):
    model, (audio, video) = MODELS[name](SWIN).eval(), inputs(SWIN)
    upstream = torch.randn(2, SWIN.num_classes)

    def step() -> list[Tensor]:
        model.zero_grad()
        logits = model(audio, video)
        logits.backward(upstream)
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = step()
    with sf.annotate(model):
        named = step()
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True))


def test_a_checkpointed_block_is_named_in_the_backward():
    ranges = recorded(MODELS["checkpointing"](SWIN), SWIN, backward=True)
    names = [event.name for event in ranges]
    again = names[names.index("head") + 1 :]
    assert set(again) == {name for name in expected(SWIN) if "block" in name}


def test_pieces_are_named_in_the_backward(monkeypatch):
    """What runs piece by piece on the CPU computes each piece again."""
    monkeypatch.setattr("stgcma_fast.ops.stream.PIECE_BYTES", 2**12)
    names = [event.name for event in recorded(sf.FastSTGCMA(SWIN), SWIN, backward=True)]
    again = names[names.index("head") + 1 :]
    assert {"stage 1/block 1/temporal/adapter", "stage 1/block 2/spatial/attention", "stage 2/block 1/global"} <= set(again)


def test_other_models_have_no_ranges():
    model, other = sf.FastSTGCMA(SWIN), sf.FastSTGCMA(SWIN)
    with sf.annotate(model), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        other(*inputs(SWIN))
    assert not [event.name for event in profiler.events() if event.is_user_annotation]


def test_nvtx_where_cuda_is_in_use(monkeypatch):
    opened, depth = [], 0

    def push(name):
        nonlocal depth
        opened.append(name)
        depth += 1

    def pop():
        nonlocal depth
        depth -= 1

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", pop)
    names = [event.name for event in recorded(sf.FastSTGCMA(SWIN), SWIN)]
    assert opened == names
    assert depth == 0


def test_compiled_models_are_refused():
    model = sf.FastSTGCMA(SWIN)
    with pytest.raises(ValueError, match="got OptimizedModule, expected a FastSTGCMA"), sf.annotate(torch.compile(model)):
        pass
    model.compile()
    with pytest.raises(ValueError, match="got a compiled FastSTGCMA"), sf.annotate(model):
        pass

"""Configurations: presets, checks, and the way to JSON and back."""

import json

import pytest

from stgcma_fast import ClipConfig, ModelConfig, SwinConfig, preset
from stgcma_fast.config import ADAPTER_RATIOS, BACKBONES
from tests.support.models import TINY_CLIP, TINY_SWIN


def test_presets_have_the_paper_s_sizes():
    assert {arch: [preset(arch).backbone.audio_shape] for arch in BACKBONES} == {
        "clip_b16": [(102, 128)],
        "clip_l14": [(102, 128)],
        "swin_b": [(224, 224)],
        "swin_l": [(224, 224)],
    }
    assert [preset("swin_l").adapter_width(stage) for stage in range(4)] == [96, 96, 96, 96]
    assert [preset("swin_l", "tiny").adapter_width(stage) for stage in range(4)] == [24, 48, 48, 96]
    assert [preset("swin_b").adapter_width(stage) for stage in range(4)] == [32, 64, 64, 128]
    assert [preset("swin_b", "tiny").adapter_width(stage) for stage in range(4)] == [16, 32, 32, 64]
    assert (preset("clip_b16").adapter_width(), preset("clip_l14").adapter_width()) == (96, 64)
    assert (preset("clip_b16").backbone.visual_tokens, preset("clip_b16").backbone.audio_tokens) == (197, 49)
    assert (preset("clip_l14").backbone.visual_tokens, preset("clip_l14").backbone.audio_tokens) == (257, 64)
    assert preset("clip_b16").backbone.heads == 8


def test_shift_only_in_odd_blocks_of_grids_larger_than_a_window():
    swin = preset("swin_l").backbone
    assert [(swin.shift(stage, 0), swin.shift(stage, 1)) for stage in range(4)] == [(0, 3), (0, 3), (0, 3), (0, 0)]


@pytest.mark.parametrize(("arch", "adapters"), ADAPTER_RATIOS)
def test_json_round_trip(arch, adapters):
    config = preset(arch, adapters, num_classes=5, adapt=("visual",), fusion="none", use_global=False)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("task", "frames", "classes", "head"), [("ave", 10, 29, None), ("avs", 5, 1, None), ("avqa", 10, 42, "dgsct1536")]
)
def test_tasks_have_their_published_sizes(task, frames, classes, head):
    config = preset("swin_l", task=task)
    assert (config.num_frames, config.num_classes, config.head, config.vocabulary) == (frames, classes, head, 93)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert preset("swin_l", task=task, num_frames=3).num_frames == 3


def test_configs_are_frozen_and_hashable():
    config = preset("swin_b")
    assert hash(config) == hash(preset("swin_b"))
    with pytest.raises(AttributeError):
        config.num_frames = 5


def test_one_stream_has_no_fusion():
    assert preset("clip_b16", modalities=("audio",)).fusion == "none"
    assert preset("clip_b16", modalities=("audio",)).adapt == ("audio",)


WRONG = {
    "arch": (lambda: preset("vit"), "arch: got 'vit', allowed are 'clip_b16'"),
    "adapters": (lambda: preset("swin_l", "huge"), "adapters: got 'huge', allowed are 'tiny', 'base'"),
    "backbone": (lambda: ModelConfig("swin_l"), "backbone: got 'swin_l'"),
    "task": (lambda: ModelConfig(TINY_SWIN, task="vqa"), "task: got 'vqa', allowed are 'ave', 'avs', 'avqa'"),
    "task_clip": (
        lambda: ModelConfig(TINY_CLIP, task="avs"),
        "got 'avs' with a CLIP backbone, which is defined for 'ave' alone",
    ),
    "task_clip_preset": (lambda: preset("clip_b16", task="avqa"), "got 'avqa' with a CLIP backbone"),
    "task_streams": (
        lambda: ModelConfig(TINY_SWIN, task="avqa", modalities=("visual",)),
        r"modalities: got \('visual',\) with task 'avqa', which needs both streams",
    ),
    "task_classes": (lambda: ModelConfig(TINY_SWIN, task="avs", num_classes=29), "num_classes: got 29 with task 'avs'"),
    "task_stages": (
        lambda: ModelConfig(SwinConfig(image_size=448, depths=(1,) * 5, num_heads=(6,) * 5), task="avs"),
        "got 'avs' with a Swin of 5 stages, expected at most 4",
    ),
    "head": (lambda: ModelConfig(TINY_SWIN, task="avqa", head="base"), "head: got 'base', allowed are 'lavish512'"),
    "head_task": (lambda: ModelConfig(TINY_SWIN, head="lavish512"), "head: got 'lavish512' with task 'ave', allowed is None"),
    "head_width": (
        lambda: ModelConfig(SwinConfig(image_size=28, embed_dim=6, depths=(1,), num_heads=(1,)), 0.5, task="avqa"),
        "4 attention heads need channels of the last stage divisible by 4",
    ),
    "vocabulary": (lambda: ModelConfig(TINY_SWIN, task="avqa", vocabulary=0), "vocabulary: got 0, expected a positive integer"),
    "fusion": (lambda: ModelConfig(TINY_SWIN, fusion="av"), "fusion: got 'av', allowed are 'both'"),
    "fusion_needs_two_adapters": (
        lambda: ModelConfig(TINY_SWIN, adapt=("visual",), fusion="a2v"),
        r"fusion: got 'a2v' with adapters on \('visual',\) alone, allowed is 'none'",
    ),
    "fusion_needs_two_streams": (lambda: ModelConfig(TINY_SWIN, modalities=("audio",), fusion="v2a"), "allowed is 'none'"),
    "modalities": (lambda: ModelConfig(TINY_SWIN, modalities=("text",)), r"modalities: got \('text',\)"),
    "modalities_string": (lambda: ModelConfig(TINY_SWIN, modalities="audio"), "modalities: got 'audio'"),
    "modalities_twice": (lambda: ModelConfig(TINY_SWIN, modalities=("audio", "audio")), "expected a non-empty subset"),
    "modalities_empty": (lambda: ModelConfig(TINY_SWIN, modalities=()), "expected a non-empty subset"),
    "adapt_outside": (
        lambda: ModelConfig(TINY_SWIN, modalities=("audio",), adapt=("visual",)),
        r"adapt: got \('visual',\), expected a subset of modalities \('audio',\)",
    ),
    "temporal": (lambda: ModelConfig(TINY_SWIN, temporal_without_adapter=True), "allowed only with use_temporal=False"),
    "drop_path": (lambda: ModelConfig(TINY_SWIN, drop_path=1.0), "drop_path: got 1.0"),
    "frames": (lambda: ModelConfig(TINY_SWIN, num_frames=0), "num_frames: got 0, expected a positive integer"),
    "ratio_count": (lambda: ModelConfig(TINY_SWIN, adapter_ratio=(0.5,)), "adapter_ratio: got 1 numbers"),
    "ratio_count_clip": (lambda: ModelConfig(TINY_CLIP, adapter_ratio=(0.5, 0.5)), "adapter_ratio: got 2 numbers"),
    "ratio_small": (lambda: ModelConfig(TINY_SWIN, adapter_ratio=0.001), "leaves stage 0 no adapter channel"),
    "swin_heads": (lambda: SwinConfig(num_heads=(5, 12, 24, 48)), "192 channels, not divisible by 5 heads"),
    "swin_depths": (lambda: SwinConfig(depths=(2, 2)), "got 2 depths and 4 num_heads"),
    "swin_grid": (lambda: SwinConfig(image_size=256), "stage 0 a grid of 64 tokens a side, expected a multiple of window 7"),
    "swin_patch": (lambda: SwinConfig(image_size=225), "not a multiple of patch_size 4"),
    "clip_heads": (lambda: ClipConfig(heads=7), "embed_dim 768 is not divisible by 7 heads"),
    "clip_patch": (lambda: ClipConfig(image_size=230), "not a multiple of patch_size 16"),
    "clip_audio": (lambda: ClipConfig(audio_frames=10), "smaller than one patch of 16"),
    "ratio_kind": (lambda: ModelConfig(TINY_SWIN, adapter_ratio="0.25"), "adapter_ratio: got '0.25'"),
    "ratio_nan": (lambda: ModelConfig(TINY_SWIN, adapter_ratio=float("nan")), "adapter_ratio: got nan"),
    "drop_path_kind": (lambda: ModelConfig(TINY_SWIN, drop_path="a"), "drop_path: got 'a'"),
    "depths_kind": (lambda: SwinConfig(depths=2), "SwinConfig.depths: got 2, expected one number a stage"),
    "modalities_kind": (lambda: ModelConfig(TINY_SWIN, modalities=3), "modalities: got 3"),
    "switches": (lambda: preset("swin_l", fuse="both"), r"switches: got \['fuse'\]"),
    "switches_backbone": (lambda: preset("swin_l", backbone=TINY_CLIP), r"switches: got \['backbone'\]"),
    "backbone_dictionary": (lambda: ModelConfig.from_dict({"backbone": None}), "backbone: got None, expected a dictionary"),
    "unknown_field": (lambda: ModelConfig.from_dict({"backbone": {"kind": "clip"}, "ratio": 1}), r"unknown fields \['ratio'\]"),
    "unknown_kind": (lambda: ModelConfig.from_dict({"backbone": {"kind": "vit"}}), "backbone kind: got 'vit'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_configurations_say_got_and_allowed(wrong):
    make, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        make()

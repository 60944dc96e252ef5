"""What a model is: frozen dataclasses, checked when they are made, and the named presets of the paper's tables."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Task = Literal["ave", "avs", "avqa"]
Head = Literal["lavish512", "shipped512_128", "dgsct1536"]
Fusion = Literal["both", "a2v", "v2a", "none"]
Modality = Literal["visual", "audio"]
# Frames and classes of each task as published; AVS tells one class, what sounds, from the rest.
_FRAMES: dict[Task, int] = {"ave": 10, "avs": 5, "avqa": 10}
_CLASSES: dict[Task, int] = {"ave": 29, "avs": 1, "avqa": 42}


def _allowed(name: str, got: object, allowed: tuple) -> None:
    if got not in allowed:
        raise ValueError(f"{name}: got {got!r}, allowed are {', '.join(map(repr, allowed))}")


def _positive(name: str, got: object) -> None:
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        raise ValueError(f"{name}: got {got!r}, expected a positive integer")


def _subset(name: str, got: object) -> tuple[Modality, ...]:
    allowed = get_args(Modality)
    if not isinstance(got, tuple | list) or not got or any(m not in allowed for m in got) or len(set(got)) != len(got):
        raise ValueError(f"{name}: got {got!r}, expected a non-empty subset of {allowed}")
    return tuple(m for m in allowed if m in got)


@dataclass(frozen=True)
class SwinConfig:
    """A Swin transformer. Sizes in pixels, tokens or channels; head dimension is ``embed_dim * 2**s / num_heads[s]``."""

    image_size: int = 224
    patch_size: int = 4
    embed_dim: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 7

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ValueError(f"SwinConfig.{name}: got {getattr(self, name)!r}, expected one number a stage")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "patch_size", "embed_dim", "window"):
            _positive(f"SwinConfig.{name}", getattr(self, name))
        for name in ("depths", "num_heads"):
            for value in getattr(self, name):
                _positive(f"SwinConfig.{name}", value)
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"SwinConfig: got {len(self.depths)} depths and {len(self.num_heads)} num_heads, expected one each per stage"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.width(stage) % heads:
                raise ValueError(f"SwinConfig: stage {stage} has {self.width(stage)} channels, not divisible by {heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"SwinConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for stage in range(self.stages):
            if (self.image_size // self.patch_size) % 2**stage or self.resolution(stage) % self.window:
                raise ValueError(
                    f"SwinConfig: image_size {self.image_size} gives stage {stage} a grid of "
                    f"{self.image_size / self.patch_size / 2**stage:g} tokens a side, "
                    f"expected a multiple of window {self.window}"
                )

    @property
    def stages(self) -> int:
        return len(self.depths)

    def width(self, stage: int) -> int:
        """Channels of a stage."""
        return self.embed_dim * 2**stage

    def resolution(self, stage: int) -> int:
        """Tokens a side of a stage."""
        return self.image_size // self.patch_size // 2**stage

    def shift(self, stage: int, block: int) -> int:
        """Cyclic shift of a block's windows: half a window in odd blocks, none where one window covers the frame."""
        return self.window // 2 if block % 2 and self.resolution(stage) > self.window else 0

    @property
    def audio_shape(self) -> tuple[int, int]:
        """Time frames and mel bins of one audio chunk."""
        return self.image_size, self.image_size


@dataclass(frozen=True)
class ClipConfig:
    """The vision tower of CLIP. ``heads`` is 8 in the published ViT-B/16 model although CLIP itself was trained with 12."""

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    layers: int = 12
    heads: int = 8
    audio_frames: int = 102
    mel_bins: int = 128

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive(f"ClipConfig.{field.name}", getattr(self, field.name))
        if self.embed_dim % self.heads:
            raise ValueError(f"ClipConfig: embed_dim {self.embed_dim} is not divisible by {self.heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"ClipConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if min(self.audio_shape) < self.patch_size:
            raise ValueError(f"ClipConfig: audio of {self.audio_shape} is smaller than one patch of {self.patch_size}")

    @property
    def visual_tokens(self) -> int:
        """Tokens of a frame, class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def audio_grid(self) -> tuple[int, int]:
        """Patches of an audio chunk along time and along mel."""
        return self.audio_frames // self.patch_size, self.mel_bins // self.patch_size

    @property
    def audio_tokens(self) -> int:
        """Tokens of an audio chunk, class token included."""
        return math.prod(self.audio_grid) + 1

    @property
    def audio_shape(self) -> tuple[int, int]:
        """Time frames and mel bins of one audio chunk."""
        return self.audio_frames, self.mel_bins


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and its maths.

    Args:
        backbone: `SwinConfig` or `ClipConfig`.
        adapter_ratio: bottleneck width over channels; one number, or one per Swin stage. The width is ``floor(C * ratio)``.
        num_frames: video frames, and audio chunks, of a clip (T); None: 5 for AVS, else 10.
        task: "ave" (event localization), or, with a Swin, "avs" (segmentation of what sounds) or "avqa" (question answering).
        num_classes: event classes of AVE, answers of AVQA; None: 29 and 42. AVS has one class.
        fusion: which way the two streams exchange in the AV-adapters (Table 5): "both"; "a2v", only vision listens;
            "v2a", only audio listens; "none". A model of one stream has "none".
        modalities: streams the model has. One stream gives the published unimodal models.
        adapt: streams that carry adapters. The other stream is the frozen transformer, frame by frame.
        use_temporal, use_spatial, use_global: which adapters a block has (Table 7).
        temporal_without_adapter: with ``use_temporal=False``, keep the frozen temporal attention and its residual. This is
            the ablation as published; without it the temporal step is absent.
        drop_path: largest rate of stochastic depth on the temporal residual, rising linearly from 0 over the blocks. AVQA's
            negative frames, which pass the frozen transformer alone, have it on both of that one's residuals.
        head: of AVQA, None for other tasks: "dgsct1536" works on the backbone's channels (STG-CMA-L, the default); "lavish512"
            on 512, which gives the paper's count of STG-CMA-B; "shipped512_128" is that model as its code was published, with
            audio squeezed to 128 first.
        vocabulary: words that AVQA's questions are made of.

    Raises:
        ValueError: a value or a combination that no model has; the text says what was got and what is allowed.
    """

    backbone: SwinConfig | ClipConfig
    adapter_ratio: float | tuple[float, ...] = 0.25
    num_frames: int | None = None
    task: Task = "ave"
    num_classes: int | None = None
    fusion: Fusion = "both"
    modalities: tuple[Modality, ...] = ("visual", "audio")
    adapt: tuple[Modality, ...] | None = None
    use_temporal: bool = True
    use_spatial: bool = True
    use_global: bool = True
    temporal_without_adapter: bool = False
    drop_path: float = 0.2
    head: Head | None = None
    vocabulary: int = 93

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, SwinConfig | ClipConfig):
            raise ValueError(f"backbone: got {self.backbone!r}, expected a SwinConfig or a ClipConfig")
        _allowed("task", self.task, get_args(Task))
        for name, published in (("num_frames", _FRAMES), ("num_classes", _CLASSES)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, published[self.task])
            _positive(name, getattr(self, name))
        _positive("vocabulary", self.vocabulary)
        _allowed("fusion", self.fusion, get_args(Fusion))
        object.__setattr__(self, "modalities", _subset("modalities", self.modalities))
        object.__setattr__(self, "adapt", self.modalities if self.adapt is None else _subset("adapt", self.adapt))
        if not set(self.adapt) <= set(self.modalities):
            raise ValueError(f"adapt: got {self.adapt}, expected a subset of modalities {self.modalities}")
        self._check_task()
        if len(self.modalities) == 1 and self.fusion == "both":
            object.__setattr__(self, "fusion", "none")
        if len(self.adapt) == 1 and self.fusion != "none":
            raise ValueError(
                f"fusion: got {self.fusion!r} with adapters on {self.adapt} alone, allowed is 'none': "
                "the exchange needs the hidden tokens of both streams' adapters"
            )
        if not isinstance(self.drop_path, int | float) or not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: got {self.drop_path!r}, expected a rate in [0, 1)")
        if self.temporal_without_adapter and self.use_temporal:
            raise ValueError("temporal_without_adapter: got True with use_temporal=True, allowed only with use_temporal=False")
        if isinstance(self.adapter_ratio, list | tuple):
            object.__setattr__(self, "adapter_ratio", tuple(self.adapter_ratio))
            stages = self.backbone.stages if isinstance(self.backbone, SwinConfig) else 1
            if len(self.adapter_ratio) != stages:
                raise ValueError(
                    f"adapter_ratio: got {len(self.adapter_ratio)} numbers, expected one, or one for each of {stages}"
                )
        ratios = self.adapter_ratio if isinstance(self.adapter_ratio, tuple) else (self.adapter_ratio,)
        if not all(isinstance(ratio, int | float) and 0 < ratio < math.inf for ratio in ratios):
            raise ValueError(f"adapter_ratio: got {self.adapter_ratio!r}, expected positive numbers")
        for stage in range(getattr(self.backbone, "stages", 1)):
            if self.adapter_width(stage) < 1:
                raise ValueError(f"adapter_ratio: got {self.adapter_ratio!r}, which leaves stage {stage} no adapter channel")

    def _check_task(self) -> None:
        if self.task == "avqa":
            object.__setattr__(self, "head", "dgsct1536" if self.head is None else self.head)
            _allowed("head", self.head, get_args(Head))
        elif self.head is not None:
            raise ValueError(f"head: got {self.head!r} with task {self.task!r}, allowed is None: AVQA's heads alone have names")
        if self.task == "ave":
            return
        if not isinstance(self.backbone, SwinConfig):
            raise ValueError(f"task: got {self.task!r} with a CLIP backbone, which is defined for 'ave' alone")
        if len(self.modalities) == 1:
            raise ValueError(f"modalities: got {self.modalities} with task {self.task!r}, which needs both streams")
        if self.task == "avs" and self.num_classes != 1:
            raise ValueError(f"num_classes: got {self.num_classes} with task 'avs', which has one class: what sounds")
        if self.task == "avs" and self.backbone.stages > 4:
            raise ValueError(f"task: got 'avs' with a Swin of {self.backbone.stages} stages, expected at most 4")
        if self.head == "dgsct1536" and self.backbone.width(self.backbone.stages - 1) % 4:
            raise ValueError("head: got 'dgsct1536', whose 4 attention heads need channels of the last stage divisible by 4")

    def adapter_width(self, stage: int = 0) -> int:
        """Bottleneck width r of the adapters of a Swin stage (CLIP: stage 0)."""
        ratio = self.adapter_ratio[stage] if isinstance(self.adapter_ratio, tuple) else self.adapter_ratio
        width = self.backbone.width(stage) if isinstance(self.backbone, SwinConfig) else self.backbone.embed_dim
        return math.floor(width * ratio)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary for JSON; `from_dict` reads it back."""
        kind = "swin" if isinstance(self.backbone, SwinConfig) else "clip"
        values = dataclasses.asdict(self)
        return values | {"backbone": {"kind": kind, **values["backbone"]}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing fields, which are named.
        """
        values = dict(values)
        backbone = values.pop("backbone", None)
        if not isinstance(backbone, dict):
            raise ValueError(f"backbone: got {backbone!r}, expected a dictionary")
        backbone = dict(backbone)
        kind = backbone.pop("kind", None)
        kinds = {"swin": SwinConfig, "clip": ClipConfig}
        _allowed("backbone kind", kind, tuple(kinds))
        for owner, given in ((kinds[kind], backbone), (cls, values)):
            unknown = set(given) - {field.name for field in dataclasses.fields(owner)}
            if unknown:
                raise ValueError(f"{owner.__name__}: unknown fields {sorted(unknown)}")
        return cls(backbone=kinds[kind](**backbone), **values)


# The published ViT-B/16 model splits CLIP's 768 channels into 8 heads, not CLIP's 12.
BACKBONES: dict[str, SwinConfig | ClipConfig] = {
    "clip_b16": ClipConfig(patch_size=16, embed_dim=768, layers=12, heads=8),
    "clip_l14": ClipConfig(patch_size=14, embed_dim=1024, layers=24, heads=16),
    "swin_b": SwinConfig(embed_dim=128, num_heads=(4, 8, 16, 32)),
    "swin_l": SwinConfig(embed_dim=192, num_heads=(6, 12, 24, 48)),
}
# Ratios that reproduce the parameter counts of Tables 2 to 7. The paper's Table 1 prints others for clip_b16 base (1/16)
# and swin_b base (1/2, 1/4, 1/8, 1/16), which do not.
ADAPTER_RATIOS: dict[tuple[str, str], float | tuple[float, ...]] = {
    ("clip_b16", "tiny"): 1 / 32,
    ("clip_b16", "base"): 1 / 8,
    ("clip_l14", "tiny"): 1 / 32,
    ("clip_l14", "base"): 1 / 16,
    ("swin_b", "tiny"): (1 / 8, 1 / 8, 1 / 16, 1 / 16),
    ("swin_b", "base"): (1 / 4, 1 / 4, 1 / 8, 1 / 8),
    ("swin_l", "tiny"): (1 / 8, 1 / 8, 1 / 16, 1 / 16),
    ("swin_l", "base"): (1 / 2, 1 / 4, 1 / 8, 1 / 16),
}
ADAPTER_SIZES = ("tiny", "base")


def preset(arch: str, adapters: str = "base", **switches: Any) -> ModelConfig:
    """The configuration of a row of the paper's tables.

    Args:
        arch: "clip_b16", "clip_l14", "swin_b" or "swin_l".
        adapters: "tiny" or "base".
        switches: any other field of `ModelConfig`.

    Raises:
        ValueError: an unknown name, or a combination `ModelConfig` refuses.
    """
    _allowed("arch", arch, tuple(BACKBONES))
    _allowed("adapters", adapters, ADAPTER_SIZES)
    unknown = set(switches) - {field.name for field in dataclasses.fields(ModelConfig)} | set(switches) & {"backbone"}
    if unknown:
        raise ValueError(f"switches: got {sorted(unknown)}, expected fields of ModelConfig other than backbone")
    return ModelConfig(backbone=BACKBONES[arch], **{"adapter_ratio": ADAPTER_RATIOS[arch, adapters]} | switches)

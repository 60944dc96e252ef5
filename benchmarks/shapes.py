"""The operators at the shapes the models give them, one clip, every stage of the four architectures; and at odd shapes.

T frames of a clip, S tokens of a frame, D channels, h heads, r adapter width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stgcma_fast import ops
from stgcma_fast.config import BACKBONES, SwinConfig, preset
from stgcma_fast.ops.layer_norm import branched_layer_norm
from stgcma_fast.reference.windows import shift_mask

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# From sizes to a tensor: `grad` for what is trained or carries gradients on, `std` for weights.
Make = Callable[..., Tensor]


class Case(NamedTuple):
    """A call of an operator in the model."""

    op: str
    label: str
    function: Callable[..., Any]
    arguments: Callable[[Make], Arguments]

    def build(self, dtype: torch.dtype, device: str) -> Arguments:
        """Arguments whose memory nobody has written: shapes, strides and `requires_grad` are the model's."""

        def make(*sizes: int, grad: bool = True, std: float = 1.0) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device, requires_grad=grad)

        return self.arguments(make)

    def fill(self, dtype: torch.dtype, device: str) -> Arguments:
        """The same with normal values."""

        def make(*sizes: int, grad: bool = True, std: float = 1.0) -> Tensor:
            return (std * torch.randn(sizes, device=device)).to(dtype).requires_grad_(grad)

        return self.arguments(make)


def tensors(arguments: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, list | tuple | dict):
        for part in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from tensors(part)


class Stage(NamedTuple):
    """The sizes of a stage of an architecture with base adapters; ``side`` and ``window`` are Swin's."""

    label: str
    frames: int
    visual: int
    audio: int
    dim: int
    heads: int
    rank: int
    side: int = 0
    window: int = 0
    clips: int = 1

    @property
    def images(self) -> int:
        """Frames of all clips."""
        return self.clips * self.frames

    @property
    def streams(self) -> list[tuple[str, int]]:
        """Label and tokens of every stream that differs from the others in its tokens."""
        if self.visual == self.audio:
            return [(self.label, self.visual)]
        return [(f"{self.label} visual", self.visual), (f"{self.label} audio", self.audio)]

    @property
    def shifts(self) -> tuple[int, ...]:
        """Shifts of the windows of even and odd blocks."""
        return (0, self.window // 2) if self.side > self.window else (0,)


def _stages() -> Iterator[Stage]:
    for name, backbone in BACKBONES.items():
        config = preset(name, "base")
        if isinstance(backbone, SwinConfig):
            for i in range(backbone.stages):
                side = backbone.resolution(i)
                sizes = config.num_frames, side**2, side**2, backbone.width(i), backbone.num_heads[i], config.adapter_width(i)
                yield Stage(f"{name} stage {i + 1}", *sizes, side, backbone.window)
        else:
            tokens = backbone.visual_tokens, backbone.audio_tokens
            yield Stage(name, config.num_frames, *tokens, backbone.embed_dim, backbone.heads, config.adapter_width())


STAGES = [*_stages()]


def _norms(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(label: str, leading: tuple[int, ...], dim: int) -> Case:
        def arguments(make: Make) -> Arguments:
            return (make(*leading, dim), make(dim, grad=False), make(dim, grad=False), 1e-5), {}

        return Case("layer_norm", label, ops.layer_norm, arguments)

    def packed(stage: Stage) -> Case:
        def arguments(make: Make) -> Arguments:
            streams = [make(stage.clips, stage.frames, tokens, stage.dim) for tokens in (stage.visual, stage.audio)]
            return (streams, make(stage.dim, grad=False), make(stage.dim, grad=False), 1e-5), {}

        return Case("layer_norm", f"{stage.label} both streams", branched_layer_norm, arguments)

    def class_token(stage: Stage) -> Case:
        def arguments(make: Make) -> Arguments:
            tokens = make(stage.clips, stage.frames, stage.visual, stage.dim)
            return (tokens[:, :, 0], make(stage.dim, grad=False), make(stage.dim, grad=False), 1e-5), {}

        return Case("layer_norm", f"{stage.label} class token", ops.layer_norm, arguments)

    for stage in stages:
        for label, tokens in stage.streams:
            yield case(label, (stage.clips, stage.frames, tokens), stage.dim)
        yield packed(stage)
        if not stage.side:
            yield class_token(stage)
        elif stage.side > stage.window:
            yield case(f"{stage.label} merging", (stage.clips, stage.frames, stage.visual // 4), 4 * stage.dim)


def _temporal(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(label: str, stage: Stage, tokens: int) -> Case:
        def arguments(make: Make) -> Arguments:
            head = stage.dim // stage.heads
            bias = make(stage.heads, stage.frames, stage.frames) if stage.side else None
            return (make(stage.clips, stage.frames, tokens, 3, stage.heads, head), bias), {"scale": head**-0.5}

        return Case("temporal_attention", label, ops.temporal_attention, arguments)

    for stage in stages:
        for label, tokens in stage.streams:
            yield case(label, stage, tokens)


def _spatial(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(label: str, stage: Stage, tokens: int) -> Case:
        def arguments(make: Make) -> Arguments:
            head = stage.dim // stage.heads
            return (make(stage.images, tokens, 3, stage.heads, head),), {"scale": head**-0.5}

        return Case("spatial_attention", label, ops.spatial_attention, arguments)

    for stage in stages:
        for label, tokens in stage.streams if not stage.side else ():
            yield case(label, stage, tokens)


def _windows(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(stage: Stage, shift: int) -> Case:
        def arguments(make: Make) -> Arguments:
            head, length, side = stage.dim // stage.heads, stage.window**2, stage.side
            qkv = make(stage.images, side, side, 3, stage.heads, head)
            mask = shift_mask(side, side, stage.window, shift).to(qkv.device) if shift else None
            options = {"window": stage.window, "shift": shift, "scale": head**-0.5, "mask": mask}
            return (qkv, make(stage.heads, length, length, grad=False)), options

        label = f"{stage.label} shift {shift}"
        return Case("window_attention", label, ops.window_attention, arguments)

    for stage in stages:
        for shift in stage.shifts if stage.side else ():
            yield case(stage, shift)


def _params(make: Make, stage: Stage) -> ops.AdapterParams:
    dim, rank = stage.dim, stage.rank
    return ops.AdapterParams(make(rank, dim, std=dim**-0.5), make(rank), make(dim, rank, std=rank**-0.5), make(dim))


def _adapters(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(label: str, stage: Stage, tokens: int, scaled: bool) -> Case:
        def arguments(make: Make) -> Arguments:
            x, y = (make(stage.clips, stage.frames, tokens, stage.dim) for _ in range(2))
            scale = make(stage.clips, 1, tokens, 1, grad=False) if scaled else None
            return (x, _params(make, stage), y, scale), {}

        return Case("adapter", f"{label} stochastic depth" if scaled else label, ops.adapter, arguments)

    for stage in stages:
        for label, tokens in stage.streams:
            yield case(label, stage, tokens, False)
            yield case(label, stage, tokens, True)


def _cross_modal(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(label: str, stage: Stage, groups: int, visual: int, audio: int) -> Case:
        def arguments(make: Make) -> Arguments:
            return (make(groups, visual, stage.rank), make(groups, audio, stage.rank), make(1), make(1)), {}

        return Case("cross_modal_attention", label, ops.cross_modal_attention, arguments)

    for stage in stages:
        yield case(stage.label, stage, stage.images, stage.visual, stage.audio)
        if stage.side:
            length = stage.window**2
            yield case(f"{stage.label} windows", stage, stage.images * stage.visual // length, length, length)


def _av_adapters(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(label: str, stage: Stage, window: ops.WindowGrid | None) -> Case:
        def arguments(make: Make) -> Arguments:
            visual, visual_residual = (make(stage.images, stage.visual, stage.dim) for _ in range(2))
            audio, audio_residual = (make(stage.images, stage.audio, stage.dim) for _ in range(2))
            options = {"residual_visual": visual_residual, "residual_audio": audio_residual, "window": window}
            return (visual, audio, _params(make, stage), _params(make, stage), make(1), make(1)), options

        return Case("av_adapter", label, ops.av_adapter, arguments)

    for stage in stages:
        yield case(stage.label, stage, None)
        for shift in stage.shifts if stage.side else ():
            grid = ops.WindowGrid(stage.side, stage.side, stage.window, shift)
            yield case(f"{stage.label} windows shift {shift}", stage, grid)


def _gelus(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(stage: Stage) -> Case:
        def arguments(make: Make) -> Arguments:
            return (make(stage.images * (stage.visual + stage.audio), 4 * stage.dim),), {"quick": not stage.side}

        return Case("gelu", f"{stage.label} both streams", ops.gelu, arguments)

    for stage in stages:
        yield case(stage)


def _quantizations(stages: Iterable[Stage]) -> Iterator[Case]:
    def case(stage: Stage, width: int) -> Case:
        def arguments(make: Make) -> Arguments:
            return (make(stage.images * (stage.visual + stage.audio), width * stage.dim, grad=False),), {}

        def quantize(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
            return torch.ops.stgcma_fast.quantize_fwd(x, torch.float8_e4m3fn)

        return Case("quantize", f"{stage.label} width {width * stage.dim}", quantize, arguments)

    for stage in stages:
        # What frozen layers of float8 numbers round: tokens, gradients of q, k and v, the FFN's hidden tokens.
        for width in (1, 3, 4):
            yield case(stage, width)


_ADAPTERS = (_adapters, _cross_modal, _av_adapters)
_OPERATORS = (_norms, _temporal, _spatial, _windows, *_ADAPTERS, _gelus)


def _cases(stages: Iterable[Stage], operators: Iterable[Callable[[Iterable[Stage]], Iterator[Case]]]) -> list[Case]:
    stages = list(stages)
    return [case for operator in operators for case in operator(stages)]


# No preset has windows of 12: these are the largest that published Swin transformers use.
_WINDOW_12 = Stage("window 12", 10, 24**2, 24**2, 768, 24, 96, 24, 12)

CASES: list[Case] = _cases(STAGES, _OPERATORS) + _cases([_WINDOW_12], [_windows])

# Inside an operator, and without gradients of its own: compiled, but not measured by itself.
INSIDE: list[Case] = _cases(STAGES, [_quantizations])

_SWIN_L_3 = next(stage for stage in STAGES if stage.label == "swin_l stage 3")

# What no preset asks for: to be measured, not to be tuned for.
STRESS: list[Case] = [
    *_cases(
        [
            _SWIN_L_3._replace(label="swin_l stage 3 batch 8", clips=8),
            _SWIN_L_3._replace(label="swin_l stage 3 one frame", frames=1),
            # Heads of 25 channels: no row begins where a vector load could.
            _SWIN_L_3._replace(label="width 100", dim=100, heads=4, rank=100),
        ],
        _OPERATORS,
    ),
    *_cases([_SWIN_L_3._replace(label="swin_l stage 3 rank 100", rank=100)], _ADAPTERS),
]

"""Checks of a model's inputs, made before any work, and the meaning of the published call's mode argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ..config import ModelConfig

MODES = {
    "fusion": ("visual", "audio"),
    "multimodal": ("visual", "audio"),
    "audioonly": ("audio",),
    "videoonly": ("visual",),
}


def _check_shape(name: str, got: Tensor | None, expected: tuple[str | int, ...], floating: bool = True) -> None:
    wanted = f"{name}: expected {'a floating' if floating else 'an integer'} tensor of shape [{', '.join(map(str, expected))}]"
    if got is None:
        raise ValueError(f"{wanted}, got None")
    if got.is_floating_point() != floating:
        raise ValueError(f"{wanted}, got dtype {got.dtype}")
    right = got.ndim == len(expected) and all(isinstance(e, str) or g == e for g, e in zip(got.shape, expected, strict=True))
    if not right or got.numel() < 1:
        raise ValueError(f"{wanted}, got shape {list(got.shape)}")


def check_inputs(
    config: ModelConfig,
    audio: Tensor | None,
    video: Tensor | None,
    negative: Tensor | None,
    question: Tensor | None,
    mode: str | None,
) -> None:
    """Raise unless a call fits the configuration.

    Args:
        config: the model's configuration.
        audio: ``[B, T, time, mel]``; anything if the model has no audio stream.
        video: ``[B, 3, T, height, width]``, or ``[B, T, 3, height, width]`` but for AVE; anything if the model has no visual
            stream.
        negative: as ``video``, or None; only for AVQA.
        question: integers ``[B, L]``; only for AVQA.
        mode: the published call's last argument, or None. The model's own configuration decides what is computed, as in
            the published model; the name must go with its streams.

    Raises:
        ValueError: a wrong mode, dtype, frame count, image size, number of mel bins, batch sizes that differ, or inputs that
            the task has no use for.
    """
    if mode is not None and MODES.get(mode) != config.modalities:
        allowed = [name for name, modalities in MODES.items() if modalities == config.modalities]
        raise ValueError(
            f"mode: got {mode!r}, a model with modalities {config.modalities} allows {', '.join(map(repr, allowed))}"
        )
    size, frames = config.backbone.image_size, config.num_frames
    clip = ("B", *((3, frames) if config.task == "ave" else (frames, 3)), size, size)
    batches = {}
    if "audio" in config.modalities:
        _check_shape("audio", audio, ("B", frames, *config.backbone.audio_shape))
        batches["audio"] = audio.shape[0]
    if "visual" in config.modalities:
        _check_shape("video", video, clip)
        batches["video"] = video.shape[0]
    if config.task == "avqa":
        if negative is not None:
            _check_shape("negative", negative, clip)
            batches["negative"] = negative.shape[0]
        _check_shape("question", question, ("B", "L"), floating=False)
        batches["question"] = question.shape[0]
    elif negative is not None or question is not None:
        raise ValueError(f"negative, question: task {config.task!r} has neither, expected None")
    # One by one: in a set, `torch.compile` would take the sizes for constants.
    first, *others = batches.values()
    if any(count != first for count in others):
        raise ValueError(f"batch sizes differ: {', '.join(f'{name} has {count} clips' for name, count in batches.items())}")

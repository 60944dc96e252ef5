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


def _check_shape(name: str, got: Tensor | None, expected: tuple[str | int, ...]) -> None:
    wanted = f"{name}: expected a floating tensor of shape [{', '.join(map(str, expected))}]"
    if got is None:
        raise ValueError(f"{wanted}, got None")
    if not got.is_floating_point():
        raise ValueError(f"{wanted}, got dtype {got.dtype}")
    right = got.ndim == len(expected) and all(isinstance(e, str) or g == e for g, e in zip(got.shape, expected, strict=True))
    if not right or got.shape[0] < 1:
        raise ValueError(f"{wanted}, got shape {list(got.shape)}")


def check_inputs(config: ModelConfig, audio: Tensor | None, video: Tensor | None, mode: str | None) -> None:
    """Raise unless a call fits the configuration.

    Args:
        config: the model's configuration.
        audio: ``[B, T, time, mel]``; anything if the model has no audio stream.
        video: ``[B, 3, T, height, width]``; anything if the model has no visual stream.
        mode: the published call's third argument, or None. The model's own configuration decides what is computed, as in
            the published model; the name must go with its streams.

    Raises:
        ValueError: a wrong mode, dtype, frame count, image size, number of mel bins, or batch sizes that differ.
    """
    if mode is not None and MODES.get(mode) != config.modalities:
        allowed = [name for name, modalities in MODES.items() if modalities == config.modalities]
        raise ValueError(
            f"mode: got {mode!r}, a model with modalities {config.modalities} allows {', '.join(map(repr, allowed))}"
        )
    size = config.backbone.image_size
    batches = []
    if "audio" in config.modalities:
        _check_shape("audio", audio, ("B", config.num_frames, *config.backbone.audio_shape))
        batches.append(audio.shape[0])
    if "visual" in config.modalities:
        _check_shape("video", video, ("B", 3, config.num_frames, size, size))
        batches.append(video.shape[0])
    if batches[0] != batches[-1]:
        raise ValueError(f"batch sizes differ: audio has {batches[0]} clips, video has {batches[-1]}")

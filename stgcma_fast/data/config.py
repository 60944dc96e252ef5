"""What a task makes of media: how many frames and chunks of which size, and how they are normalised (frozen, by preset)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import ClipConfig, SwinConfig

DataTask = Literal["ave", "avs", "avqa"]

# Pixels are in [0, 1] before; of ImageNet, for CLIP's backbones too.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AudioConfig:
    """Filterbanks of a clip's chunks.

    Args:
        chunks: of a clip.
        window: samples of a chunk.
        margin: a chunk starts at ``linspace(0, samples - margin, chunks)``, truncated; a clip of at most so many samples is
            the one chunk that all are copies of.
        num_mel_bins: of the filterbank.
        frame_shift_ms: between its frames, in milliseconds.
        frames: of a chunk: later ones are cut off, missing ones are zeros.
        mean, std: a filterbank x becomes ``(x - mean) / (2 * std)``.
        sample_rate: in Hz; audio of another rate is resampled.
    """

    chunks: int
    window: int
    margin: int
    num_mel_bins: int
    frame_shift_ms: float
    frames: int
    mean: float
    std: float
    sample_rate: int = 16000


@dataclass(frozen=True)
class VideoConfig:
    """Frames of a clip.

    Args:
        frames: of a clip.
        size: pixels a side.
        resize: "crop", the shorter side to ``size`` and the middle cut out (bilinear); "squash", both sides to ``size``
            (bicubic, without antialiasing).
        layout: of a clip's tensor.
    """

    frames: int
    size: int
    resize: Literal["crop", "squash"]
    layout: Literal["CTHW", "TCHW"]


@dataclass(frozen=True)
class MediaConfig:
    """What a task and a backbone make of media; see `media_config`."""

    task: DataTask
    audio: AudioConfig
    video: VideoConfig


def media_config(task: DataTask, backbone: SwinConfig | ClipConfig, num_frames: int | None = None) -> MediaConfig:
    """The published settings of a task, at the sizes of a backbone.

    A Swin whose images are not 224 pixels large gets as many mel bins and frames, its frames as much further apart.

    Args:
        task: "ave", "avs" or "avqa".
        backbone: of the model; the three tasks are published for Swin, AVE also for CLIP.
        num_frames: video frames and audio chunks of a clip (T); None: 5 for AVS, else 10.

    Raises:
        ValueError: an unknown task, or one that is not defined for the backbone.
    """
    if task not in ("ave", "avs", "avqa"):
        raise ValueError(f"task: got {task!r}, allowed are 'ave', 'avs', 'avqa'")
    clip = isinstance(backbone, ClipConfig)
    if clip and task != "ave":
        raise ValueError(f"task: got {task!r} with a CLIP backbone, which is defined for 'ave' alone")
    count = num_frames or (5 if task == "avs" else 10)
    frames, bins = backbone.audio_shape
    shift = 10.0 if clip else 4.4 * 224 / frames
    window, margin = (16000, 17600) if task == "ave" else (31200, 32800)
    mean, std = {
        "ave": (-4.1426, 3.2001),
        "avs": (-5.669627666473389, 3.948380470275879),
        "avqa": (-5.214385986328125, 3.8699076175689697),
    }[task]
    return MediaConfig(
        task,
        AudioConfig(count, window, margin, bins, shift, frames, mean, std),
        VideoConfig(count, backbone.image_size, "squash" if task == "avqa" else "crop", "CTHW" if task == "ave" else "TCHW"),
    )

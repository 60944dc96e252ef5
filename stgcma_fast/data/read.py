"""One item on the CPU: its files read, decoded by PyAV, and made to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .audio import read_audio, track_audio
from .augment import frames_to_tensor
from .config import MediaConfig, VideoConfig
from .errors import MediaError
from .fbank import filterbanks
from .sample import Frames, Sample
from .video import decoded, opened, opened_image, read_frames, scan

# Of a mask in shades of grey: the sound's source is brighter.
GREY = 127


class Media(Protocol):
    """Where the media that a sample names are read from."""

    def frames(self, frames: Frames) -> Tensor:
        """uint8 ``[M, H, W, 3]``; see `read_frames`."""
        ...

    def waveform(self, path: Path, sample_rate: int) -> Tensor:
        """float32 ``[N]``; see `read_audio`."""
        ...

    def clip(self, frames: Frames, audio: Path, sample_rate: int) -> tuple[Tensor, Tensor]:
        """Both."""
        ...

    def mask(self, path: Path) -> Tensor:
        """bool ``[H, W]``; see `read_mask`."""
        ...


class Files:
    """Media in the files of their names."""

    def frames(self, frames: Frames) -> Tensor:
        return read_frames(frames)

    def waveform(self, path: Path, sample_rate: int) -> Tensor:
        return read_audio(path, sample_rate)

    def clip(self, frames: Frames, audio: Path, sample_rate: int) -> tuple[Tensor, Tensor]:
        if frames.source != audio:
            return self.frames(frames), self.waveform(audio, sample_rate)
        # Opening takes milliseconds, and so does going through the packets: once is enough.
        with opened(audio) as (container, stream):
            track = scan(audio, container, stream)
            return decoded(frames, stream, track), track_audio(audio, container, track.all, sample_rate)

    def mask(self, path: Path) -> Tensor:
        return read_mask(path)


FILES = Files()


def read_sample(sample: Sample, config: MediaConfig, media: Media = FILES) -> dict[str, Tensor]:
    """Everything of an item that is a tensor.

    Args:
        sample: what is to be read and done.
        config: sizes, layout and normalisation.
        media: where it is read from.

    Returns:
        "audio" float32 ``[T, frames, bins]``; "video" float32 ``[3, T, S, S]`` (ave) or ``[T, 3, S, S]`` (avs, avqa); "mask"
        float32 ``[1 or T, 1, S, S]`` of zeros and ones where the sample has masks; "negative" float32 ``[T, 3, S, S]`` where
        it has negatives; and the sample's targets.

    Raises:
        MediaError: a file is broken or does not fit the others.
    """
    frames, waveform = media.clip(sample.video, sample.audio, config.audio.sample_rate)
    mix = read_mix(sample, config, media)
    item = {
        "video": frames_to_tensor(frames, config.video, sample.augmentation),
        "audio": filterbanks([waveform], config.audio, [mix])[0],
        **sample.target,
    }
    if sample.masks:
        height, width = frames.shape[1:3]
        item["mask"] = read_masks(sample, config.video, (height, width), media)
    if sample.negatives:
        item["negative"] = torch.cat([frames_to_tensor(media.frames(other), config.video) for other in sample.negatives])
    return item


def read_mix(sample: Sample, config: MediaConfig, media: Media = FILES) -> tuple[Tensor, Sequence[float]] | None:
    """What is mixed into a sample's waveform, as `filterbanks` takes it.

    Raises:
        MediaError: its file is broken.
    """
    return sample.mix and (media.waveform(sample.mix.audio, config.audio.sample_rate), sample.mix.lams)


def read_masks(sample: Sample, config: VideoConfig, size: tuple[int, int], media: Media = FILES) -> Tensor:
    """A sample's masks, cut as `frames_to_tensor` cuts frames without an augmentation; each pixel is that of the nearest.

    Args:
        size: height and width of the frames.

    Returns:
        float32 ``[1 or T, 1, S, S]`` of zeros and ones.

    Raises:
        MediaError: a file is broken or not of the frames' size, or there are neither one nor T of them.
    """
    masks, short = whole_masks(sample, config, size, media), min(size)
    target = [config.size * side // short for side in size] if config.resize == "crop" else [config.size, config.size]
    masks = F.resize(masks.to(torch.uint8), target, InterpolationMode.NEAREST_EXACT)
    return F.center_crop(masks, [config.size, config.size]).unsqueeze(1).float()


def whole_masks(sample: Sample, config: VideoConfig, size: tuple[int, int], media: Media = FILES) -> Tensor:
    """A sample's masks as they are, bool ``[1 or T, H, W]``; see `read_masks`."""
    if len(sample.masks) not in (1, config.frames):
        raise MediaError(sample.masks[0].parent, f"got {len(sample.masks)} masks of {sample.id}, expected 1 or {config.frames}")
    masks = []
    for path in sample.masks:
        mask = media.mask(path)
        if tuple(mask.shape) != tuple(size):
            (height, width), (frame_height, frame_width) = mask.shape, size
            raise MediaError(path, f"the mask is {width}x{height}, but its frames are {frame_width}x{frame_height}")
        masks.append(mask)
    return torch.stack(masks)


def read_mask(path: Path) -> Tensor:
    """A mask from an image: of shades of grey what is brighter than 127 of 255, of colours everything but black.

    Returns:
        bool ``[H, W]``.

    Raises:
        MediaError: the file is not there or not an image, or its shades of grey are all dark, as where 1 stands for the mask.
    """
    with opened_image(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if (pixels != pixels[..., :1]).any():
        return torch.from_numpy(pixels.any(2))
    grey = pixels[..., 0]
    if 0 < grey.max() <= GREY:
        raise MediaError(path, f"its brightest grey is {grey.max()}, expected 0 for no mask, or more than {GREY}")
    return torch.from_numpy(grey > GREY)

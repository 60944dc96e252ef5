"""From frames to what a model takes: size, normalisation, and the augmentation of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .config import IMAGE_MEAN, IMAGE_STD, VideoConfig

# "rand-m7-n4-mstd0.5-inc1" of RandAugment: so many operators a clip, each with this chance, at magnitudes (0 to 10) around 7.
OPERATORS, CHANCE = 4, 0.5
MAGNITUDE, DEVIATION = 7.0, 0.5
FLIP_CHANCE, ERASE_CHANCE = 0.5, 0.25
FILL = 128


class Operator(NamedTuple):
    """An operator of RandAugment.

    Args:
        name: a key of `OPERATIONS`.
        magnitude: 0 to 10.
        sign: 1 or -1: which way it goes, where there are two.
    """

    name: str
    magnitude: float
    sign: int


class Box(NamedTuple):
    """A box of random size in an image of any size.

    Args:
        tries: shares of the image's area, and ratios of width to height; the first that fits into the image counts.
        place: of the box between the top and the bottom, the left and the right; each in [0, 1).
    """

    tries: tuple[tuple[float, float], ...]
    place: tuple[float, float]

    def within(self, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width in pixels; None where no try fits."""
        for area, ratio in self.tries:
            box_height = round(math.sqrt(area * height * width / ratio))
            box_width = round(math.sqrt(area * height * width * ratio))
            if 0 < box_height <= height and 0 < box_width <= width:
                top = int(self.place[0] * (height - box_height + 1))
                left = int(self.place[1] * (width - box_width + 1))
                return top, left, box_height, box_width
        return None


@dataclass(frozen=True)
class Augmentation:
    """What was drawn for a clip: all its frames are treated alike. It holds for frames of any size.

    Args:
        operators: of RandAugment, in their order.
        crop: the box that becomes the image.
        flip: left and right change places.
        erase: the box that noise replaces; None: none.
        noise_seed: of the noise.
    """

    operators: tuple[Operator, ...]
    crop: Box
    flip: bool
    erase: Box | None
    noise_seed: int


def draw(generator: torch.Generator) -> Augmentation:
    """A clip's augmentation, by the published distributions, from a generator on the CPU."""
    names = torch.randint(len(OPERATIONS), (OPERATORS,), generator=generator).tolist()
    magnitudes = torch.randn(OPERATORS, generator=generator).mul(DEVIATION).add(MAGNITUDE).clamp(0, 10).tolist()
    chances = torch.rand(OPERATORS, 2, generator=generator).tolist()
    operators = tuple(
        Operator([*OPERATIONS][name], magnitude, 1 if sign < 0.5 else -1)
        for name, magnitude, (applied, sign) in zip(names, magnitudes, chances, strict=True)
        if applied < CHANCE
    )
    crop = _draw_box((0.08, 1.0), 4 / 3, generator)
    erase = _draw_box((0.02, 1 / 3), 1 / 0.3, generator)
    flip, erased = torch.rand(2, generator=generator).tolist()
    seed = int(torch.randint(2**62, (), generator=generator))
    return Augmentation(operators, crop, flip < FLIP_CHANCE, erase if erased < ERASE_CHANCE else None, seed)


def _draw_box(area: tuple[float, float], ratio: float, generator: torch.Generator, tries: int = 10) -> Box:
    """Areas are uniform; the logarithm of a ratio is, between those of ``1 / ratio`` and ``ratio``."""
    shares, ratios = torch.rand(2, tries, generator=generator, dtype=torch.float64)
    shares = shares * (area[1] - area[0]) + area[0]
    ratios = torch.exp((2 * ratios - 1) * math.log(ratio))
    top, left = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return Box(tuple(zip(shares.tolist(), ratios.tolist(), strict=True)), (top, left))


def frames_to_tensor(frames: Tensor, config: VideoConfig, augmentation: Augmentation | None = None) -> Tensor:
    """Frames as a model takes them: ``(x / 255 - mean) / std`` at the size of the configuration.

    Without an augmentation, the frames are resized as ``config.resize`` says. With one, the operators of RandAugment work on
    whole frames; then its crop is resized (bilinear, without antialiasing), flipped, and a box of it replaced by noise: the
    same box in every frame, with other noise. Noise is drawn on the CPU, so that it is the same on every device.

    Args:
        frames: uint8 ``[M, H, W, 3]`` on any device, of any size.
        config: size, layout, and how frames are resized.
        augmentation: of training; None: none.

    Returns:
        float32, contiguous, on the device of the frames: ``[3, M, S, S]`` for the layout "CTHW", ``[M, 3, S, S]`` for "TCHW".
    """
    size = config.size
    images = frames.permute(0, 3, 1, 2)
    if augmentation is None:
        images = _crop(images, size) if config.resize == "crop" else _squash(images, size)
        return _normalise(images, config.layout)
    # Autocast is for models: in bfloat16, the grid of a turned image is off by many pixels.
    with torch.autocast(frames.device.type, enabled=False):
        images = _operated(images, augmentation)
    # Normalising is the same for every pixel, and weights of an interpolation add up to 1: their order does not matter.
    images = _interpolate(images, size, "bilinear", torch.channels_last)
    video = _normalise(images.flip(3) if augmentation.flip else images, config.layout)
    if augmentation.erase and (box := augmentation.erase.within(size, size)):
        top, left, height, width = box
        noise = torch.randn(len(frames), 3, height, width, generator=torch.Generator().manual_seed(augmentation.noise_seed))
        noise = noise.transpose(0, 1) if config.layout == "CTHW" else noise
        video[..., top : top + height, left : left + width] = noise.to(video.device)
    return video


def _operated(images: Tensor, augmentation: Augmentation) -> Tensor:
    """What the operators of RandAugment make of the crop ``[M, 3, h, w]``."""
    box = augmentation.crop.within(*images.shape[2:]) or _central(*images.shape[2:])
    *others, last = augmentation.operators or (None,)
    for operator in others:
        images = OPERATIONS[operator.name](images.contiguous(), operator.magnitude, operator.sign)
    if last and last.name in GEOMETRIC:
        # It takes the longest. What lies outside of the crop is left out.
        return _warp(images.contiguous(), *GEOMETRIC[last.name](last.magnitude * last.sign, *images.shape[2:]), box)
    if last:
        images = OPERATIONS[last.name](images.contiguous(), last.magnitude, last.sign)
    top, left, height, width = box
    return images[..., top : top + height, left : left + width]


def _crop(images: Tensor, size: int) -> Tensor:
    """The shorter side becomes ``size``, rounded to whole grey levels again; the middle of the longer one is cut out."""
    height, width = images.shape[2:]
    short = min(height, width)
    target = [size * height // short, size * width // short]
    return F.center_crop(F.resize(images, target, InterpolationMode.BILINEAR, antialias=False), [size, size])


def _squash(images: Tensor, size: int) -> Tensor:
    """Both sides become ``size``; values may leave 0 to 255, as they do where an image of numbers in [0, 1] is resized."""
    return images if images.shape[2:] == (size, size) else _interpolate(images, size, "bicubic", torch.contiguous_format)


def _interpolate(images: Tensor, size: int, mode: str, layout: torch.memory_format) -> Tensor:
    """``[M, 3, S, S]`` float32. On a CPU the layout that is faster depends on the mode."""
    images = images.contiguous(memory_format=layout).float()
    return torch.nn.functional.interpolate(images, (size, size), mode=mode, align_corners=False)


def _normalise(images: Tensor, layout: str) -> Tensor:
    """``[M, 3, S, S]`` of 0 to 255 to a contiguous float32 tensor of the layout."""
    mean, std = _levels(images.device)
    if layout == "CTHW":
        images, mean, std = images.transpose(0, 1), mean[:, None], std[:, None]
    return images.to(torch.float32, memory_format=torch.contiguous_format, copy=True).sub_(mean).div_(std)


@cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of grey levels, each ``[3, 1, 1]``. A GPU waits for what is sent to it, and need not for each clip."""
    mean, std = (255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return mean, std


def _central(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest box in the middle whose ratio of width to height is in [3/4, 4/3]: top, left, height and width."""
    box_height = min(height, round(width / (3 / 4)))
    box_width = min(width, round(height * (4 / 3)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _warp(
    images: Tensor, across: Sequence[float], down: Sequence[float], box: tuple[int, int, int, int] | None = None
) -> Tensor:
    """Point (x, y) shows what was at (across . (x, y, 1), down . (x, y, 1)), in pixels from the corner; outside is grey.

    Cubic interpolation as PIL does it, but with the coefficient -0.75 of PyTorch where PIL has -0.5. Of the result, only the
    box is made: top, left, height and width.
    """
    height, width = images.shape[2:]
    top, left, box_height, box_width = box or (0, 0, height, width)
    # The same map between coordinates that go from -1 to 1.
    (a, b, c), (d, e, f) = across, down
    b, d = b * height / width, d * width / height
    theta = torch.tensor([[a, b, a + b + 2 * c / width - 1], [d, e, d + e + 2 * f / height - 1]])
    grid = torch.nn.functional.affine_grid(theta[None], [1, 3, height, width], align_corners=False)
    grid = grid[:, top : top + box_height, left : left + box_width].to(images.device)
    outside = (grid.abs() > 1).any(-1)
    warped = []
    # A processor keeps a frame in its cache from one step to the next; on a GPU a launch costs more.
    for part in images.split(1 if images.device.type == "cpu" else len(images)):
        values = torch.nn.functional.grid_sample(
            part.float(), grid.expand(len(part), -1, -1, -1), "bicubic", "border", align_corners=False
        )
        warped.append(values.masked_fill_(outside, FILL).round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(warped)


def _rotation(value: float, height: int, width: int) -> tuple[Sequence[float], Sequence[float]]:
    angle = math.radians(3 * value)
    cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
    return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)


# Of a magnitude with its sign, the height and the width: where a point of the image was; see `_warp`.
GEOMETRIC: dict[str, Callable[[float, int, int], tuple[Sequence[float], Sequence[float]]]] = {
    "Rotate": _rotation,
    "ShearX": lambda value, height, width: ((1, 0.03 * value, 0), (0, 1, 0)),
    "ShearY": lambda value, height, width: ((1, 0, 0), (0.03 * value, 1, 0)),
    "TranslateXRel": lambda value, height, width: ((1, 0, 0.045 * value * width), (0, 1, 0)),
    "TranslateYRel": lambda value, height, width: ((1, 0, 0), (0, 1, 0.045 * value * height)),
}


def _geometric(name: str) -> Callable[[Tensor, float, int], Tensor]:
    return lambda images, magnitude, sign: _warp(images, *GEOMETRIC[name](magnitude * sign, *images.shape[2:]))


def _posterize(images: Tensor, magnitude: float, sign: int) -> Tensor:
    return images & (256 - 2 ** (4 + int(0.4 * magnitude)))


def _solarize(images: Tensor, magnitude: float, sign: int) -> Tensor:
    return images ^ (images.short() >= 256 - int(25.6 * magnitude)).byte().mul_(255)


def _solarize_add(images: Tensor, magnitude: float, sign: int) -> Tensor:
    return images + (images < 128).byte().mul_(int(11 * magnitude))


def _sharpen(images: Tensor, factor: float) -> Tensor:
    # Ten times faster where the channels of a pixel are next to each other.
    return F.adjust_sharpness(images.contiguous(memory_format=torch.channels_last), factor)


def _enhance(adjust: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float, int], Tensor]:
    return lambda images, magnitude, sign: adjust(images, 1 + sign * 0.09 * magnitude)


# Each takes uint8 [M, 3, H, W], a magnitude and a sign.
OPERATIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "AutoContrast": lambda images, magnitude, sign: F.autocontrast(images),
    "Equalize": lambda images, magnitude, sign: F.equalize(images),
    "Invert": lambda images, magnitude, sign: F.invert(images),
    "Rotate": _geometric("Rotate"),
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhance(F.adjust_saturation),
    "ContrastIncreasing": _enhance(F.adjust_contrast),
    "BrightnessIncreasing": _enhance(F.adjust_brightness),
    "SharpnessIncreasing": _enhance(_sharpen),
    "ShearX": _geometric("ShearX"),
    "ShearY": _geometric("ShearY"),
    "TranslateXRel": _geometric("TranslateXRel"),
    "TranslateYRel": _geometric("TranslateYRel"),
}

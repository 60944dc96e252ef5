"""Pictures of predictions: timelines by matplotlib, masks over frames, and these as a video with the clip's sound."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

if TYPE_CHECKING:
    from .predict import Clip

# Of a page, in inches.
LEFT, RIGHT, BOTTOM, GAP = 2.2, 0.3, 0.5, 0.12
MARGIN, LINE = 0.2, 0.2  # above all and between title and frames; of a line of the title
SCALE = 0.65  # between two axes, the upper of which has numbers and a name
SEGMENT, NARROWEST, TALLEST = 0.95, 5.0, 1.4
SOUND, ROW = 0.8, 0.38
DPI = 120
ROWS = 6  # of classes, or more where more of them win a segment
NAME = 26  # characters in a line beside an axis
# Of the colours that colour-blind people tell apart. What is vermilion has an outline, or is one.
BLUE, VERMILION = "#0072B2", (213, 94, 0)
# Videos have about so many frames a second, but of each sampled frame not more than this.
RATE, REPEATS = 10, 100


def timeline(clip: Clip, probabilities: Tensor, classes: Sequence[str]) -> Figure:
    """Frames, sound, and how probable the clip's main classes are in each segment; the first of each has a frame.

    Args:
        clip: what was read.
        probabilities: ``[T, classes]``.
        classes: their names.
    """
    shown = main_classes(probabilities)
    figure, _, axes = _page([os.path.basename(clip.file)], clip, GAP, ROW * len(shown))
    values = probabilities.T[shown].numpy()
    edges = np.linspace(0, clip.duration, len(probabilities) + 1)
    frame = {"edgecolor": tuple(level / 255 for level in VERMILION), "linewidth": 3, "fill": False, "clip_on": False}
    axes.pcolormesh(edges, np.arange(len(shown) + 1), values, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    for segment, (start, end) in enumerate(pairwise(edges)):
        for row, value in enumerate(values[:, segment]):
            colour = "white" if value < 0.5 else "black"
            axes.text((start + end) / 2, row + 0.5, _percent(value), color=colour, fontsize=8, ha="center", va="center")
        first = shown.index(int(probabilities[segment].argmax()))
        axes.add_patch(Rectangle((start, first), end - start, 1, **frame))
    _names(axes, np.arange(len(shown)) + 0.5, [classes[index] for index in shown])
    axes.set_ylim(len(shown), 0)
    axes.set_xlim(0, clip.duration)
    axes.set_xlabel("seconds")
    return figure


def main_classes(probabilities: Tensor) -> list[int]:
    """Of ``[T, classes]``, the classes that are first in a segment and the most probable others, by their means."""
    winners = dict.fromkeys(probabilities.argmax(1).tolist())
    others = [index for index in probabilities.amax(0).argsort(descending=True, stable=True).tolist() if index not in winners]
    means = probabilities.mean(0).tolist()
    return sorted([*winners, *others[: max(0, ROWS - len(winners))]], key=lambda index: -means[index])


def bars(clip: Clip, question: str, answers: Sequence[tuple[str, float]]) -> Figure:
    """Frames, sound, and answers to a question with their probabilities."""
    figure, sound, axes = _page([question, os.path.basename(clip.file)], clip, SCALE, ROW * len(answers))
    sound.tick_params("x", labelbottom=True, length=3)
    sound.set_xlabel("seconds")
    sound.spines["bottom"].set_visible(True)
    for row, (_, probability) in enumerate(answers):
        axes.barh(row, probability, color=BLUE, height=0.7)
        # Inside a long bar, beside a short one.
        place = {"color": "white", "ha": "right"} if probability > 0.5 else {"color": "black", "ha": "left"}
        axes.text(
            probability + (-0.01 if probability > 0.5 else 0.01), row, _percent(probability), fontsize=9, va="center", **place
        )
    _names(axes, range(len(answers)), [answer for answer, _ in answers])
    axes.set_ylim(len(answers) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _percent(value: float) -> str:
    return "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def _names(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    lines = [textwrap.wrap(name, NAME, max_lines=2, placeholder=" …") for name in names]
    axes.set_yticks(places, ["\n".join(parts) for parts in lines], fontsize=9, parse_math=False)
    axes.tick_params("y", length=0)


def _page(titles: Sequence[str], clip: Clip, gap: float, height: float) -> tuple[Figure, Axes, Axes]:
    """A figure with frames and sound over each other; the axes of the sound; and so many inches below it, axes so high.

    Sizes are in inches, and nothing is left to a layout engine: seconds are at one place in all axes, whatever names stand
    beside them.
    """
    count, frame_height, frame_width = clip.frames.shape[:3]
    width = max(NARROWEST, SEGMENT * count)
    thumb = min(TALLEST, width / count * frame_height / frame_width)
    lines = [line for title in titles for line in textwrap.wrap(title, int(11 * width), max_lines=2, placeholder=" …")]
    top = MARGIN + LINE * len(lines) + GAP
    size = (LEFT + width + RIGHT, top + thumb + GAP + SOUND + gap + height + BOTTOM)
    figure = Figure(figsize=size)
    for number, line in enumerate(lines):
        figure.text(LEFT / size[0], 1 - (MARGIN + LINE * number) / size[1], line, fontsize=11, va="top", parse_math=False)

    def axes(above: float, inches: float) -> Axes:
        return figure.add_axes((LEFT / size[0], 1 - (above + inches) / size[1], width / size[0], inches / size[1]))

    frames = axes(top, thumb)
    seconds = clip.duration / width  # of an inch
    share = clip.duration / count
    half = 0.48 * min(share, thumb * frame_width / frame_height * seconds)
    for index, image in enumerate(clip.frames.numpy()):
        middle = (index + 0.5) * share
        frames.imshow(image, extent=(middle - half, middle + half, 0, 1), aspect="auto")
    frames.set(xlim=(0, clip.duration), ylim=(0, 1))
    frames.set_axis_off()

    sound = axes(top + thumb + GAP, SOUND)
    samples = clip.waveform.numpy()
    starts = np.unique(np.linspace(0, len(samples) - 1, int(width * DPI)).astype(int))
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    sound.fill_between(starts / clip.sample_rate, low, high, color=BLUE, linewidth=0.5)
    loudest = max(float(np.abs(samples).max()), 1e-3)
    sound.set(xlim=(0, clip.duration), ylim=(-1.05 * loudest, 1.05 * loudest), yticks=[0])
    sound.set_yticklabels(["sound"], fontsize=9)
    sound.tick_params(length=0, labelbottom=False)
    sound.spines[["top", "right", "bottom"]].set_visible(False)
    return figure, sound, axes(top + thumb + GAP + SOUND + gap, height)


def seen(height: int, width: int, size: int) -> tuple[int, int, int]:
    """The square that a frame's middle becomes for the model (`VideoConfig`'s "crop" to ``size``): top, left, and its side."""
    short = min(height, width)
    # As the frame is cut out after it was resized to whole pixels.
    top, left = (round(round((size * side // short - size) / 2) * short / size) for side in (height, width))
    return top, left, short


def overlay(frames: Tensor, probabilities: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Masks over frames: vermilion with a white outline. What the model does not see of a frame is darker.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        probabilities: of the square that `seen` gives, float ``[T, S, S]``.
        threshold: above it a pixel is of the mask.

    Returns:
        uint8 ``[T, H, W, 3]``, and the masks, bool ``[T, H, W]``.
    """
    count, height, width = frames.shape[:3]
    top, left, side = seen(height, width, probabilities.shape[-1])
    square = (slice(None), slice(top, top + side), slice(left, left + side))
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    masks[square] = F.interpolate(probabilities[:, None], (side, side), mode="bilinear")[:, 0] > threshold
    thickness = max(1, side // 150)
    grown = F.max_pool2d(masks[:, None].float(), 2 * thickness + 1, 1, thickness)[:, 0] > 0
    images = (frames // 2).float()
    images[square] = frames[square].float()
    images[masks] = (images[masks] + torch.tensor(VERMILION)) / 2
    images[grown & ~masks] = 255.0
    return images.to(torch.uint8), masks


def write_video(path: Path, images: Tensor, clip: Clip) -> None:
    """An mp4 (H.264, AAC) with the clip's sound, in which each image stands for its share of the duration.

    Args:
        path: of the file.
        images: uint8 ``[T, H, W, 3]``; where a side is odd, its last row or column comes twice, as H.264 wants.
        clip: the sound and the duration.
    """
    repeats = min(math.ceil(RATE * clip.duration / len(images)), REPEATS)
    rate = max(Fraction(repeats * len(images) / clip.duration).limit_denominator(10000), Fraction(1, 10000))
    rows, columns = ([*range(side), *[side - 1] * (side % 2)] for side in images.shape[1:3])
    # An absolute path can not be taken for a protocol, as "clip:1/overlay.mp4" can.
    with av.open(os.path.abspath(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "20"})
        video.width, video.height, video.pix_fmt = len(columns), len(rows), "yuv420p"
        audio = container.add_stream("aac", rate=clip.sample_rate, layout="mono")
        sound = av.AudioFrame.from_ndarray(clip.waveform.clamp(-1, 1).numpy()[None], "fltp", "mono")
        sound.sample_rate = clip.sample_rate
        container.mux([*audio.encode(sound), *audio.encode()])
        for image in images[:, rows][:, :, columns].numpy():
            for _ in range(repeats):
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(video.encode())

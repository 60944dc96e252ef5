"""Clips that tests make for themselves, tiny, each frame of which says which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS = 8


def numbered_frame(number: int, width: int, height: int) -> np.ndarray:
    """uint8 ``[H, W, 3]``: eight columns, dark or light as the bits of ``number`` are (lowest left), under coloured noise."""
    bits = number >> np.arange(width) * BITS // width & 1
    noise = np.random.default_rng(number).integers(-30, 31, (height, width, 3))
    return (60 + 130 * bits[None, :, None] + noise).astype(np.uint8)


def frame_number(image: np.ndarray) -> int:
    """Which frame ``[H, W, 3]`` is, by the brightness of its columns. It needs about 16 pixels of width."""
    columns = np.array_split(np.asarray(image, np.float32).mean((0, 2)), BITS)
    middles = [column[len(column) // 4 : len(column) - len(column) // 4] for column in columns]
    return sum(int(middle.mean() > 125) << bit for bit, middle in enumerate(middles))


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 12,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    fps: int | Fraction = 25,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    audio: np.ndarray | None = None,
    audio_codec: str = "aac",
    audio_rate: int = 16000,
) -> Path:
    """Write a clip; what kind of container it is, the name's ending says.

    Args:
        frames: how many numbered frames, or the images themselves, uint8 ``[H, W, 3]`` (then ``size`` is theirs).
        size: width and height.
        fps: frames a second.
        times: of the frames, in units of ``time_base`` (by default 1 / fps); None: one after the other.
        options: of the video's encoder, ``{"g": "12", "bf": "2"}``.
        container_options: of the container, ``{"movflags": "faststart"}``.
        rotation: that a player is to show the video with, in degrees.
        audio: float32 ``[channels, samples]`` in [-1, 1] for a second track; channels are 1 or 2.
    """
    images = frames if not isinstance(frames, int) else [numbered_frame(number, *size) for number in range(frames)]
    time_base = time_base or 1 / Fraction(fps)
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=fps, options=options or {})
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt = pixels
        video.codec_context.time_base = time_base
        video.codec_context.thread_count = 1
        if rotation:
            video.set_display_rotation(rotation)
        if audio is not None:
            layout = {1: "mono", 2: "stereo"}[len(audio)]
            sound = container.add_stream(audio_codec, rate=audio_rate, layout=layout)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = time_base
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            chunk = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio, np.float32), format="fltp", layout=layout)
            chunk.sample_rate, chunk.pts, chunk.time_base = audio_rate, 0, Fraction(1, audio_rate)
            resampler = av.AudioResampler(format=sound.codec_context.format, layout=layout, rate=audio_rate)
            fifo = av.AudioFifo()
            for part in resampler.resample(chunk):
                fifo.write(part)
            while (part := fifo.read(sound.codec_context.frame_size or 1024)) or (part := fifo.read(0, partial=True)):
                container.mux(sound.encode(part))
            container.mux(sound.encode())
    return path


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """`write_video`: ``make_video(tmp_path / "clip.mp4", frames=12, size=(64, 48), codec="libx264", fps=25, audio=...)``."""
    return write_video

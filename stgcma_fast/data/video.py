"""Frames of a video, chosen uniformly: of a container, by FFmpeg on the CPU, or of a folder of images."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import MediaError
from .sample import Frames

# 8K has 7680 x 4320. What claims to be larger is taken for damaged before anything of its size is allocated. So is a sliver,
# which would be large when its shorter side is resized.
LARGEST_SIDE = 8192
LARGEST_RATIO = 32
# From YUV to RGB, whatever a file says: so do DALI and OpenCV, and so are frames read that FFmpeg wrote as JPEG.
MATRIX = Colorspace.ITU601
# Matroska says how long a file is; one that ends so much earlier (in seconds) was cut off.
MISSING_SECONDS = 1.0


def uniform(count: int, slots: Sequence[int], of: int) -> list[int]:
    """``int(linspace(1, count, of)[slot]) - 1`` of each slot: which of ``count`` frames it is, counted from 0."""
    return (np.linspace(1, count, of)[list(slots)].astype(int) - 1).tolist()


def frame_indices(path: str | os.PathLike[str], slots: Sequence[int], of: int) -> list[int]:
    """Which frames of a container the slots are; see `Frames`. Packets are counted, nothing is decoded.

    Where the frame rate varies, a slot is the frame on screen when a constant rate would have shown the slot's.

    Args:
        path: a container.
        slots: places, each of ``range(of)``.
        of: places that are spread over the whole clip.

    Returns:
        A frame for each slot, counted from 0 in the order of display.

    Raises:
        MediaError: the file is not there, holds no video, or ends early.
    """
    with opened(path) as (container, stream):
        return scan(path, container, stream).choose(slots, of)


def read_frames(frames: Frames) -> Tensor:
    """The frames of a container or of a folder of images.

    A container's compressed video is in memory meanwhile; of it, only what the frames depend on is decoded. A clip that is to
    be shown turned, as telephones write them, is turned; a ratio of a pixel's sides is ignored. Images lose their alpha.

    Returns:
        uint8 ``[M, H, W, 3]``, RGB, a frame for each of ``frames.slots``.

    Raises:
        MediaError: a file is not there or not what it should be, ends early, is damaged where frames depend on it, or its
            frames differ in size; the text says which and what.
    """
    if not isinstance(frames.source, Path):
        return _read_images([frames.source[index] for index in uniform(len(frames.source), frames.slots, frames.of)])
    with opened(frames.source) as (container, stream):
        return decoded(frames, stream, scan(frames.source, container, stream))


class Track(NamedTuple):
    """Packets of a video."""

    packets: list[av.Packet]  # as they are decoded
    all: list[av.Packet]  # of all tracks of the container, as they lie in it
    shown: list[int]  # which packet each frame is, as they are displayed
    timed: bool  # whether a frame's time tells which packet it is

    def choose(self, slots: Sequence[int], of: int) -> list[int]:
        """The frame of each slot."""
        ranks = uniform(len(self.shown), slots, of)
        if not self.timed or len(self.shown) == 1:
            return ranks
        times = np.array([self.packets[index].pts for index in self.shown], np.float64)
        step = (times[-1] - times[0]) / (len(times) - 1)
        # Times are whole ticks. Of a constant rate, none is a tick later than it should be, and the next is later than that.
        screen = times[0] + step * np.array(ranks) + min(1, step / 2)
        return (np.searchsorted(times, screen, "right") - 1).tolist()


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container and its video; whatever FFmpeg finds wrong within is a `MediaError`."""
    check_file(path)
    try:
        # An absolute path can not be taken for a protocol, as "clip:1.mp4" can.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
                raise MediaError(path, f"it has no video track, only {kinds}")
            context = stream.codec_context
            if context is None:
                raise MediaError(path, "there is no decoder for its video track")
            check_size(path, context.width, context.height)
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, f"it can not be read: {error.strerror}") from error


def check_file(path: str | os.PathLike[str]) -> None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last, of a name with a zero in it
        raise MediaError(path, "there is no such file") from error
    except OSError as error:  # a folder that may not be entered
        raise MediaError(path, f"it can not be read: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(path, "it is a folder, not a file")
    if not status.st_size:
        raise MediaError(path, "it is empty (0 bytes)")


def scan(path: str | os.PathLike[str], container: av.container.InputContainer, stream: av.VideoStream) -> Track:
    """All packets of a video. Headers are not asked how many there are: they may be wrong."""
    everything, packets = list(container.demux()), []
    ends = dict.fromkeys(range(len(container.streams)), 0)
    for packet in everything:
        # The last packet of each track is an empty one.
        if not packet.size:
            continue
        if packet.pts is not None:
            ends[packet.stream_index] = max(ends[packet.stream_index], packet.pts + (packet.duration or 0))
        if packet.stream_index == stream.index:
            packets.append(packet)
    good = next((index for index, packet in enumerate(packets) if packet.is_corrupt), len(packets))
    cut = good < len(packets)
    if "mp4" in container.format.name and (index := stream.index_entries):
        cut |= index[-1].pos + index[-1].size > container.size
    if "matroska" in container.format.name and container.duration:
        end = max(float(end * container.streams[number].time_base) for number, end in ends.items())
        cut |= end < container.duration / av.time_base - MISSING_SECONDS
    if cut:
        raise MediaError(path, f"it is cut off or damaged: data is missing after {good} frames")
    # What is decoded but not shown: what an edit list leaves out, and VP8's frames that only others refer to.
    hidden = {index for index, packet in enumerate(packets) if packet.is_discard}
    if stream.codec_context.name == "vp8":
        hidden |= {index for index, packet in enumerate(packets) if not memoryview(packet)[0] & 0x10}
    shown = [index for index in range(len(packets)) if index not in hidden]
    if not shown:
        raise MediaError(path, "its video track has no frames")
    times = [packets[index].pts for index in shown]
    timed = None not in times and len(set(times)) == len(times)
    # AVI has no times of display. Those FFmpeg makes up follow the packets, even where frames are shown in another order.
    timed = timed and not (container.format.name == "avi" and stream.codec_context.has_b_frames and times == sorted(times))
    if timed:
        shown.sort(key=lambda index: packets[index].pts)
    return Track(packets, everything, shown, timed)


def decoded(frames: Frames, stream: av.VideoStream, track: Track) -> Tensor:
    """The frames of a container that is open; see `read_frames`."""
    ranks = track.choose(frames.slots, frames.of)
    images = _decode(frames.source, stream.codec_context, track, set(ranks))
    return torch.stack([images[rank] for rank in ranks])


def _decode(path: str | os.PathLike[str], context: av.VideoCodecContext, track: Track, wanted: set[int]) -> dict[int, Tensor]:
    """Images ``[H, W, 3]`` of the wanted frames."""
    # Loaders run a process for each core: more threads would only wait for each other.
    context.thread_count = 1
    # Otherwise damage is covered up with what is around it. Packets may claim another size than the header.
    context.options = {"err_detect": "explode", "max_pixels": str(LARGEST_SIDE**2)}
    context.open()
    reformatter = VideoReformatter()
    by_time = {track.packets[track.shown[rank]].pts: rank for rank in wanted}
    trouble = None
    # A file may call frames independent that are not. Where leaving something out fails, everything is decoded.
    for frames in [_needed(context, track, wanted)] * track.timed + [_everything(context, track)]:
        images: dict[int, Tensor] = {}
        size: tuple[int, int] | None = None
        try:
            for number, frame in enumerate(frames):
                rank = by_time.get(frame.pts) if track.timed else number
                if rank not in wanted or rank in images or frame.is_corrupt:
                    continue
                if size not in (None, (frame.width, frame.height)):
                    raise MediaError(path, f"its frames change size, from {size[0]}x{size[1]} to {frame.width}x{frame.height}")
                size = frame.width, frame.height
                image = reformatter.reformat(
                    frame, format="rgb24", src_colorspace=MATRIX, dst_colorspace=MATRIX, threads=1
                ).to_ndarray()
                images[rank] = torch.from_numpy(np.rot90(image, quarters(frame)).copy())
                if len(images) == len(wanted):
                    return images
        except av.FFmpegError as error:
            trouble = error
    missing = min(wanted - images.keys())
    raise MediaError(path, f"it is damaged: frame {missing + 1} of {len(track.shown)} can not be decoded") from trouble


def quarters(frame: av.VideoFrame) -> int:
    """By how many quarters it is to be turned, to the nearest, for FFmpeg's degrees are cut to whole ones."""
    # A matrix of zeros, as some programs write it, has no angle: FFmpeg gives the lowest number there is.
    return round(frame.rotation / 90) if abs(frame.rotation) <= 180 else 0


def _everything(context: av.VideoCodecContext, track: Track) -> Iterator[av.VideoFrame]:
    context.flush_buffers()
    context.skip_frame = "DEFAULT"
    for packet in [*track.packets, None]:
        yield from context.decode(packet)


def _needed(context: av.VideoCodecContext, track: Track, wanted: set[int]) -> Iterator[av.VideoFrame]:
    """Frames of the track, the wanted ones among them; leaves out what these do not depend on."""
    packets = track.packets
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    indices = {track.shown[rank] for rank in wanted}
    fed = 0
    for index in sorted(indices):
        # A frame that is decoded after a keyframe but shown before it may depend on what came before.
        key = max((key for key in keys if key <= index and packets[key].pts <= packets[index].pts), default=0)
        if key > fed:
            yield from context.decode(None)
            context.flush_buffers()
            fed = key
        for number in range(fed, index + 1):
            context.skip_frame = "DEFAULT" if number in indices else "NONREF"
            yield from context.decode(packets[number])
        fed = index + 1
    yield from context.decode(None)


def _read_images(paths: Sequence[Path]) -> Tensor:
    """``[M, H, W, 3]`` of image files."""
    images = {path: _read_image(path) for path in dict.fromkeys(paths)}
    _check_sizes(images)
    return torch.stack([images[path] for path in paths])


def _read_image(path: Path) -> Tensor:
    with opened_image(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image of 8 bits a number; whatever PIL finds wrong within is a `MediaError`."""
    check_file(path)
    try:
        # From memory: of a file, PIL would allocate what a damaged header says before it finds that there is not so much.
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            check_image(path, image)
            yield image
    except UnidentifiedImageError as error:
        raise MediaError(path, "it is not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"it can not be read as an image: {error}") from error


def check_image(path: str | os.PathLike[str], image: Image.Image) -> None:
    """What its header tells."""
    check_size(path, *image.size)
    if image.mode[0] in "IF":
        raise MediaError(path, f"its pixels have more than 8 bits (mode {image.mode})")


def check_size(path: str | os.PathLike[str], width: int, height: int) -> None:
    if max(width, height) > min(LARGEST_SIDE, LARGEST_RATIO * min(width, height)):
        limits = f"at most {LARGEST_SIDE} a side are read, and {LARGEST_RATIO} times the other side"
        raise MediaError(path, f"its frames are {width}x{height}; {limits}")


def _check_sizes(images: Mapping[Path, Tensor]) -> None:
    """Raise where images of one clip, by their files, differ in size; the text names the first that differs."""
    sizes = {path: f"{image.shape[1]}x{image.shape[0]}" for path, image in images.items()}
    first, *others = images
    for path in others:
        if sizes[path] != sizes[first]:
            raise MediaError(path, f"it is {sizes[path]}, but {first.name} of the same clip {sizes[first]}")

"""Batches of frames that DALI decodes: with a GPU's video and JPEG decoders, or on a processor.

Where what runs:

* Threads of this process read files. PyAV counts a container's packets, so that both backends mean the same frames, and reads
  sound and masks; bytes of videos and images are left as they are.
* DALI decodes them on the device, one batch ahead, and hands frames over where they lie.
* `frames_to_tensor` and `filterbanks`, which the other backend calls too, do the rest on the device: on a GPU on a stream of
  their own, next to the model's. DALI's operators would not give the same: its bicubic kernel is another one (4 grey levels on
  average on noise), RandAugment's operators are other ones, and its mel filters are not Kaldi's.

Sound is read by PyAV although DALI knows wav, flac and ogg: the samples are the same to the bit, DALI's decoder runs on the
processor as well, and it takes a file that was cut off for a short one. Where DALI fails, PyAV finds out which file it was and
what is wrong with it; damage that DALI's decoder covers up without failing is not told.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from .augment import frames_to_tensor
from .errors import MediaError
from .fbank import filterbanks
from .pipeline import SKIPPED, Dataset, Items
from .read import FILES, read_masks, read_mix
from .sample import Frames, Sample
from .torch_backend import _cores
from .video import opened, opened_image, quarters, read_frames, scan, uniform

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

CODECS = {"cpu": ("vp8", "vp9", "mjpeg"), "cuda": ("vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4")}
# Batches whose files are read before DALI gets them.
AHEAD = 2


class NotDecodedError(MediaError):
    """A file that PyAV can read, but not DALI on this device."""


class _Encoded(NamedTuple):
    """Frames as DALI takes them."""

    frames: Frames
    data: list[np.ndarray]  # uint8 [n]: the container, or an image for each frame
    size: tuple[int, int]  # height and width
    indices: np.ndarray | None = None  # int32 [M], of a container's frames
    turns: int = 0  # quarters that a container's frames are to be turned by


@dataclass
class _Clip:
    """What was read for an item; ``pictures`` are the video and the negatives, decoded (uint8 ``[M, H, W, 3]``) or not yet."""

    sample: Sample
    pictures: list[_Encoded | Tensor]
    waveform: Tensor
    mix: tuple[Tensor, Sequence[float]] | None
    masks: Tensor | None


@dataclass
class _Batch:
    indices: Sequence[int]
    futures: list[Future[_Clip]]
    skipped: dict[str, str]
    clips: list[_Clip] = field(default_factory=list)
    error: Exception | None = None


class DaliBackend:
    """The backend "dali", see `pipeline.Backend`. ``workers`` is the number of threads that read, and of those that decode."""

    def __init__(self, items: Items, *, batch_size: int, device: torch.device, workers: int | None = None) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._items, self._batch_size, self._device = items, batch_size, device
        self._workers = max(1, _cores() if workers is None else workers)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipelines: dict[str, Pipeline] = {}
        self._running: list[str] = []
        self._lent: list[Tensor] = []

    def run(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[dict[str, Any]]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="stgcma-media")
        submitted = (self._submit(pool, batch, epoch) for batch in batches)
        ahead = deque(islice(submitted, AHEAD))
        try:
            following = self._begin(ahead, submitted)
            while (batch := following) is not None:
                self._decode(batch, epoch)
                following = self._begin(ahead, submitted)
                yield self._finish(batch)
                self._wait()
        finally:
            pool.shutdown(cancel_futures=True)
            self._wait()
            if self._running:
                self.close()

    def close(self) -> None:
        """Free DALI's pipelines and their memory."""
        self._pipelines.clear()
        self._running.clear()

    def _submit(self, pool: ThreadPoolExecutor, indices: Sequence[int], epoch: int) -> _Batch:
        skipped: dict[str, str] = {}
        return _Batch(indices, [pool.submit(self._items.read, i, epoch, self._read, skipped) for i in indices], skipped)

    def _begin(self, ahead: deque[_Batch], submitted: Iterable[_Batch]) -> _Batch | None:
        """Let DALI decode the next batch, in threads of its own. What fails is raised when the batch's turn comes."""
        if not ahead:
            return None
        batch = ahead.popleft()
        ahead.extend(islice(submitted, 1))
        try:
            batch.clips = [future.result() for future in batch.futures]
        except Exception as error:
            batch.error = error
            return batch
        try:
            self._start(_encoded(batch.clips))
        except Exception:
            # `_decode` will find that nothing was started.
            self.close()
        return batch

    def _decode(self, batch: _Batch, epoch: int) -> None:
        """Put frames in the place of everything that is encoded."""
        if batch.error is not None:
            raise batch.error
        try:
            decoded = iter(self._outputs(_encoded(batch.clips)))
        except Exception:
            # DALI does not say which clip it was, and the pipeline is lost. One after the other, each item gets its own error.
            self.close()
            batch.clips = [self._items.read(i, epoch, self._read_alone, batch.skipped) for i in batch.indices]
            return
        for clip in batch.clips:
            clip.pictures = [next(decoded) if isinstance(picture, _Encoded) else picture for picture in clip.pictures]

    def _finish(self, batch: _Batch) -> dict[str, Any]:
        config = self._items.dataset.config
        with self._on_stream():
            rows = [self._row(clip) for clip in batch.clips]
            result = {key: self._send(value) for key, value in default_collate(rows).items()}
            mixes = [clip.mix and (self._send(clip.mix[0]), clip.mix[1]) for clip in batch.clips]
            result["audio"] = filterbanks([self._send(clip.waveform) for clip in batch.clips], config.audio, mixes)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for value in result.values():
                if isinstance(value, Tensor):
                    value.record_stream(current)
        return {**result, SKIPPED: batch.skipped}

    def _row(self, clip: _Clip) -> dict[str, Any]:
        """An item without its audio."""
        config, sample = self._items.dataset.config.video, clip.sample
        video, *negatives = map(self._send, clip.pictures)
        row = {"video": frames_to_tensor(video, config, sample.augmentation), **sample.target, **sample.meta, "id": sample.id}
        if clip.masks is not None:
            row["mask"] = clip.masks
        if negatives:
            row["negative"] = torch.cat([frames_to_tensor(frames, config) for frames in negatives])
        return row

    def _read(self, sample: Sample) -> _Clip:
        """What a thread reads of an item."""
        config = self._items.dataset.config
        video = _encode(sample.video, self._device)
        # Of another clip's container a single frame is wanted: not worth all its bytes.
        negatives = [
            read_frames(frames) if isinstance(frames.source, Path) else _encode(frames, self._device)
            for frames in sample.negatives
        ]
        waveform, mix = FILES.waveform(sample.audio, config.audio.sample_rate), read_mix(sample, config)
        size = video.size if isinstance(video, _Encoded) else video.shape[1:3]
        masks = read_masks(sample, config.video, size) if sample.masks else None
        return _Clip(sample, [video, *negatives], waveform, mix, masks)

    def _read_alone(self, sample: Sample) -> _Clip:
        """The same, and decoded by DALI on its own."""
        clip = self._read(sample)
        clip.pictures = [self.alone(picture) if isinstance(picture, _Encoded) else picture for picture in clip.pictures]
        return clip

    def alone(self, encoded: _Encoded) -> Tensor:
        """Decode frames on their own.

        Raises:
            MediaError: the file is broken.
            NotDecodedError: it is not, but DALI can not decode it.
        """
        try:
            self._start([encoded])
            return self._outputs([encoded])[0]
        except Exception as error:
            self.close()
            # Where a file is broken, this tells how.
            read_frames(encoded.frames)
            raise NotDecodedError(
                encoded.frames.name, f"DALI can not decode it on {self._device}, only backend='pyav' can ({_reason(error)})"
            ) from error

    def _start(self, encoded: Sequence[_Encoded]) -> None:
        for kind, clips in _by_kind(encoded).items():
            data = [data for clip in clips for data in clip.data]
            self._running.append(kind)
            pipeline = self._pipelines.get(kind)
            if pipeline is None or pipeline.max_batch_size < len(data):
                size = max(self._batch_size, len(data))
                pipeline = self._pipelines[kind] = build_pipeline(kind, self._device, size, self._workers)
            pipeline.feed_input("data", data)
            if kind == "video":
                pipeline.feed_input("frames", [clip.indices for clip in clips])
            pipeline.schedule_run()

    def _outputs(self, encoded: Sequence[_Encoded]) -> list[Tensor]:
        """What was started, uint8 ``[M, H, W, 3]`` each."""
        running, self._running = self._running, []
        images: dict[str, Iterator[Tensor]] = {}
        with self._on_stream():
            for kind in _by_kind(encoded):
                if kind not in running:
                    raise RuntimeError("DALI was not started")
                pipeline = self._pipelines[kind]
                (outputs,) = pipeline.share_outputs()
                # The memory is that of these tensors now, as DALI allocates it anew for each batch.
                tensors = [torch.from_dlpack(outputs[number]) for number in range(len(outputs))]
                pipeline.release_outputs()
                # It is DALI's again with the last reference, which must be there when a copy of it is made on our stream.
                self._lent += tensors
                images[kind] = iter(tensors)
            result = []
            for clip in encoded:
                if clip.indices is None:
                    frames = torch.stack(list(islice(images["image"], len(clip.data))))
                else:
                    frames = next(images["video"])
                result.append(frames.rot90(clip.turns, (1, 2)) if clip.turns else frames)
            return result

    def _on_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        """Give frames back to DALI, once the device has read them."""
        if self._stream is not None:
            self._stream.synchronize()
        self._lent.clear()

    def _send(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device != self._device:
            # Pinned, so that the copy does not keep this thread waiting.
            return value.pin_memory().to(self._device, non_blocking=True)
        return value


def build_pipeline(kind: str, device: torch.device, batch_size: int, threads: int) -> Pipeline:
    """DALI's graph: "data" uint8 [n] a sample, for "video" also "frames" int32 [M], become uint8 [M, H, W, 3] or [H, W, 3]."""
    from nvidia.dali import Pipeline, fn, types

    # Depth 1: a batch is started when the one before is handed over, and DALI decodes it meanwhile.
    pipeline = Pipeline(batch_size, threads, device.index if device.type == "cuda" else None, prefetch_queue_depth=1)
    decoder = "mixed" if device.type == "cuda" else "cpu"
    with pipeline:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        if kind == "video":
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            # "none": a frame that is not there is an error, by default it would be black.
            images = fn.decoders.video(data, frames=frames, device=decoder, pad_mode="none")
        else:
            images = fn.decoders.image(data, device=decoder, output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(images)
    return pipeline


def dali_refusals(dataset: Dataset, device: torch.device) -> list[str]:
    """Every reason why DALI cannot serve a data set on a device, as far as three of its clips tell."""
    if device.type not in CODECS:
        return [f"DALI decodes on {' and '.join(CODECS)}, got {device}"]
    if getattr(dataset, "media", FILES) is not FILES:
        return ["DALI reads the files of a data set, not shards"]
    reasons = []
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        reasons.append(f"DALI is not installed (pip install stgcma-fast[dali]): {error}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        reasons.append(f"there is no device {device}")
    backend = None if reasons else DaliBackend(Items(dataset), batch_size=1, device=device, workers=1)
    causes: dict[str, str] = {}
    for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
        try:
            encoded = _encode(dataset.sample(index).video, device)
            if backend and isinstance(encoded, _Encoded):
                backend.alone(encoded)
        except NotDecodedError as error:
            causes.setdefault(error.cause, error.path)
        except MediaError:
            # A broken file is told of when it is read.
            pass
    return [*reasons, *(f"{path}: {cause}" for cause, path in causes.items())]


def _encode(frames: Frames, device: torch.device) -> _Encoded | Tensor:
    """Frames for DALI; or, already decoded, those that DALI would number, show or accept otherwise.

    Raises:
        MediaError: a file is broken.
        NotDecodedError: DALI has no decoder for a container's video.
    """
    encoded = _container(frames, device) if isinstance(frames.source, Path) else _images(frames)
    return read_frames(frames) if encoded is None else encoded


def _container(frames: Frames, device: torch.device) -> _Encoded | None:
    with opened(frames.source) as (container, stream):
        codec, able = stream.codec_context.codec.canonical_name, CODECS[device.type]
        if codec not in able:
            place = "a GPU" if device.type == "cuda" else "a processor"
            raise NotDecodedError(frames.source, f"DALI does not decode {codec} on {place}, only {', '.join(able)}")
        track = scan(frames.source, container, stream)
        # DALI counts every packet from time 0 on, in the order of their times, whether it is shown or not.
        alike = track.timed and len(track.shown) == len(track.packets) and track.packets[track.shown[0]].pts >= 0
        # Where a damaged file says that something lies more than 2 GiB behind its end, as an AVI's parts can, DALI reads from
        # there and the process crashes. Of these two kinds of container none was found that leads it there.
        alike &= "mp4" in container.format.name or "matroska" in container.format.name
        indices = np.array(track.choose(frames.slots, frames.of), np.int32)
        turns = _turns(stream.codec_context, track.packets) if alike else None
        height, width = stream.codec_context.height, stream.codec_context.width
    if turns is None:
        return None
    size = (width, height) if turns % 2 else (height, width)
    return _Encoded(frames, [np.fromfile(frames.source, np.uint8)], size, indices, turns)


def _turns(context: av.VideoCodecContext, packets: Sequence[av.Packet]) -> int | None:
    """Quarters that frames are to be turned by. Only a decoded frame tells; None: none can be decoded."""
    context.thread_count = 1
    try:
        for packet in [*packets, None]:
            for frame in context.decode(packet):
                return quarters(frame)
    except av.FFmpegError:
        pass
    return None


def _images(frames: Frames) -> _Encoded | None:
    paths = [frames.source[index] for index in uniform(len(frames.source), frames.slots, frames.of)]
    sizes = set()
    for path in dict.fromkeys(paths):
        # DALI would allocate whatever a header says.
        with opened_image(path) as image:
            sizes.add(image.size)
    try:
        data = [np.fromfile(path, np.uint8) for path in paths]
    except OSError:
        return None
    # Of several sizes they do not become one tensor.
    if len(sizes) > 1 or not all(map(_whole, data)):
        return None
    width, height = sizes.pop()
    return _Encoded(frames, data, (height, width))


def _whole(image: np.ndarray) -> bool:
    """Whether it is a JPEG, or a PNG of 8 bits a number, that has its end: decoders fill up what is cut off."""
    start, end = image[:25].tobytes(), image[-12:].tobytes()
    if start.startswith(b"\xff\xd8\xff"):
        return end.endswith(b"\xff\xd9")
    return start.startswith(b"\x89PNG\r\n\x1a\n") and start[-1] == 8 and end[4:8] == b"IEND"


def _encoded(clips: Sequence[_Clip]) -> list[_Encoded]:
    return [picture for clip in clips for picture in clip.pictures if isinstance(picture, _Encoded)]


def _by_kind(encoded: Sequence[_Encoded]) -> dict[str, list[_Encoded]]:
    kinds: dict[str, list[_Encoded]] = {}
    for clip in encoded:
        kinds.setdefault("image" if clip.indices is None else "video", []).append(clip)
    return kinds


def _reason(error: Exception) -> str:
    """Of DALI's message, which begins with where the operator stands in this file, the line that says what happened."""
    lines = str(error).partition("encountered:")[2].split("\n") if "encountered:" in str(error) else str(error).split("\n")
    return next((line for line in lines if line.strip()), type(error).__name__)

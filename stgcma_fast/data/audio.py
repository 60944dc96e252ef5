"""Waveforms: the sound of a file or of a container's track, in one pass."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import av
import numpy as np
import torch
from torch import Tensor

from .errors import MediaError
from .fbank import WINDOW_MS, whole_samples
from .video import MISSING_SECONDS, check_file

PCM = 1
# A wav that was written into a pipe says that it has this much, or up to four GiB: nobody knew.
UNKNOWN_BYTES = 0x7FFFF000
# Of sound. What a damaged header says beyond them would make gigabytes of a second.
RATES = range(1000, 768001)
# Far beyond whole numbers of 32 bits that somebody calls floating point ones; energies of larger ones overflow.
LOUDEST = 2.0**40


def read_audio(path: str | os.PathLike[str], sample_rate: int = 16000) -> Tensor:
    """The best audio track of a file, whatever its name ends in.

    Its channels are averaged, then it is resampled. Whole numbers are divided by the largest, 32768 for those of 16 bits;
    decoders of lossy formats and files of floating point numbers may go beyond [-1, 1].

    A file that was cut off is found out where something says what is missing: the header of a wav or flac, the index of an
    mp4, the duration of a Matroska or WebM file (by a second). An mp3 or ogg just ends earlier.

    Args:
        path: an audio file or a container.
        sample_rate: in Hz.

    Returns:
        float32 ``[N]``, finite, of at least one frame of a filterbank (25 ms).

    Raises:
        MediaError: the file is not there or can not be read, has no audio track, is cut off or damaged, changes its format on
            the way, holds something that is no number or beyond all sound, or is too short; the text says which.
    """
    check_file(path)
    with _telling(path):
        samples, rate = _read_wav(path) or _decode(path)
        return _waveform(path, samples, rate, sample_rate)


def track_audio(
    path: str | os.PathLike[str], container: av.container.InputContainer, packets: Sequence[av.Packet], sample_rate: int
) -> Tensor:
    """What `read_audio` reads of a container, of one that is open.

    Args:
        path: what messages call it.
        container: whose packets these are.
        packets: all of them, as they lie in it.
        sample_rate: in Hz.
    """
    with _telling(path):
        return _waveform(path, *_decoded(path, container, _audio_stream(path, container), packets), sample_rate)


@contextmanager
def _telling(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever is found wrong within is a `MediaError`."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, f"it can not be read: {getattr(error, 'strerror', None) or error}") from error


def _read_wav(path: str | os.PathLike[str]) -> tuple[np.ndarray, int] | None:
    """``[C, N]`` and the rate of a wav of 16 bits, which needs no decoder: most data sets have such. None: a file for FFmpeg.

    FFmpeg takes the end of any wav for its proper end, so whether it is cut off is found out here.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return None
        form, start = b"", 0
        while len(head := file.read(8)) == 8:
            name, size, start = head[:4], int.from_bytes(head[4:], "little"), file.tell()
            if name == b"data":
                break
            if name == b"fmt ":
                form = file.read(16)
            file.seek(start + size + size % 2)
        else:
            raise MediaError(path, "it is cut off: a wav that ends before its samples")
        there = os.fstat(file.fileno()).st_size - start
        if there < size < UNKNOWN_BYTES:
            raise MediaError(path, f"it is cut off: it has {there} of the {size} bytes that its header says")
        tag, channels, rate, bits = (int.from_bytes(form[a:b], "little") for a, b in ((0, 2), (2, 4), (4, 8), (14, 16)))
        if (tag, bits) != (PCM, 16) or not channels or not rate or not 0 < size <= there:
            return None
        samples = np.fromfile(file, "<i2", size // (2 * channels) * channels)
    return samples.reshape(-1, channels).T, rate


def _decode(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """``[C, N]`` in the numbers of the decoder, and their rate."""
    # An absolute path can not be taken for a protocol, as "clip:1.wav" can.
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        stream = _audio_stream(path, container)
        # Of Matroska, all tracks tell how much there is.
        return _decoded(path, container, stream, container.demux(*(() if "matroska" in container.format.name else (stream,))))


def _audio_stream(path: str | os.PathLike[str], container: av.container.InputContainer) -> av.AudioStream:
    stream = container.streams.best("audio")
    if stream is None:
        if container.streams.audio:
            raise MediaError(path, "its audio track has no channels or no sample rate")
        kinds = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise MediaError(path, f"it has no audio track, only {kinds}")
    if stream.codec_context is None:
        raise MediaError(path, "there is no decoder for its audio track")
    return stream


def _decoded(
    path: str | os.PathLike[str],
    container: av.container.InputContainer,
    stream: av.AudioStream,
    packets: Iterable[av.Packet],
) -> tuple[np.ndarray, int]:
    """See `_decode`; ``packets`` are those of the container, of the stream at least, as they lie in it."""
    # An mp4's index says how much there should be, Matroska's duration of all its tracks, and a flac's number of samples.
    form, index = container.format.name, stream.index_entries
    if "mov" in form and index and index[-1].pos + index[-1].size > container.size:
        raise MediaError(path, f"it is cut off: it has {container.size} bytes, but its index says more")
    matroska = "matroska" in form
    seconds = (container.duration or 0) / av.time_base if matroska else 0.0
    promised = int(stream.duration or 0) if form == "flac" else 0
    ticks = [float(other.time_base or 0) for other in container.streams]
    decoded, end = [], 0.0
    for packet in packets:
        own = packet.stream_index == stream.index
        if packet.pts is not None and (own or matroska):
            end = max(end, (packet.pts + (packet.duration or 0)) * ticks[packet.stream_index])
        if not own:
            continue
        try:
            decoded += packet.decode()
        except av.FFmpegError as error:
            raise MediaError(path, f"its audio is damaged near {end:.2f} s: {error.strerror}") from error
    if end < seconds - MISSING_SECONDS:
        raise MediaError(path, f"it is cut off: its data ends after {end:.2f} s")
    if not decoded:
        raise MediaError(path, "its audio track has no samples")
    kinds = {(frame.sample_rate, frame.layout.name, frame.format.name) for frame in decoded}
    if len(kinds) > 1:
        raise MediaError(path, f"its audio changes on the way, between {' and '.join(map(str, sorted(kinds)))}")
    samples = _joined(decoded)
    if samples.shape[1] < promised:
        raise MediaError(path, f"it is cut off or damaged: {samples.shape[1]} of {promised} samples can be decoded")
    return samples, decoded[0].sample_rate


def _joined(frames: Sequence[av.AudioFrame]) -> np.ndarray:
    """``[C, N]`` of frames of one format: what their `to_ndarray` hold, in half of its time."""
    dtype, channels, packed = frames[0].to_ndarray().dtype, frames[0].layout.nb_channels, frames[0].format.is_packed
    # A plane may be longer than its samples.
    counts = [frame.samples * (channels if packed else 1) for frame in frames]
    rows = [
        np.concatenate([np.frombuffer(plane, dtype, count) for plane, count in zip(planes, counts, strict=True)])
        for planes in zip(*(frame.planes for frame in frames), strict=True)
    ]
    return rows[0].reshape(-1, channels).T if packed else np.stack(rows)


def _waveform(path: str | os.PathLike[str], samples: np.ndarray, rate: int, sample_rate: int) -> Tensor:
    """float32 ``[N]`` at the sample rate, of samples ``[C, M]`` in a decoder's numbers."""
    if rate not in RATES:
        raise MediaError(path, f"its sample rate is {rate} Hz, expected {RATES[0]} to {RATES[-1]} Hz")
    mono = _mono(samples)
    sound = mono.abs() < LOUDEST  # NaN is not
    if not bool(sound.all()):
        first = int(sound.int().argmin())
        raise MediaError(path, f"its sample {first} of {len(mono)} is {mono[first]:g}, expected finite numbers in [-1, 1]")
    if rate != sample_rate:
        mono = _resampled(mono, rate, sample_rate)
    least = whole_samples(WINDOW_MS, sample_rate)
    if len(mono) < least:
        raise MediaError(path, f"it has {len(mono)} samples at {sample_rate} Hz, expected at least {least} ({WINDOW_MS:g} ms)")
    return mono


def _mono(samples: np.ndarray) -> Tensor:
    """The mean of channels ``[C, N]`` in float32; whole numbers become fractions of the largest."""
    channels = torch.from_numpy(samples).float()
    if samples.dtype.kind != "f":
        limits = np.iinfo(samples.dtype)
        half = (limits.max - limits.min + 1) // 2
        channels = channels.sub_(limits.min + half).div_(half)
    return channels.mean(0)


def _resampled(mono: Tensor, rate: int, sample_rate: int) -> Tensor:
    frame = av.AudioFrame.from_ndarray(mono.numpy()[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
    blocks = [block.to_ndarray()[0] for block in (*resampler.resample(frame), *resampler.resample(None))]
    return torch.from_numpy(np.concatenate(blocks)) if blocks else mono[:0]

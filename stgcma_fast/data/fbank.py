"""Kaldi's filterbanks of many chunks at once, on the device they are on, and what the published pipelines make of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import AudioConfig

WINDOW_MS = 25.0
LOWEST_FREQUENCY = 20.0  # Hz
PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps  # of an energy, in every dtype
# Frames a processor does at once, so that they stay in its cache from one step to the next.
CPU_BLOCK = 512
# A filter spans few bins of the transform. In this many groups, each with the bins it spans, a fifth of the products are left.
CPU_GROUPS = 8


def whole_samples(milliseconds: float, sample_rate: int) -> int:
    """How many there are in a time, truncated: 4.4 ms at 16 kHz are 70, not 70.4."""
    # The order of the products is Kaldi's: another one rounds differently.
    return int(sample_rate * milliseconds * 0.001)


@torch.no_grad()
def kaldi_fbank(waveform: Tensor, *, sample_rate: int, num_mel_bins: int, frame_shift_ms: float) -> Tensor:
    """Log energies of mel filters, as Kaldi computes them: for every frame of 25 ms

    ``log(max(mel @ |rfft(hann * preemphasis(x - mean(x)))|^2, 2^-23))``

    with a transform of the next power of two. It equals ``torchaudio.compliance.kaldi.fbank`` with ``htk_compat=True,
    use_energy=False, window_type="hanning", dither=0.0``, on a processor to the rounding of the last two steps; where TF32
    is allowed, its product may differ by 1e-3. Autocast does not touch it, and it has no gradient.

    Args:
        waveform: ``[B, N]`` or ``[B, C, N]``, float32 or float64, of at least 25 ms.
        sample_rate: of it, in Hz.
        num_mel_bins: between 20 Hz and half the sample rate.
        frame_shift_ms: from a frame to the next, in milliseconds; truncated to samples.

    Returns:
        ``[B, F, num_mel_bins]`` or ``[B, C, F, num_mel_bins]``, dtype and device of the waveform;
        ``F = 1 + (N - window) // shift``, so that every frame lies in the waveform.

    Raises:
        ValueError: another shape or dtype, or a waveform of less than one frame.
    """
    if waveform.ndim not in (2, 3) or 0 in waveform.shape[:-1]:
        raise ValueError(f"waveform: got shape {list(waveform.shape)}, expected [B, N] or [B, C, N] with B, C > 0")
    if waveform.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"waveform: got {waveform.dtype}, expected torch.float32 or torch.float64")
    size, shift = whole_samples(WINDOW_MS, sample_rate), whole_samples(frame_shift_ms, sample_rate)
    if waveform.shape[-1] < size:
        raise ValueError(f"waveform: got {waveform.shape[-1]} samples, expected at least {size} ({WINDOW_MS:g} ms)")
    padded = 1 << (size - 1).bit_length()
    window, filters = _tables(sample_rate, size, padded, num_mel_bins, waveform.dtype, waveform.device)

    rows = waveform.flatten(0, -2)
    count = 1 + (rows.shape[1] - size) // shift
    block = max(1, CPU_BLOCK // count) if rows.device.type == "cpu" else len(rows)
    buffer = rows.new_zeros(min(block, len(rows)), count, padded)
    result = rows.new_empty(len(rows), count, num_mel_bins)
    for part, energies in zip(rows.split(block), result.split(block), strict=True):
        frames = part.unfold(-1, size, shift)
        centred = frames - frames.mean(-1, keepdim=True)
        # A frame's first sample is left out: the window is zero there.
        emphasised = buffer[: len(part), :, 1:size]
        torch.mul(centred[..., :-1], -PREEMPHASIS, out=emphasised)
        emphasised.add_(centred[..., 1:]).mul_(window[1:])
        squares = torch.view_as_real(torch.fft.rfft(buffer[: len(part)])).square_()
        power = (squares[..., 0] + squares[..., 1]).flatten(0, 1)
        for first, last, start, mel in filters:
            torch.mm(power[:, start : start + len(mel)], mel, out=energies.flatten(0, 1)[:, first:last])
    return result.clamp_(min=FLOOR).log_().unflatten(0, waveform.shape[:-1])


@lru_cache(maxsize=32)
def _tables(
    sample_rate: int, size: int, padded: int, num_mel_bins: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[tuple[int, int, int, Tensor]]]:
    """The window ``[size]`` and the filters: triangles, evenly spaced in mel.

    Filters come in groups: the first and the one behind the last, the lowest bin of the transform that one of them is not zero
    at, and the weights ``[bins, filters]`` from there. On a GPU one group is all of them, for there a launch costs more.
    """

    def mel(hertz: float) -> float:
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    lowest = mel(LOWEST_FREQUENCY)
    spacing = (mel(0.5 * sample_rate) - lowest) / (num_mel_bins + 1)
    # In float32 as published, whatever the waveform's dtype: its rounding shows where a filter's flank holds a single bin.
    number = torch.arange(num_mel_bins, dtype=torch.float32)
    left, centre, right = (lowest + (number + step) * spacing for step in (0.0, 1.0, 2.0))
    bins = torch.arange(padded // 2, dtype=torch.float32).unsqueeze(1) * (sample_rate / padded)
    bins = 1127.0 * (1.0 + bins / 700.0).log()
    filters = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0.0)
    # Nothing is taken from the last bin, half the sample rate.
    filters = F.pad(filters, (0, 0, 0, 1))
    step = -(-num_mel_bins // CPU_GROUPS) if device.type == "cpu" else num_mel_bins
    groups = []
    for first in range(0, num_mel_bins, step):
        group = filters[:, first : first + step]
        used = group.any(1).nonzero()
        start, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        groups.append((first, first + group.shape[1], start, group[start:end].to(device, dtype)))
    # Made on the processor, too: a copy waits until it is there, so that every stream may use what is cached.
    return torch.hann_window(size, periodic=False, dtype=dtype).to(device), groups


@torch.no_grad()
def filterbanks(
    waveforms: Sequence[Tensor],
    config: AudioConfig,
    mixes: Sequence[tuple[Tensor, Sequence[float]] | None] | None = None,
) -> Tensor:
    """The audio of a batch as the model reads it: normalised filterbanks of each clip's chunks.

    A waveform of more than ``config.margin`` samples is cut into chunks of ``config.window`` samples, which start at
    ``linspace(0, samples - margin, chunks)``, truncated; of a shorter one every chunk is the whole. Before, its mean is
    subtracted. With a mix, both waveforms lose their means, the second is cut or filled with zeros to the first's length,
    and ``lam * first + (1 - lam) * second`` loses its mean again, with a chunk's own lam. A filterbank x becomes
    ``(x - mean) / (2 * std)``; only then it gets rows of zeros up to ``config.frames`` frames. Later frames are not computed.

    Args:
        waveforms: one a clip, ``[N_i]``, float32 or float64 and on one device, at ``config.sample_rate``.
        config: chunks and filterbanks.
        mixes: for each clip a second waveform ``[M_i]`` and a lam for each chunk, or None; None: no clip is mixed.

    Returns:
        ``[B, chunks, frames, num_mel_bins]``, dtype and device of the waveforms.

    Raises:
        ValueError: no waveform, another shape or dtype, a waveform of less than one frame (25 ms), or another number of
            mixes or lams.
    """
    if not waveforms:
        raise ValueError("waveforms: got none, expected at least one")
    mixes = [None] * len(waveforms) if mixes is None else mixes
    if len(mixes) != len(waveforms):
        raise ValueError(f"mixes: got {len(mixes)}, expected one for each of {len(waveforms)} waveforms")
    shift = whole_samples(config.frame_shift_ms, config.sample_rate)
    longest = (config.frames - 1) * shift + whole_samples(WINDOW_MS, config.sample_rate)
    # Chunks of one length are done together, whatever clip they are of.
    groups: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, (waveform, mix) in enumerate(zip(waveforms, mixes, strict=True)):
        chunks = _chunks(waveform, mix, config, longest)
        groups[chunks.shape[1]].append((index, chunks))

    result = waveforms[0].new_zeros(len(waveforms), config.chunks, config.frames, config.num_mel_bins)
    for group in groups.values():
        energies = kaldi_fbank(
            torch.cat([chunks for _, chunks in group]),
            sample_rate=config.sample_rate,
            num_mel_bins=config.num_mel_bins,
            frame_shift_ms=config.frame_shift_ms,
        )
        energies = energies.sub_(config.mean).div_(2 * config.std)
        for (index, _), part in zip(group, energies.split([len(chunks) for _, chunks in group]), strict=True):
            result[index, :, : part.shape[1]] = part  # one row is every chunk's
    return result


def _chunks(waveform: Tensor, mix: tuple[Tensor, Sequence[float]] | None, config: AudioConfig, longest: int) -> Tensor:
    """``[chunks, n]``, each cut to the ``longest`` length that is looked at; ``[1, n]`` where all chunks are the same."""
    first = _centred(waveform)
    if len(first) > config.margin:
        starts = np.linspace(0, len(first) - config.margin, config.chunks).astype(int).tolist()
        length = min(config.window, longest)
    else:
        starts = [0] if mix is None else [0] * config.chunks
        length = min(len(first), longest)
    chunks = torch.stack([first[start : start + length] for start in starts])
    if mix is None:
        return chunks
    second, lams = _centred(mix[0])[: len(first)], mix[1]
    if len(lams) != config.chunks:
        raise ValueError(f"lams: got {len(lams)}, expected one for each of {config.chunks} chunks")
    # Both have the mean zero over the clip, and so has what is mixed of them: nothing is left to subtract from it.
    second = _centred(F.pad(second, (0, len(first) - len(second))))
    lam = torch.tensor(lams, dtype=first.dtype).to(first.device, non_blocking=True).unsqueeze(1)
    return lam * chunks + (1 - lam) * torch.stack([second[start : start + length] for start in starts])


def _centred(waveform: Tensor) -> Tensor:
    if waveform.ndim != 1 or not len(waveform) or not waveform.is_floating_point():
        raise ValueError(f"waveform: got {waveform.dtype} {list(waveform.shape)}, expected floating point numbers [N], N > 0")
    return waveform - waveform.mean()

"""Filterbanks equal torchaudio's, and those of a clip what the published pipelines compute, chunk by chunk."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchaudio.compliance import kaldi

from stgcma_fast import ClipConfig, SwinConfig
from stgcma_fast.data import fbank
from stgcma_fast.data.config import media_config
from stgcma_fast.data.fbank import filterbanks, kaldi_fbank

# As published: chunks, window, margin, mel bins, shift, frames, mean, deviation.
PUBLISHED = {
    "ave_clip": (10, 16000, 17600, 128, 10.0, 102, -4.1426, 3.2001),
    "ave_swin": (10, 16000, 17600, 224, 4.4, 224, -4.1426, 3.2001),
    "avs": (5, 31200, 32800, 224, 4.4, 224, -5.669627666473389, 3.948380470275879),
    "avqa": (10, 31200, 32800, 224, 4.4, 224, -5.214385986328125, 3.8699076175689697),
}
CONFIGS = {
    "ave_clip": media_config("ave", ClipConfig()).audio,
    "ave_swin": media_config("ave", SwinConfig()).audio,
    "avs": media_config("avs", SwinConfig()).audio,
    "avqa": media_config("avqa", SwinConfig()).audio,
}
each_setting = pytest.mark.parametrize(("bins", "shift"), [(128, 10.0), (224, 4.4)])
each_rate = pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
each_preset = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Chunks are small, and torchaudio is called for one at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def signal(samples, seed=0, dtype=torch.float32):
    """Noise that swells, a tone, a slow wave and an offset, in [-1, 1]: loud and quiet, smooth and rough."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples, dtype=torch.float64) / 16000
    noise = torch.randn(samples, generator=generator, dtype=torch.float64) * 0.1 * (torch.arange(samples) / samples) ** 2
    tone = 0.5 * torch.sin(2 * torch.pi * (300 + 200 * seed) * time)
    return (noise + tone + 0.2 * torch.sin(2 * torch.pi * time) + 0.05 * seed).clamp(-1, 1).to(dtype)


def torchaudio_fbank(waveform, rate, bins, shift):
    return kaldi.fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=bins,
        dither=0.0,
        frame_shift=shift,
    )


def assert_same(got, expected, unit=1.0):
    """1e-3 at most and 1e-4 on average, in units of a logarithm; ``unit`` says how large such a one is."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    difference = (got - expected).abs() / unit
    assert difference.max() < 1e-3
    assert difference.mean() < 1e-4


def published(name, first, second=None, lams=None, starts=None):
    """A clip's filterbanks one chunk after the other, each from the whole waveform."""
    chunks, window, margin, bins, shift, frames, mean, std = PUBLISHED[name]
    banks = []
    for chunk in range(chunks):
        waveform = first - first.mean()
        if second is not None:
            other = second - second.mean()
            other = other[: len(first)] if len(other) > len(first) else F.pad(other, (0, len(first) - len(other)))
            waveform = lams[chunk] * waveform + (1 - lams[chunk]) * other
            waveform = waveform - waveform.mean()
        if len(first) > margin:
            start = starts[chunk] if starts else int(np.linspace(0, len(first) - margin, chunks)[chunk])
            waveform = waveform[start : start + window]
        bank = (torchaudio_fbank(waveform, 16000.0, bins, shift) - mean) / (2 * std)
        banks.append(F.pad(bank, (0, 0, 0, max(0, frames - len(bank))))[:frames])
    return torch.stack(banks)


@each_setting
@each_rate
def test_kaldi_fbank(bins, shift, rate, poisoned_memory):
    samples = int(0.6 * rate)
    waveform = torch.stack([signal(samples, seed) for seed in range(4)])
    got = kaldi_fbank(waveform.view(2, 2, samples), sample_rate=rate, num_mel_bins=bins, frame_shift_ms=shift)
    expected = torch.stack([torchaudio_fbank(row, rate, bins, shift) for row in waveform]).unflatten(0, (2, 2))
    assert_same(got, expected)


@each_setting
def test_float64(bins, shift):
    waveform = signal(9000, dtype=torch.float64)
    got = kaldi_fbank(waveform[None], sample_rate=16000, num_mel_bins=bins, frame_shift_ms=shift)[0]
    torch.testing.assert_close(got, torchaudio_fbank(waveform, 16000.0, bins, shift), rtol=0, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 19, 40])
def test_rows(rows):
    """More rows than are done at once, and a last block that is not full."""
    waveform = torch.randn(rows, 16010)
    got = kaldi_fbank(waveform, sample_rate=16000, num_mel_bins=224, frame_shift_ms=4.4)
    assert got.shape == (rows, 224, 224)
    for row in {0, rows // 2, rows - 1}:
        assert_same(got[row], torchaudio_fbank(waveform[row], 16000.0, 224, 4.4))


def test_one_frame():
    options = {"sample_rate": 16000, "num_mel_bins": 128, "frame_shift_ms": 10.0}
    waveform = signal(400)[None]
    assert kaldi_fbank(waveform, **options).shape == (1, 1, 128)
    with pytest.raises(ValueError, match="got 399 samples, expected at least 400"):
        kaldi_fbank(waveform[:, 1:], **options)


def test_silence_is_the_floor():
    """So are the filters that are narrower than a bin of the spectrum: 16 of 224, one of 128."""
    silence, noise = torch.zeros(1, 800), torch.randn(1, 800)
    for bins, empty in ((224, 16), (128, 1)):
        options = {"sample_rate": 16000, "num_mel_bins": bins, "frame_shift_ms": 10.0}
        floor = torch.tensor(2.0**-23).log()
        assert (kaldi_fbank(silence, **options) == floor).all()
        assert (kaldi_fbank(noise, **options) == floor).all(1).sum() == empty


def test_strides_and_modes():
    """Any strides, under autocast, with a gradient asked for, after inference mode filled the tables: the same numbers."""
    fbank._tables.cache_clear()
    options = {"sample_rate": 16000, "num_mel_bins": 128, "frame_shift_ms": 10.0}
    waveform = torch.randn(2, 4000)
    with torch.inference_mode():
        expected = kaldi_fbank(waveform, **options)
    strided = torch.randn(4000, 3, 2).copy_(waveform.T[:, None].expand(-1, 3, -1)).permute(2, 1, 0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = kaldi_fbank(strided, **options)
    assert not got.requires_grad
    for channel in got.unbind(1):
        torch.testing.assert_close(channel, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(800), r"got shape \[800\], expected \[B, N\] or \[B, C, N\]"),
        (torch.zeros(1, 1, 1, 800), "got shape"),
        (torch.zeros(0, 800), r"got shape \[0, 800\], expected .* with B, C > 0"),
        (torch.zeros(1, 800, dtype=torch.int16), "got torch.int16, expected torch.float32 or torch.float64"),
        (torch.zeros(1, 800, dtype=torch.bfloat16), "got torch.bfloat16"),
    ],
)
def test_refusals(waveform, message):
    with pytest.raises(ValueError, match=message):
        kaldi_fbank(waveform, sample_rate=16000, num_mel_bins=128, frame_shift_ms=10.0)


@each_preset
def test_presets(name):
    """Clips of ten seconds, at the margin and next to it, of a part of a chunk, and of one frame."""
    config, margin = CONFIGS[name], PUBLISHED[name][2]
    waveforms = [signal(n, seed) for seed, n in enumerate((160000, margin, margin + 1, 9000, 400, 160000, margin - 1))]
    got = filterbanks(waveforms, config)
    assert_same(got, torch.stack([published(name, waveform) for waveform in waveforms]), 0.5 / config.std)
    torch.testing.assert_close(got[-2:], filterbanks(waveforms[-2:], config), rtol=0, atol=1e-4)


@each_preset
def test_mixes(name):
    """A second clip that is longer, shorter and as long; of a long first one and of a short one, next to a clip without."""
    config, margin = CONFIGS[name], PUBLISHED[name][2]
    lengths = [(120000, 130000), (120000, 50000), (120000, 120000), (120000, None), (9000, 12000), (9000, 3000), (9000, None)]
    assert margin > 9000
    lams = torch.distributions.Beta(10.0, 10.0).sample((len(lengths), config.chunks)).tolist()

    def ours_and_published(dtype):
        waveforms = [signal(first, seed, dtype) for seed, (first, _) in enumerate(lengths)]
        seconds = [None if second is None else signal(second, 7, dtype) for _, second in lengths]
        mixes = [None if second is None else (second, lam) for second, lam in zip(seconds, lams, strict=True)]
        banks = [published(name, *clip) for clip in zip(waveforms, seconds, lams, strict=True)]
        return filterbanks(waveforms, config, mixes), torch.stack(banks)

    got, exact = ours_and_published(torch.float64)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-8)
    # In float32 a quiet filter next to a loud tone holds little but rounding, with either way to mix.
    ours, theirs = ((bank - exact).abs() * 2 * config.std for bank in ours_and_published(torch.float32))
    assert ours.max() < 2 * theirs.max()
    assert ours.mean() < min(1e-4, 2 * theirs.mean())


def test_starts():
    """Of a clip of ten seconds for AVE."""
    starts = [0, 15822, 31644, 47466, 63288, 79111, 94933, 110755, 126577, 142400]
    waveform = signal(160000)
    got = filterbanks([waveform], CONFIGS["ave_clip"])
    assert_same(got[0], published("ave_clip", waveform, starts=starts), 0.5 / CONFIGS["ave_clip"].std)


def test_padding_after_normalisation():
    """98 frames of a chunk are followed by 4 rows of zeros, not of normalised ones."""
    got = filterbanks([signal(160000)], CONFIGS["ave_clip"])[0]
    assert (got[:, 98:] == 0).all()
    assert (got[:, 97] != 0).any(-1).all()


def test_one_call_of_what_is_kept(monkeypatch):
    """Clips of any length that have whole chunks are one batch, and what a cut would throw away is not in it."""
    shapes = []

    def spy(waveform, **options):
        shapes.append(tuple(waveform.shape))
        return kaldi_fbank(waveform, **options)

    monkeypatch.setattr(fbank, "kaldi_fbank", spy)
    filterbanks([signal(160000), signal(90000), signal(20000)], CONFIGS["avqa"])
    assert sorted(shapes) == [(1, 16010), (20, 16010)] or shapes == [(21, 16010)]


@pytest.mark.parametrize(
    ("waveforms", "mixes", "message"),
    [
        ([], None, "got none"),
        ([torch.zeros(1, 16000)], None, r"got torch.float32 \[1, 16000\]"),
        ([torch.zeros(0)], None, r"\[0\]"),
        ([torch.zeros(16000, dtype=torch.int16)], None, "got torch.int16"),
        ([torch.zeros(399)], None, "got 399 samples, expected at least 400"),
        ([torch.zeros(16000)], [], "mixes: got 0, expected one for each of 1"),
        ([torch.zeros(16000)], [(torch.zeros(16000), [0.5] * 9)], "lams: got 9, expected one for each of 10"),
    ],
)
def test_filterbanks_refusals(waveforms, mixes, message):
    with pytest.raises(ValueError, match=message):
        filterbanks(waveforms, CONFIGS["ave_clip"], mixes)


@pytest.mark.gpu
@each_preset
def test_gpu(name):
    """As exact as torchaudio on a processor, and the processor does not wait for the device."""
    config = CONFIGS[name]
    waveforms = [signal(n, seed) for seed, n in enumerate((160000, 90000, 9000))]
    mixes = [(waveforms[1], [0.3] * config.chunks), None, None]
    truth = filterbanks([w.double() for w in waveforms], config, [(waveforms[1].double(), mixes[0][1]), None, None])
    on_cpu = (filterbanks(waveforms, config, mixes) - truth).abs()
    waveforms = [waveform.cuda() for waveform in waveforms]
    mixes = [(waveforms[1], mixes[0][1]), None, None]
    got = filterbanks(waveforms, config, mixes)  # fills the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = filterbanks(waveforms, config, mixes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_gpu = (got.cpu() - truth).abs()
    assert on_gpu.max() <= 2 * on_cpu.max()
    assert on_gpu.mean() <= 2 * on_cpu.mean()

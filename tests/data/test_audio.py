"""A waveform is what was written, from any container and format; whatever is wrong with a file is said with its name."""

import os
import pickle
import struct
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from stgcma_fast.data.audio import read_audio
from stgcma_fast.data.errors import MediaError


def tone(samples=16000, rate=16000, frequency=440.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(samples) / rate)


def noise(samples, channels=1, seed=0):
    """int16 ``[channels, samples]``, the ends of its range included."""
    out = np.random.default_rng(seed).integers(-32768, 32768, (channels, samples)).astype(np.int16)
    out[:, :1], out[:, 1:2] = -32768, 32767
    return out


def write_wav(path, samples, rate=16000):
    """A wav of 16 bits from int16 ``[channels, samples]``, by Python's own writer."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.astype("<i2").tobytes())
    return path


def write_float_wav(path, samples, bits=32):
    """A mono wav of floating point numbers, byte by byte."""
    data = np.asarray(samples, f"<f{bits // 8}").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16000, 16000 * bits // 8, bits // 8, bits)
    body = b"WAVE" + b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def encode(path, samples, rate=16000, codec="flac", container=None):
    """Whatever FFmpeg writes, from ``[channels, samples]`` float or int16."""
    samples = np.ascontiguousarray(samples if samples.dtype == np.int16 else samples.astype(np.float32))
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples, format="s16p" if samples.dtype == np.int16 else "fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler, fifo = av.AudioResampler(stream.format, stream.layout, stream.rate), av.AudioFifo()
        for part in resampler.resample(frame) if samples.size else ():
            fifo.write(part)
        while part := fifo.read(stream.frame_size or 1024, partial=True):
            file.mux(stream.encode(part))
        file.mux(stream.encode())
    return path


def cut(path, part=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    return path


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_wav_is_exact(channels, tmp_path):
    samples = noise(16001, channels)
    got = read_audio(write_wav(tmp_path / "a.wav", samples))
    assert got.dtype == torch.float32
    if channels == 1:
        assert np.array_equal(got.numpy(), samples[0] / np.float32(32768))
    np.testing.assert_allclose(got.numpy(), (samples / 32768).mean(0), atol=1e-6)


def test_wav_with_other_chunks(tmp_path):
    """Before the samples and behind them, with an odd size; the name of the file says nothing."""
    samples = noise(800)
    content = write_wav(tmp_path / "a.wav", samples).read_bytes()
    extra = b"LIST" + struct.pack("<I", 5) + b"INFO!\0"
    (tmp_path / "b.mp4").write_bytes(content[:12] + extra + content[12:] + extra)
    assert np.array_equal(read_audio(tmp_path / "b.mp4").numpy(), samples[0] / np.float32(32768))


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_wav_of_unknown_length(size, tmp_path):
    """Written into a pipe, or by something that was stopped before it knew."""
    samples = noise(5000)
    content = write_wav(tmp_path / "a.wav", samples).read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:40] + struct.pack("<I", size) + content[44:])
    assert np.array_equal(read_audio(tmp_path / "a.wav").numpy(), samples[0] / np.float32(32768))


@pytest.mark.parametrize(
    ("ending", "codec", "step"),
    [
        ("wav", "pcm_u8", 2 / 255),
        ("wav", "pcm_s24le", 2**-22),
        ("wav", "pcm_s32le", 2**-22),
        ("wav", "pcm_f32le", 0),
        ("wav", "pcm_f64le", 0),
        ("flac", "flac", 2**-14),
        ("mkv", "pcm_s16be", 2**-14),
        ("aiff", "pcm_s16be", 2**-14),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_lossless(ending, codec, step, channels, tmp_path):
    samples = np.random.default_rng(1).uniform(-1, 1, (channels, 12345)).astype(np.float32)
    got = read_audio(encode(tmp_path / f"a.{ending}", samples, codec=codec))
    assert got.shape == (12345,)
    np.testing.assert_allclose(got.numpy(), samples.mean(0), atol=step + 1e-6)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mp3", "mp3"), ("m4a", "aac"), ("aac", "aac"), ("ogg", "libopus"), ("webm", "libopus")],
)
@pytest.mark.parametrize(("rate", "channels"), [(48000, 1), (48000, 2), (16000, 1)])
def test_lossy(ending, codec, rate, channels, tmp_path):
    """A tone comes back at its pitch and level (LAME takes 5 % off), whole; the right channel is silent."""
    samples = np.zeros((channels, rate))
    samples[0] = tone(rate, rate)
    got = read_audio(encode(tmp_path / f"a.{ending}", samples, rate, codec)).numpy()
    assert 16000 - 16 <= len(got) <= 16000 + 2 * 2048 * 16000 // rate
    middle = got[4000:12000]
    waves = np.exp(-2j * np.pi * 440 * np.arange(8000) / 16000)
    assert abs(2 * abs((middle * waves).mean()) - 0.5 / channels) < 0.03 / channels
    assert abs(np.sqrt(2 * (middle**2).mean()) - 0.5 / channels) < 0.03 / channels


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_resampled(rate, channels, tmp_path):
    samples = np.zeros((channels, rate))
    samples[-1] = tone(rate, rate)
    got = read_audio(write_wav(tmp_path / "a.wav", np.round(samples * 32767).astype(np.int16), rate)).numpy()
    assert abs(len(got) - 16000) <= 1
    np.testing.assert_allclose(got[500:-500], tone()[500 : len(got) - 500] / channels, atol=2e-3)


def test_other_rate(tmp_path):
    samples = np.round(tone() * 32767).astype(np.int16)[None]
    got = read_audio(write_wav(tmp_path / "a.wav", samples), sample_rate=8000).numpy()
    np.testing.assert_allclose(got[500:-500], tone(8000, 8000)[500:-500], atol=2e-3)


def test_track_of_a_video(make_video, tmp_path):
    path = make_video(tmp_path / "clip.mp4", frames=25, audio=tone()[None], audio_rate=16000)
    got = read_audio(path).numpy()
    assert 16000 <= len(got) <= 16000 + 2048
    np.testing.assert_allclose(got[2000:14000], tone()[2000:14000], atol=0.02)


@pytest.mark.parametrize("name", ["two words.wav", "ピアノ é.wav", "clip:1.wav", "100%d.wav", "-.wav"])
def test_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = np.random.default_rng(1).uniform(-1, 1, (1, 800)).astype(np.float32)
    encode(tmp_path / "a.wav", samples, codec="pcm_f32le").rename(tmp_path / name)
    assert np.array_equal(read_audio(name).numpy(), samples[0])


def test_shortest(tmp_path):
    """One window of a filterbank, at the rate that is asked for."""
    assert len(read_audio(write_wav(tmp_path / "a.wav", noise(400)))) == 400
    with pytest.raises(MediaError, match=r"a\.wav: it has 399 samples at 16000 Hz, expected at least 400 \(25 ms\)"):
        read_audio(write_wav(tmp_path / "a.wav", noise(399)))
    with pytest.raises(MediaError, match="at 48000 Hz, expected at least 1200"):
        read_audio(write_wav(tmp_path / "a.wav", noise(399)), sample_rate=48000)


def text(path):
    path.write_text("These are words, and nobody sings them.\n" * 100)


def folder(path):
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def no_samples(path):
    write_wav(path, noise(0))


def no_samples_float(path):
    write_float_wav(path, [])


def no_samples_flac(path):
    encode(path, noise(0), codec="flac", container="flac")


def header_only(path):
    path.write_bytes(write_wav(path, noise(800)).read_bytes()[:30])


def cut_wav(path):
    cut(write_wav(path, noise(800)))


def cut_float_wav(path):
    cut(write_float_wav(path, tone(800)))


def cut_flac(path):
    cut(encode(path, tone()[None], codec="flac", container="flac"))


def cut_webm(path):
    cut(encode(path, tone(160000)[None], codec="libopus", container="webm"))


def cut_m4a(path):
    cut(encode(path, tone()[None], codec="aac", container="mp4"))


def nan(path):
    write_float_wav(path, np.where(np.arange(800) == 17, np.nan, tone(800)))


def infinite(path):
    write_float_wav(path, np.where(np.arange(800) == 17, -np.inf, tone(800)))


def too_large(path):
    write_float_wav(path, np.where(np.arange(800) == 17, 1e300, tone(800)), bits=64)


def too_loud(path):
    """Finite in float32, but its energy is not."""
    write_float_wav(path, np.where(np.arange(800) == 17, 1e25, tone(800)))


def _wav_header(place, form, number):
    def make(path):
        content = bytearray(write_wav(path, noise(800)).read_bytes())
        struct.pack_into(form, content, place, number)
        path.write_bytes(content)

    return make


def damaged_flac(path):
    content = bytearray(encode(path, noise(32000), codec="flac", container="flac").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = bytes(5000)
    path.write_bytes(content)


def damaged_m4a(path):
    content = bytearray(encode(path, tone(32000)[None], codec="aac", container="mp4").read_bytes())
    start = content.index(b"mdat") + 2000
    content[start : start + 1000] = b"\xff" * 1000
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda path: None, "there is no such file"),
        (folder, "it is a folder"),
        (empty, r"it is empty \(0 bytes\)"),
        (text, "it can not be read: Invalid data"),
        (no_samples, "its audio track has no samples"),
        (no_samples_float, "its audio track has no samples"),
        (no_samples_flac, "its audio track has no samples"),
        (header_only, "it is cut off: a wav that ends before its samples"),
        (cut_wav, r"it is cut off: it has \d+ of the 1600 bytes that its header says"),
        (cut_float_wav, r"it is cut off: it has \d+ of the 3200 bytes that its header says"),
        (cut_flac, "its audio is damaged near|it is cut off"),
        (cut_webm, r"it is cut off: its data ends after \d+\.\d+ s"),
        (cut_m4a, "it can not be read: Invalid data"),
        (nan, "its sample 17 of 800 is nan, expected finite numbers"),
        (infinite, "its sample 17 of 800 is -inf"),
        (too_large, "its sample 17 of 800 is inf"),
        (too_loud, r"its sample 17 of 800 is 1e\+25, expected finite numbers"),
        # A rate of 1 Hz made gigabytes of a second, one of 2^31 an OverflowError.
        (_wav_header(24, "<I", 1), "its sample rate is 1 Hz, expected 1000 to 768000 Hz"),
        (_wav_header(24, "<I", 2**31), "its sample rate is 2147483648 Hz"),
        (_wav_header(24, "<I", 768000), "it has 0 samples at 16000 Hz, expected at least 400"),
        (_wav_header(22, "<H", 0), "its audio track has no channels or no sample rate"),
        (damaged_flac, r"it is cut off or damaged: \d+ of 32000 samples can be decoded"),
        (damaged_m4a, "its audio is damaged near"),
    ],
)
def test_what_is_wrong(make, cause, tmp_path):
    """The error names file and cause, comes out of a worker process, and leaves nothing open."""
    path = tmp_path / "broken.wav"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MediaError, match=cause) as caught:
        read_audio(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert caught.value.path == str(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value) == f"{path}: {caught.value.cause}"


def test_flac_cut_between_two_frames(tmp_path):
    """Every frame can be decoded, but its header says how many samples there should be."""
    path = encode(tmp_path / "a.flac", noise(16384), codec="flac")
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux() if packet.size]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - sizes[-1]])
    with pytest.raises(MediaError, match=r"it is cut off or damaged: \d+ of 16384 samples can be decoded"):
        read_audio(path)


def test_mp4_cut_behind_its_index(make_video, tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=50, audio=tone(32000)[None], container_options={"movflags": "faststart"})
    read_audio(path)
    with pytest.raises(MediaError, match=r"it is cut off: it has \d+ bytes, but its index says more"):
        read_audio(cut(path))


def test_no_audio_track(make_video, tmp_path):
    with pytest.raises(MediaError, match="it has no audio track, only video"):
        read_audio(make_video(tmp_path / "a.mp4", frames=2))


def test_other_format_on_the_way(tmp_path):
    """Two pieces of MPEG audio, one behind the other, of one channel and of two."""
    one = encode(tmp_path / "one.mp2", tone()[None], codec="mp2").read_bytes()
    two = encode(tmp_path / "two.mp2", np.stack([tone()] * 2), codec="mp2").read_bytes()
    (tmp_path / "both.mp2").write_bytes(one + two)
    with pytest.raises(MediaError, match=r"its audio changes on the way, between .*mono.* and .*stereo"):
        read_audio(tmp_path / "both.mp2")


@pytest.mark.parametrize("reader", ["builtins.open", "av.open"])
def test_no_permission(reader, tmp_path, monkeypatch):
    path = write_float_wav(tmp_path / "a.wav", tone(800))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reader, refuse)
    with pytest.raises(MediaError, match=r"a\.wav: it can not be read: Permission denied"):
        read_audio(path)

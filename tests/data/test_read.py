"""What is read of an item is what PyAV, torchaudio and numpy make of its files by hand; a broken file is named."""

import math
import wave
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

from stgcma_fast.config import BACKBONES
from stgcma_fast.data.audio import read_audio
from stgcma_fast.data.augment import draw
from stgcma_fast.data.config import IMAGE_MEAN, IMAGE_STD, media_config
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.read import FILES, read_mask, read_sample
from stgcma_fast.data.sample import Frames, Mix, Sample
from stgcma_fast.data.video import read_frames

RATE = 16000
# A grey level of the brightest channel, after normalisation.
LEVEL = 1 / 255 / min(IMAGE_STD)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are small here: threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_wav(path, seconds, seed):
    samples = np.random.default_rng(seed).integers(-8000, 8000, int(seconds * RATE)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return path


def waveform(path):
    with wave.open(str(path)) as file:
        return torch.from_numpy(np.frombuffer(file.readframes(-1), "<i2").astype(np.float32) / 32768)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, make_video):
    """Two videos of other sizes and lengths, a short sound and two longer ones."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        "wide": make_video(folder / "wide.mp4", frames=31, size=(320, 240)),
        "tall": make_video(folder / "tall.mp4", frames=17, size=(180, 300)),
        "long": write_wav(folder / "long.wav", 4.2, 1),
        "other": write_wav(folder / "other.wav", 3.0, 2),
        "short": write_wav(folder / "short.wav", 0.9, 3),
    }


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def chosen(images, slots, of):
    """``linspace(1, n, of)``, truncated, counted from 1."""
    return np.stack([images[int(np.linspace(1, len(images), of)[slot]) - 1] for slot in slots])


def normalised(images):
    """``[M, H, W, 3]`` of 0 to 255 to ``[M, 3, H, W]``."""
    return torch.from_numpy(((images / 255 - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)).permute(0, 3, 1, 2)


def resized(images, height, width, mode):
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    return torch.nn.functional.interpolate(planes, (height, width), mode=mode, align_corners=False).permute(0, 2, 3, 1).numpy()


def cropped(images, size):
    height, width = images.shape[1:3]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    images = resized(images, height, width, "bilinear").round()
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, top : top + size, left : left + size]


def banks(chunks, config):
    """Of each chunk by torchaudio; then normalised, then filled or cut."""
    rows = []
    for chunk in chunks:
        bank = torchaudio.compliance.kaldi.fbank(
            chunk[None],
            htk_compat=True,
            sample_frequency=RATE,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=config.num_mel_bins,
            dither=0.0,
            frame_shift=config.frame_shift_ms,
        )
        bank = ((bank - config.mean) / (2 * config.std))[: config.frames]
        rows.append(torch.nn.functional.pad(bank, (0, 0, 0, config.frames - len(bank))))
    return torch.stack(rows)


def cut(samples, config):
    if len(samples) <= config.margin:
        return [samples] * config.chunks
    starts = np.linspace(0, len(samples) - config.margin, config.chunks).astype(int)
    return [samples[start : start + config.window] for start in starts]


def close(a, b, atol):
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(("arch", "sound"), [("swin_l", "long"), ("clip_b16", "short")])
def test_ave(arch, sound, clips):
    config = media_config("ave", BACKBONES[arch])
    label = torch.eye(29)[:10]
    item = read_sample(Sample("x", Frames(clips["wide"], tuple(range(10)), 10), clips[sound], {"label": label}), config)
    assert item.keys() == {"video", "audio", "label"}
    assert torch.equal(item["label"], label)
    assert item["video"].shape == (3, 10, 224, 224)
    frames = chosen(decoded(clips["wide"]), range(10), 10)
    close(item["video"], normalised(cropped(frames, 224)).transpose(0, 1), 1.01 * LEVEL)
    samples = waveform(clips[sound])
    assert item["audio"].shape == ((10, 102, 128) if arch == "clip_b16" else (10, 224, 224))
    close(item["audio"], banks(cut(samples - samples.mean(), config.audio), config.audio), 1e-4)


def test_ave_mixed(clips):
    """Both lose their means, the second is filled with zeros, each chunk has its lam, and the label stays."""
    config = media_config("ave", BACKBONES["swin_l"])
    lams = tuple(np.linspace(0.2, 0.7, 10).tolist())
    label = torch.rand(10, 29)
    frames = Frames(clips["wide"], tuple(range(10)), 10)
    item = read_sample(Sample("x", frames, clips["long"], {"label": label}, mix=Mix(clips["other"], lams)), config)
    first, second = waveform(clips["long"]), waveform(clips["other"])
    first = first - first.mean()
    second = torch.nn.functional.pad(second - second.mean(), (0, len(first) - len(second)))
    chunks = []
    for number, lam in enumerate(lams):
        mixed = lam * first + (1 - lam) * second
        chunks.append(cut(mixed - mixed.mean(), config.audio)[number])
    close(item["audio"], banks(chunks, config.audio), 1e-4)
    assert torch.equal(item["label"], label)


def test_augmentation_is_that_of_the_sample(clips):
    config = media_config("ave", BACKBONES["clip_b16"], num_frames=2)
    frames = Frames(clips["tall"], (0, 1), 2)

    def video(seed):
        augmentation = None if seed is None else draw(torch.Generator().manual_seed(seed))
        return read_sample(Sample("x", frames, clips["long"], augmentation=augmentation), config)["video"]

    assert torch.equal(video(1), video(1))
    assert not torch.equal(video(1), video(2))
    assert not torch.equal(video(1), video(None))


def test_avqa(clips):
    """Frames squashed without antialiasing; each negative its own clip's frame, whatever that one's size is."""
    config = media_config("avqa", BACKBONES["swin_l"])
    places = [0, 59, 3, 30, 31, 12, 5, 58, 40, 40]
    target = {"question": torch.arange(14), "label": torch.tensor(41)}
    sample = Sample(
        "x",
        Frames(clips["wide"], tuple(range(10)), 10),
        clips["long"],
        target,
        {"type": "Audio"},
        negatives=tuple(Frames(clips["tall"], (place,), 60) for place in places),
    )
    item = read_sample(sample, config)
    assert item.keys() == {"video", "audio", "negative", "question", "label"}
    frames = chosen(decoded(clips["wide"]), range(10), 10)
    close(item["video"], normalised(resized(frames, 224, 224, "bicubic")), 1e-4)
    others = chosen(decoded(clips["tall"]), places, 60)
    close(item["negative"], normalised(resized(others, 224, 224, "bicubic")), 1e-4)
    samples = waveform(clips["long"])
    close(item["audio"], banks(cut(samples - samples.mean(), config.audio), config.audio), 1e-4)
    assert all(torch.equal(item[key], value) for key, value in target.items())


@pytest.fixture
def avs(tmp_path, clips):
    """Five images and masks of a clip: white where x < 10 * number, grey of 127 or less elsewhere."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (224, 224, 3), np.uint8) for _ in range(5)]
    masks = []
    for number, image in enumerate(images, 1):
        mask = np.full((224, 224), 127, np.uint8)
        mask[:, : 10 * number] = 128 if number % 2 else 255
        masks.append(mask)
        Image.fromarray(image).save(tmp_path / f"x_{number}.png")
        Image.fromarray(mask).save(tmp_path / f"mask_{number}.png")
    paths = [tuple(tmp_path / f"{kind}_{number}.png" for number in range(1, 6)) for kind in ("x", "mask")]
    return np.stack(images), np.stack(masks), Sample("x", Frames(paths[0], tuple(range(5)), 5), clips["long"], masks=paths[1])


@pytest.mark.parametrize("count", [1, 5])
def test_avs(avs, count):
    images, masks, sample = avs
    config = media_config("avs", BACKBONES["swin_l"])
    item = read_sample(replace(sample, masks=sample.masks[:count]), config)
    assert item.keys() == {"video", "audio", "mask"}
    close(item["video"], normalised(images), 1e-5)
    assert torch.equal(item["mask"], torch.from_numpy(masks > 127)[:count, None].float())
    samples = waveform(sample.audio)
    assert item["audio"].shape == (5, 224, 224)
    close(item["audio"], banks(cut(samples - samples.mean(), config.audio), config.audio), 1e-4)


def test_masks_are_cut_like_their_frames(tmp_path, avs):
    """Of 448x336 the middle 336x336 becomes 224x224: a mask's edge lies where the frame's does."""
    _, _, sample = avs
    config = media_config("avs", BACKBONES["swin_l"])
    edge = np.arange(448) >= 56 + 1.5 * 100
    image = np.broadcast_to(edge[None, :, None] * np.uint8(255), (336, 448, 3))
    for paths in (sample.video.source, sample.masks):
        for path in paths:
            Image.fromarray(np.ascontiguousarray(image)).save(path)
    item = read_sample(sample, config)
    assert item["mask"].shape == (5, 1, 224, 224)
    assert item["mask"].unique().tolist() == [0, 1]
    assert torch.equal(item["mask"][0, 0, 0], torch.arange(224).ge(100).float())
    white = (1 - IMAGE_MEAN[0]) / IMAGE_STD[0]
    assert torch.equal(item["video"][:, 0] > white / 2, item["mask"][:, 0].bool())


def test_kinds_of_masks(tmp_path):
    grey = np.array([[0, 1, 127, 128, 255]], np.uint8)
    on = {
        "L": [False, False, False, True, True],
        "LA": [False, False, False, True, True],
        "1": [False, False, False, True, True],
        "P": [False, True, True, True, True],
        "RGB": [False, False, False, True, True],
        "RGBA": [False, False, False, True, True],
    }
    palette = Image.fromarray(grey, "P")
    palette.putpalette([value for index in range(256) for value in ((0, 0, 0) if index == 0 else (0, 0, 1 + index // 2))])
    images = {"P": palette, "1": Image.fromarray(grey > 127)}
    for mode, expected in on.items():
        path = tmp_path / f"{mode}.png"
        (images.get(mode) or Image.fromarray(grey).convert(mode)).save(path)
        assert Image.open(path).mode == mode
        assert read_mask(path).tolist() == [expected], mode
    Image.fromarray(np.array([[[0, 0, 0], [1, 0, 0], [0, 0, 90]]], np.uint8)).save(tmp_path / "colour.png")
    assert read_mask(tmp_path / "colour.png").tolist() == [[False, True, True]]


def test_a_mask_of_zeros_and_ones_is_no_empty_one(tmp_path):
    """It was taken for one of shades of grey, all of them too dark."""
    Image.fromarray(np.array([[0, 1, 1]], np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"a\.png: its brightest grey is 1, expected 0 for no mask, or more than 127"):
        read_mask(tmp_path / "a.png")
    Image.fromarray(np.zeros((1, 3), np.uint8)).save(tmp_path / "b.png")
    assert not read_mask(tmp_path / "b.png").any()


BREAKS = {
    "size": (
        lambda s: Image.new("L", (112, 224)).save(s.masks[3]),
        "mask_4.png: the mask is 112x224, but its frames are 224x224",
    ),
    "missing": (lambda s: s.masks[2].unlink(), "mask_3.png: there is no such file"),
    "empty": (lambda s: s.masks[0].write_bytes(b""), "mask_1.png: it is empty"),
    "text": (lambda s: s.masks[0].write_text("no image"), "mask_1.png: it is not an image"),
    "truncated": (
        lambda s: s.masks[1].write_bytes(s.masks[1].read_bytes()[:-60]),
        "mask_2.png: it can not be read as an image",
    ),
    "deep": (
        lambda s: Image.fromarray(np.zeros((224, 224), np.uint16)).save(s.masks[0]),
        "mask_1.png: its pixels have more than 8 bits",
    ),
    "frame": (lambda s: s.video.source[4].unlink(), "x_5.png: there is no such file"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_named(avs, name):
    _, _, sample = avs
    change, text = BREAKS[name]
    change(sample)
    with pytest.raises(MediaError, match=text):
        read_sample(sample, media_config("avs", BACKBONES["swin_l"]))


def test_number_of_masks(avs):
    _, _, sample = avs
    with pytest.raises(MediaError, match="got 3 masks of x, expected 1 or 5"):
        read_sample(replace(sample, masks=sample.masks[:3]), media_config("avs", BACKBONES["swin_l"]))


def test_sound_and_second_sound_that_are_broken(clips, tmp_path):
    config = media_config("ave", BACKBONES["swin_l"])
    frames = Frames(clips["wide"], tuple(range(10)), 10)
    with pytest.raises(MediaError, match=r"wide.mp4: it has no audio track"):
        read_sample(Sample("x", frames, clips["wide"]), config)
    mix = Mix(tmp_path / "gone.wav", (0.5,) * 10)
    with pytest.raises(MediaError, match=r"gone.wav: there is no such file"):
        read_sample(Sample("x", frames, clips["long"], mix=mix), config)
    assert math.isfinite(read_sample(Sample("x", frames, clips["short"]), config)["audio"].sum())


@pytest.mark.parametrize(
    ("ending", "video", "sound", "rate"),
    [
        ("mp4", "libx264", "aac", 44100),
        ("mkv", "libx264", "flac", 16000),
        ("webm", "libvpx-vp9", "libopus", 48000),
        ("avi", "mpeg4", "pcm_s16le", 22050),
        ("ts", "libx264", "mp2", 32000),
    ],
)
def test_a_container_is_opened_once(ending, video, sound, rate, tmp_path, make_video, monkeypatch):
    """For frames and sound together, which are those that each gives alone."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2 * rate))
    path = make_video(tmp_path / f"clip.{ending}", frames=40, codec=video, audio=noise, audio_codec=sound, audio_rate=rate)
    frames = Frames(path, (0, 2, 3, 9), 10)
    alone = read_frames(frames), read_audio(path, RATE)
    opened, open_it = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: (opened.append(args), open_it(*args, **options))[1])
    together = FILES.clip(frames, path, RATE)
    assert len(opened) == 1
    assert len(together[1]) > RATE
    assert all(map(torch.equal, together, alone))


def test_a_container_without_one_of_its_tracks(tmp_path, make_video):
    """Each is told as it is when it is read alone."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, RATE))
    silent = make_video(tmp_path / "silent.mp4", frames=12)
    blind = tmp_path / "blind.mp4"
    whole = make_video(tmp_path / "whole.mp4", frames=12, audio=noise)
    with av.open(str(whole)) as source, av.open(str(blind), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    config = media_config("ave", BACKBONES["swin_l"])
    for path, cause in ((silent, "it has no audio track, only video"), (blind, "it has no video track, only audio")):
        with pytest.raises(MediaError) as caught:
            read_sample(Sample("x", Frames(path, tuple(range(10)), 10), path), config)
        assert (caught.value.path, caught.value.cause) == (str(path), cause)

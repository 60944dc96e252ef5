"""DALI makes the batches that PyAV makes, names what is broken, goes on where it was left, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import struct
import threading
import wave
import weakref
import zlib
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace
from PIL import Image

from stgcma_fast.data import dali
from stgcma_fast.data.augment import draw, frames_to_tensor
from stgcma_fast.data.config import IMAGE_STD, AudioConfig, MediaConfig, VideoConfig
from stgcma_fast.data.dali import DaliBackend, build_pipeline, dali_refusals
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.pipeline import SKIPPED, AVPipeline, Items
from stgcma_fast.data.sample import Frames, Mix, Sample
from stgcma_fast.data.torch_backend import TorchBackend
from stgcma_fast.data.video import read_frames

dali_library = pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")
T, SIDE = 4, 32
# Fast to write: what the encoders make of the clips is of no concern.
QUICK = {"deadline": "realtime", "cpu-used": "8"}
CODECS = {
    "vp9.webm": ("libvpx-vp9", "yuv420p", QUICK),
    "vp9.mp4": ("libvpx-vp9", "yuv420p", QUICK),
    "hidden.webm": ("libvpx-vp9", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "5"}),
    "vp8.webm": ("libvpx", "yuv420p", QUICK),
    "mjpeg.mp4": ("mjpeg", "yuvj420p", None),
    "mjpeg.mkv": ("mjpeg", "yuvj422p", None),
}


def config(task="ave", resize="crop", layout="CTHW"):
    audio = AudioConfig(chunks=T, window=3200, margin=4000, num_mel_bins=16, frame_shift_ms=10, frames=20, mean=-4.0, std=3.0)
    return MediaConfig(task, audio, VideoConfig(T, SIDE, resize, layout))


class Clips:
    """A data set of the samples that it is given."""

    root, split = Path("clips"), "train"

    def __init__(self, samples, config):
        self.samples, self.config = samples, config

    def __len__(self):
        return len(self.samples)

    def sample(self, index, epoch=0):
        return self.samples[index]


def picture(number, width, height):
    """uint8 ``[H, W, 3]``: its number in eight columns, dark or light, of a colour that grows from corner to corner."""
    light = 60 + 110 * (number >> np.arange(width) * 8 // width & 1)
    x, y = np.arange(width) / width, np.arange(height)[:, None] / height
    tint = np.stack([60 * x + 0 * y, 60 * y + 0 * x, 30 * (x + y)], 2)
    return (light[None, :, None] + tint).astype(np.uint8)


def number_of(image):
    columns = np.array_split(np.asarray(image, np.float32).mean((0, 2)), 8)
    return sum(int(column[len(column) // 4 : -(len(column) // 4)].mean() > 140) << bit for bit, column in enumerate(columns))


def pictures(count, size, first=0):
    return [picture(first + number, *size) for number in range(count)]


def write_wav(path, seed, seconds=0.6, rate=16000, channels=1):
    samples = np.random.default_rng(seed).integers(-9000, 9000, (int(seconds * rate), channels), dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def empty_png(width, height):
    """A header, and hardly any pixels behind it."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(9)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts.items()
    )


def write_images(folder, images, ending="jpg"):
    folder.mkdir(parents=True)
    paths = [folder / f"{number:04d}.{ending}" for number in range(1, len(images) + 1)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return tuple(paths)


def whole(source, count=T):
    return Frames(source, tuple(range(count)), count)


def backend(dataset, on_error="raise", device=CPU, batch_size=3, workers=2):
    return DaliBackend(Items(dataset, on_error, seed=5), batch_size=batch_size, device=device, workers=workers)


def run(dataset, batches, **options):
    made = backend(dataset, **options)
    try:
        return list(made.run(batches, 0))
    finally:
        made.close()


def reference(dataset, batches, on_error="raise"):
    """The batches of the other backend."""
    return list(TorchBackend(Items(dataset, on_error, seed=5), batch_size=3, device=CPU, workers=0).run(batches, 0))


def assert_alike(batch, expected, levels=2.0):
    """Equal, but for pictures that may differ by so many grey levels on average."""
    assert batch.keys() == expected.keys()
    for key, value in batch.items():
        other = expected[key]
        if not isinstance(value, torch.Tensor):
            assert value == other, key
            continue
        value = value.cpu()
        assert (value.shape, value.dtype) == (other.shape, other.dtype), key
        if key in ("video", "negative"):
            assert value.isfinite().all()
            difference = (value - other).abs().mean() * 255 * np.mean(IMAGE_STD)
            assert difference <= levels, (key, difference)
        else:
            assert torch.allclose(value, other, rtol=0, atol=1e-3 if key == "audio" else 0), key


def assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for key, value in batch.items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key


@pytest.fixture(scope="module")
def containers(tmp_path_factory, make_video):
    """A clip of each codec, of many sizes, each with a wav beside it."""
    folder = tmp_path_factory.mktemp("containers")
    paths = {}
    for place, (name, (codec, pixels, options)) in enumerate(CODECS.items()):
        size = [(64, 48), (48, 80), (96, 64), (66, 50)][place % 4]
        paths[name] = make_video(folder / name, pictures(23, size), codec=codec, pixels=pixels, options=options, fps=5)
        write_wav((folder / name).with_suffix(f"{paths[name].suffix}.wav"), place)
    return paths


@pytest.fixture(scope="module")
def ave(containers):
    """Clips of AVE in containers, without draws."""
    samples = [
        Sample(
            name,
            whole(path),
            path.with_suffix(f"{path.suffix}.wav"),
            {"label": torch.full((T, 5), float(place))},
            {"kind": name},
        )
        for place, (name, path) in enumerate(containers.items())
    ]
    return Clips(samples, config())


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_that_pyav_decodes(containers, name):
    """The right ones, by their numbers, and within two grey levels of FFmpeg's on average."""
    path = containers[name]
    frames = Frames(path, (0, 2, 3, 6, 6), 7)
    encoded = dali._encode(frames, CPU)
    assert isinstance(encoded, dali._Encoded), "PyAV decoded them, not DALI"
    images = backend(None).alone(encoded).numpy()
    wanted = [int(place) - 1 for place in np.linspace(1, 23, 7)[[0, 2, 3, 6, 6]]]
    assert [number_of(image) for image in images] == wanted
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = np.stack([decoded[number] for number in wanted])
    assert images.dtype == np.uint8
    assert np.abs(images.astype(float) - expected).mean() < 2


def test_batches_are_those_of_the_other_backend(ave):
    """Clips of several codecs and sizes in a batch, words and labels with them, and a smaller last batch."""
    batches = [[0, 1, 2], [5, 4, 3], [1, 1]]
    made = run(ave, batches)
    assert [batch["id"] for batch in made] == [[[*CODECS][i] for i in batch] for batch in batches]
    for batch, expected in zip(made, reference(ave, batches), strict=True):
        assert_alike(batch, expected)
    assert made[0]["video"].shape == (3, 3, T, SIDE, SIDE)


@pytest.mark.parametrize(("resize", "layout"), [("crop", "TCHW"), ("squash", "TCHW"), ("squash", "CTHW")])
def test_sizes_and_layouts(ave, resize, layout):
    dataset = Clips(ave.samples, config(resize=resize, layout=layout))
    assert_alike(run(dataset, [[0, 1, 4]])[0], reference(dataset, [[0, 1, 4]])[0])


def test_training_draws_and_mixed_audio(ave, tmp_path):
    """A clip's draws do to DALI's frames what they do to PyAV's; of images, which both decode alike, nearly to the bit."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for place, old in enumerate([ave.samples[0], ave.samples[4], *ave.samples[:4]]):
        images = write_images(tmp_path / str(place), pictures(9, (50 + 3 * place, 64)))
        mix = Mix(ave.samples[place % 3].audio, (0.3, 0.5, 0.6, 0.9)) if place % 2 else None
        samples.append(Sample(str(place), whole(images), old.audio, augmentation=draw(generator), mix=mix))
    assert any(sample.augmentation.operators for sample in samples)
    assert any(sample.augmentation.erase for sample in samples)
    dataset = Clips(samples, config())
    batches = [[0, 1, 2], [3, 4, 5]]
    for batch, expected in zip(run(dataset, batches), reference(dataset, batches), strict=True):
        assert_alike(batch, expected, levels=0.02)
    for place, clip in enumerate(run(dataset, [[1, 4]])[0]["video"]):
        sample = samples[[1, 4][place]]
        chosen = [sample.video.source[int(at) - 1] for at in np.linspace(1, 9, T)]
        images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in chosen]))
        assert torch.allclose(clip, frames_to_tensor(images, dataset.config.video, sample.augmentation), atol=0.02)


@pytest.mark.parametrize("tag", [Colorspace.ITU709, Colorspace.ITU601, Colorspace.BT2020])
def test_a_colour_tag_changes_nothing(tmp_path, tag):
    """PyAV's frames of clips tagged BT.709, as those of high resolution are, were 8 grey levels away from DALI's."""
    x, y = np.linspace(20, 235, 128), np.linspace(20, 235, 96)[:, None]
    image = np.stack([x + 0 * y, y + 0 * x, 255 - (x + y) / 2], 2).astype(np.uint8)
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        video = container.add_stream("libvpx-vp9", rate=5, options=QUICK)
        video.height, video.width = image.shape[:2]
        video.codec_context.colorspace = tag
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p", dst_colorspace=tag)
        for frame.pts in range(T):
            container.mux(video.encode(frame))
        container.mux(video.encode())
    frames = whole(tmp_path / "a.webm")
    difference = backend(None).alone(dali._encode(frames, CPU)).float() - read_frames(frames)
    assert difference.abs().mean() < 2


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_images_of_all_kinds(tmp_path, ending):
    """Grey, with a palette, an alpha channel (which is lost), progressive, subsampled or not: what Pillow makes of them."""
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    kinds = [("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0})]
    if ending == "png":
        kinds = [("RGB", {}), ("L", {}), ("P", {}), ("RGBA", {}), ("LA", {}), ("1", {})]
    for number, (mode, options) in enumerate(kinds):
        path = tmp_path / f"{number}.{ending}"
        picture = Image.fromarray(image).convert(mode)
        if mode == "RGBA":
            picture.putalpha(Image.fromarray(image[..., 0]))
        picture.save(path, **options)
        encoded = dali._encode(Frames((path,), (0,), 1), CPU)
        images = backend(None).alone(encoded) if isinstance(encoded, dali._Encoded) else encoded
        assert np.array_equal(images[0], np.asarray(Image.open(path).convert("RGB"))), (mode, options)


def test_images_are_not_turned(tmp_path):
    """A camera's note in a JPEG changes nothing, as with the other backend."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(3, 40, 30)).save(tmp_path / "1.jpg", exif=exif)
    frames = Frames((tmp_path / "1.jpg",), (0,), 1)
    assert backend(None).alone(dali._encode(frames, CPU)).shape == (1, 30, 40, 3)


def test_folders_of_pngs_with_masks(tmp_path):
    samples = []
    for place in range(2):
        size = (40 + 8 * place, 36)
        images = write_images(tmp_path / f"frames{place}", pictures(T, size), "png")
        masks = write_images(
            tmp_path / f"masks{place}", [255 * (image[..., 0] > 150).astype(np.uint8) for image in pictures(T, size)], "png"
        )
        samples.append(Sample(str(place), whole(images), write_wav(tmp_path / f"{place}.wav", place), masks=masks))
    dataset = Clips(samples, config("avs", layout="TCHW"))
    (batch,), (expected,) = run(dataset, [[0, 1]]), reference(dataset, [[0, 1]])
    assert_alike(batch, expected, levels=0.01)
    assert batch["mask"].shape == (2, T, 1, SIDE, SIDE)
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("where", ["folders", "containers"])
def test_negatives(tmp_path, containers, where):
    """Single frames of other clips, in folders of images or in containers, of any size."""
    others = [*containers.values()]
    if where == "folders":
        others = [write_images(tmp_path / str(n), pictures(20, (40 + 8 * n, 48), 10 * n)) for n in range(3)]
    samples = [
        Sample(
            str(place),
            whole(others[place]),
            write_wav(tmp_path / f"{place}.wav", place),
            {"label": torch.tensor(place), "question": torch.arange(14) + place},
            negatives=tuple(Frames(others[(place + n) % 3], (7 * n + place,), 60) for n in range(T)),
        )
        for place in range(3)
    ]
    dataset = Clips(samples, config("avqa", "squash", "TCHW"))
    (batch,), (expected,) = run(dataset, [[2, 0, 1]]), reference(dataset, [[2, 0, 1]])
    assert_alike(batch, expected, levels=0.01 if where == "folders" else 2)
    assert batch["negative"].shape == (3, T, 3, SIDE, SIDE)


def test_clips_that_dali_would_show_otherwise(tmp_path, make_video):
    """Turned by a note in the header, with an uneven rate, with frames that are not shown, or cut by an edit list."""
    size = (64, 48)
    audio = write_wav(tmp_path / "a.wav", 0)
    times = np.cumsum([1, 1, 5, 1, 1, 9, 1, 1, 1, 2, 1, 1]).tolist()
    paths = [
        make_video(tmp_path / "turned.mp4", pictures(9, size), codec="libvpx-vp9", options=QUICK, rotation=90),
        make_video(
            tmp_path / "uneven.webm",
            pictures(12, size),
            codec="libvpx-vp9",
            options=QUICK,
            times=times,
            time_base=Fraction(1, 25),
        ),
        make_video(
            tmp_path / "hidden.webm", pictures(30, size), codec="libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "16"}
        ),
        make_video(tmp_path / "one.webm", pictures(1, size), codec="libvpx-vp9", options=QUICK),
        make_video(tmp_path / "edited.mp4", pictures(16, size), codec="libvpx-vp9", options=QUICK, times=range(-5, 11)),
    ]
    dataset = Clips([Sample(path.name, whole(path), audio) for path in paths], config())
    batches = [[0, 1], [2, 3, 4]]
    for batch, expected in zip(run(dataset, batches), reference(dataset, batches), strict=True):
        assert_alike(batch, expected)
    turned = dali._encode(whole(paths[0]), CPU)
    assert isinstance(turned, dali._Encoded)
    assert backend(None).alone(turned).shape == (T, 64, 48, 3)
    uneven = dali._encode(whole(paths[1]), CPU)
    assert isinstance(uneven, dali._Encoded)


def test_containers_that_dali_may_crash_on(tmp_path, make_video):
    """An AVI that says that a part of it ends gigabytes behind it took the process along; no AVI is given to DALI."""
    path = make_video(tmp_path / "clip.avi", pictures(9, (64, 48)), codec="mjpeg", pixels="yuvj420p")
    images = dali._encode(whole(path), CPU)
    assert isinstance(images, torch.Tensor)
    assert [number_of(image) for image in images] == [int(place) - 1 for place in np.linspace(1, 9, T)]


def test_the_middle_of_an_epoch(ave):
    """What is left of an epoch is the same to the bit, whatever was decoded before, and on a pipeline that was used before."""
    batches = [[0, 1], [2, 3], [4, 5], [3]]
    made = backend(ave)
    first = list(made.run(batches, 0))
    for start in (0, 1, 3):
        for batch, expected in zip(made.run(batches[start:], 0), first[start:], strict=True):
            assert_equal(batch, expected)
    made.close()


def test_batches_belong_to_the_caller(ave):
    made = backend(ave)
    batches, copies = [], []
    for batch in made.run([[0, 1], [2, 3], [4, 5], [1, 0]], 0):
        batches.append(batch)
        copies.append({key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()})
    made.close()
    del made
    for batch, copy in zip(batches, copies, strict=True):
        assert_equal(batch, copy)


def test_a_pipeline_of_epochs(ave):
    """Through `AVPipeline`: shuffled, resumed in the middle, the same batches as with the other backend."""
    options = {"shuffle": True, "seed": 2, "batch_size": 4, "workers": 2}
    pipeline, other = AVPipeline(ave, backend="dali", **options), AVPipeline(ave, backend="pyav", **{**options, "workers": 0})
    for _ in range(2):
        for batch, expected in zip(pipeline, other, strict=True):
            assert_alike(batch, expected)
    next(iter(pipeline))
    again = AVPipeline(ave, backend="dali", **options)
    again.load_state_dict(pipeline.state_dict())
    left, whole_epoch = list(again), list(other)
    assert len(left) == 1
    assert_alike(left[0], whole_epoch[1])
    pipeline.close()
    again.close()


def spoiled(tmp_path, containers):
    """Broken files, and a word of what is wrong with each."""
    good = containers["vp9.webm"].read_bytes()
    mp4 = containers["mjpeg.mp4"].read_bytes()
    middle = mp4.index(b"mdat") + 4 + (len(mp4) - mp4.index(b"mdat")) // 2
    contents = {
        "cut.webm": (good[: len(good) // 2], "cut off"),
        "empty.webm": (b"", "empty"),
        "text.mp4": (b"nothing to see here" * 40, "can not be read"),
        "damaged.mp4": (mp4[:middle] + bytes(4000) + mp4[middle + 4000 :], "damaged"),
    }
    for name, (data, _) in contents.items():
        (tmp_path / name).write_bytes(data)
    return {**{tmp_path / name: word for name, (_, word) in contents.items()}, tmp_path / "missing.webm": "no such file"}


def test_broken_containers_are_named(tmp_path, containers, ave):
    """Batches before come out; then the error, of the file and in its own words, whether PyAV or DALI came upon it."""
    for path, word in spoiled(tmp_path, containers).items():
        samples = [*ave.samples[:2], Sample("broken", whole(path), ave.samples[0].audio), *ave.samples[:2]]
        made = backend(Clips(samples, config()))
        stream = made.run([[0], [1], [3, 2], [4]], 0)
        assert [next(stream)["id"], next(stream)["id"]] == [["vp9.webm"], ["vp9.mp4"]]
        with pytest.raises(MediaError, match=word) as error:
            next(stream)
        assert error.value.path == str(path)
        # The backend may be run again.
        assert [batch["id"] for batch in made.run([[0, 1]], 0)] == [["vp9.webm", "vp9.mp4"]]
        made.close()


def test_broken_images_and_sound_are_named(tmp_path, ave):
    audio = ave.samples[0].audio
    images = write_images(tmp_path / "images", pictures(T, (64, 48)))
    other = write_images(tmp_path / "other", pictures(T, (48, 64)))
    (tmp_path / "cut.jpg").write_bytes(images[1].read_bytes()[:-300])
    data = bytearray(images[1].read_bytes())
    data[2:300] = bytes(298)
    (tmp_path / "damaged.jpg").write_bytes(data)
    (tmp_path / "text.png").write_text("no image")
    cases = [
        ((images[0], tmp_path / name, *images[2:]), audio, name)
        for name in ("cut.jpg", "damaged.jpg", "text.png", "missing.jpg")
    ]
    cases.append(((*images[:2], other[2], images[3]), audio, "other"))
    for side in (9000, 20000):  # what the header claims; PIL itself refuses the second
        (tmp_path / f"{side}.png").write_bytes(empty_png(side, side))
        cases.append(((*images[:2], tmp_path / f"{side}.png", images[3]), audio, f"{side}.png: .*({side}x{side}|Image size)"))
    (tmp_path / "silent.wav").write_bytes(b"")
    cases.append((images, tmp_path / "silent.wav", "silent.wav"))
    for source, sound, name in cases:
        dataset = Clips([Sample("good", whole(images), audio), Sample("broken", whole(source), sound)], config())
        with pytest.raises(MediaError, match=name):
            run(dataset, [[0], [0, 1]])


def test_broken_clips_are_replaced(tmp_path, containers, ave):
    """By the same ones as with the other backend, those that DALI alone finds included; what was left out is noted."""
    broken = spoiled(tmp_path, containers)
    samples = [
        *ave.samples[:4],
        *(Sample(path.name, whole(path), ave.samples[0].audio, {"label": torch.zeros(T, 5)}, {"kind": "x"}) for path in broken),
    ]
    dataset = Clips(samples, config())
    batches = [[0, 4], [5, 6], [7, 1], [8, 2], [3]]
    made, expected = run(dataset, batches, on_error="skip"), reference(dataset, batches, "skip")
    skipped = {}
    for batch, other in zip(made, expected, strict=True):
        skipped |= batch[SKIPPED]
        assert_alike({**batch, SKIPPED: None}, {**other, SKIPPED: None})
    assert set(skipped) == set(map(str, broken))


def test_all_clips_broken(tmp_path, ave):
    samples = [Sample(str(n), whole(tmp_path / f"{n}.webm"), ave.samples[0].audio) for n in range(3)]
    with pytest.raises(MediaError, match="no clip of split 'train' can be read"):
        run(Clips(samples, config()), [[0, 1]], on_error="skip")


def test_codecs_for_a_gpu_alone(tmp_path, make_video, ave):
    """H.264 is refused on a processor, by name: before anything runs, or by the clip where most clips are others."""
    path = make_video(tmp_path / "clip.mp4", pictures(6, (64, 48)))
    clip = Sample("h264", whole(path), ave.samples[0].audio)
    (reason,) = dali_refusals(Clips([clip], config()), CPU)
    assert "h264" in reason
    assert str(path) in reason
    assert "vp9" in reason
    mixed = Clips([*ave.samples[:2], clip, *ave.samples[2:]], config())
    with pytest.raises(MediaError, match="does not decode h264") as error:
        run(mixed, [[0, 1], [2, 3]])
    assert error.value.path == str(path)


def test_what_dali_can_not_do_is_told_by_dali(tmp_path, make_video, ave, monkeypatch):
    """A clip that PyAV reads and DALI should, but does not."""
    path = make_video(tmp_path / "clip.mp4", pictures(6, (64, 48)))
    monkeypatch.setitem(dali.CODECS, "cpu", ("vp8", "vp9", "mjpeg", "h264"))
    with pytest.raises(MediaError, match=r"only backend='pyav' can .*Failed to create video decoder") as error:
        run(Clips([ave.samples[0], Sample("h264", whole(path), ave.samples[0].audio)], config()), [[0, 1]])
    assert error.value.path == str(path)


def test_every_reason_at_once(tmp_path, make_video, ave, monkeypatch):
    assert dali_refusals(ave, CPU) == []
    assert "meta" in dali_refusals(ave, torch.device("meta"))[0]
    broken = Clips([Sample("broken", whole(tmp_path / "missing.webm"), ave.samples[0].audio), *ave.samples[:1]], config())
    assert dali_refusals(broken, CPU) == []
    monkeypatch.setattr(dali.importlib, "import_module", missing)
    path = make_video(tmp_path / "clip.mp4", pictures(6, (64, 48)))
    clip = Sample("h264", whole(path), ave.samples[0].audio)
    reasons = dali_refusals(Clips([ave.samples[0], clip, ave.samples[1]], config()), CPU)
    assert len(reasons) == 2
    assert "stgcma-fast[dali]" in reasons[0]
    assert "h264" in reasons[1]
    many = torch.cuda.device_count() + 7
    assert any(f"no device cuda:{many}" in reason for reason in dali_refusals(ave, torch.device("cuda", many)))
    packed = Clips(ave.samples, config())
    packed.media = object()
    assert "shards" in dali_refusals(packed, CPU)[0]


def missing(name):
    raise ImportError(f"No module named {name!r}")


def test_left_early_and_epoch_after_epoch(ave, monkeypatch):
    """No thread, no open file and no pipeline of DALI's stays behind, however a run ends."""
    built = []

    def note(*args):
        pipeline = build_pipeline(*args)
        built.append(weakref.ref(pipeline))
        return pipeline

    def alive():
        gc.collect()
        return sum(pipeline() is not None for pipeline in built)

    monkeypatch.setattr(dali, "build_pipeline", note)
    made = backend(ave)
    stream = made.run([[0, 1]] * 5, 0)
    next(stream)
    stream.close()
    assert alive() == 0
    counts = []
    for epoch in range(4):
        assert len(list(made.run([[0, 1], [2]], epoch))) == 2
        assert alive() == 1
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("stgcma-media")]
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    assert len(built) == 2
    assert counts[1:] == counts[:-1]
    made.close()
    assert alive() == 0


@pytest.mark.parametrize(("kind", "operator"), [("video", b"decoders__Video"), ("image", b"decoders__Image")])
def test_the_graph_of_a_gpu(kind, operator, monkeypatch):
    """It can be defined without one: DALI checks the operators. What goes in is on the host, what comes out is not."""

    class Nowhere(dali_library.Pipeline):
        def __init__(self, batch_size, threads, device, **options):
            assert device == 1
            super().__init__(batch_size, threads, None, **options)

    monkeypatch.setattr(dali_library, "Pipeline", Nowhere)
    graph = build_pipeline(kind, torch.device("cuda", 1), 2, 1).serialize()
    node = graph[graph.index(operator) :]
    assert b"mixed" in node
    assert b"gpu" in node
    assert b"gpu" not in graph[: graph.index(operator)]


def test_order_of_streams(ave, monkeypatch):
    """A batch is waited for by the caller's stream, which its memory is kept for; DALI's frames go back when they were read."""
    log = []

    class Stream:
        cuda_stream = 0

        def synchronize(self):
            log.append("frames go back")

        def wait_stream(self, other):
            assert other is made._stream
            log.append("caller waits")

    caller = Stream()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda value, stream: log.append(stream))
    made = backend(ave)
    made._stream = Stream()
    order = []
    for batch, expected in zip(made.run([[0, 1], [2]], 0), reference(ave, [[0, 1], [2]]), strict=True):
        assert_alike(batch, expected)
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        order += ["caller waits", *[caller] * len(tensors), "handed over", "frames go back"]
        log.append("handed over")
    assert log == [*order, "frames go back"]


def test_copied_frames_are_kept_until_the_device_has_read_them(tmp_path, monkeypatch):
    """Images of a folder become one tensor on a stream that DALI does not know: it must not get their memory back before."""
    images = write_images(tmp_path / "images", pictures(T, (64, 48)))
    dataset = Clips([Sample("images", whole(images), write_wav(tmp_path / "a.wav", 0))], config())
    lent, alive = [], []

    class Stream:
        def synchronize(self):
            alive.append([tensor() is not None for tensor in lent])

        def wait_stream(self, other):
            pass

    from_dlpack = torch.from_dlpack

    def lend(tensor):
        tensor = from_dlpack(tensor)
        lent.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "from_dlpack", lend)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda value, stream: None)
    made = backend(dataset)
    made._stream = Stream()
    stream = made.run([[0]], 0)
    next(stream)
    assert not alive
    assert next(stream, None) is None
    assert alive[0] == [True] * T
    assert not any(tensor() is not None for tensor in lent)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_a_gpu_decodes_what_pyav_decodes(tmp_path, make_video, monkeypatch, codec):
    """Frames stay on the device, where the batch is made, and differ from FFmpeg's by two grey levels at most on average."""
    device = torch.device("cuda", 0)
    audio = write_wav(tmp_path / "a.wav", 0)
    sizes = [(192, 144), (144, 256), (320, 180)]
    paths = [
        make_video(
            tmp_path / f"{n}.mp4",
            pictures(40, size),
            codec=codec,
            options={"g": "12", "bf": "2"} if codec == "libx264" else QUICK,
        )
        for n, size in enumerate(sizes)
    ]
    generator = torch.Generator().manual_seed(1)
    samples = [Sample(str(n), whole(path), audio, augmentation=draw(generator) if n else None) for n, path in enumerate(paths)]
    dataset = Clips(samples, config())
    assert dali_refusals(dataset, device) == []
    given = []
    from_dlpack = torch.from_dlpack

    def note(value):
        tensor = from_dlpack(value)
        given.append((tensor.device, tensor.data_ptr() == value.data_ptr()))
        return tensor

    monkeypatch.setattr(torch, "from_dlpack", note)
    batches = [[0, 1, 2], [2, 0], [1]]
    made = run(dataset, batches, device=device)
    assert given == [(device, True)] * 6
    for batch, expected in zip(made, reference(dataset, batches), strict=True):
        assert batch["video"].device == device
        assert batch["audio"].device == device
        assert_alike(batch, expected)


@pytest.mark.gpu
def test_a_gpu_decodes_images_and_hands_over_in_order(tmp_path):
    """The batch may be read at once on the caller's stream, and stays as it is while later ones are made."""
    device = torch.device("cuda", 0)
    audio = write_wav(tmp_path / "a.wav", 0)
    samples = [Sample(str(n), whole(write_images(tmp_path / str(n), pictures(9, (200, 160), 9 * n))), audio) for n in range(6)]
    dataset = Clips(samples, config())
    batches = [[n, (n + 1) % 6] for n in range(6)] * 3
    made = backend(dataset, device=device)
    kept = [(batch, batch["video"].clone(), batch["audio"].clone()) for batch in made.run(batches, 0)]
    made.close()
    for (batch, video, sound), expected in zip(kept, reference(dataset, batches), strict=True):
        assert torch.equal(batch["video"], video)
        assert torch.equal(batch["audio"], sound)
        assert_alike(batch, expected)


@pytest.mark.gpu
def test_a_gpu_names_broken_clips(tmp_path, make_video):
    path = make_video(tmp_path / "good.mp4", pictures(40, (192, 144)))
    data = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    audio = write_wav(tmp_path / "a.wav", 0)
    dataset = Clips([Sample(name, whole(tmp_path / f"{name}.mp4"), audio) for name in ("good", "cut")], config())
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        run(dataset, [[0], [0, 1]], device=torch.device("cuda", 0))
    (batch,) = run(dataset, [[0, 1]], device=torch.device("cuda", 0), on_error="skip")
    assert batch["id"] == ["good", "good"]

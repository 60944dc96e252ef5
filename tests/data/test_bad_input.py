"""From files to batches, on both backends: the unusual is read as what it is, the broken is named or another clip comes."""

import builtins
import io
import json
import logging
import os
import shutil
import tempfile
import wave
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

from stgcma_fast.data.ave import AVEDataset
from stgcma_fast.data.config import IMAGE_MEAN, IMAGE_STD, AudioConfig, MediaConfig, VideoConfig
from stgcma_fast.data.dataset import open_dataset
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.pipeline import AVPipeline
from stgcma_fast.data.read import read_sample
from stgcma_fast.data.synth import synthesize
from tests.data.conftest import frame_number, numbered_frame, write_video

T, SIDE, RATE, LENGTH = 4, 32, 16000, 12800
CONFIG = MediaConfig(
    "ave",
    AudioConfig(chunks=T, window=3200, margin=4000, num_mel_bins=16, frame_shift_ms=10, frames=20, mean=-4.0, std=3.0),
    VideoConfig(T, SIDE, "crop", "CTHW"),
)
GOOD = ["one", "two", "three", "four"]
BACKENDS = ["pyav", "dali"]
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "6"}}  # DALI decodes it anywhere


def tone(hertz, samples=LENGTH, rate=RATE, loud=0.4):
    return loud * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)


def write_wav(path, samples, rate=RATE):
    """From ``[channels, samples]`` in [-1, 1], 16 bits."""
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples.T * 32767).astype("<i2").tobytes())
    return path


def write_float_wav(path, samples):
    write_wav(path, np.zeros((1, 1)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="flt", layout="mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def write_frames(folder, images, ending="png"):
    folder.mkdir(parents=True)
    for number, image in enumerate(images, 1):
        Image.fromarray(image).save(folder / f"{number:03}.{ending}")
    return folder


def clip(path, first=0, **options):
    """Twelve frames that tell their numbers from ``first`` on, and a tone."""
    images = [numbered_frame(first + number, SIDE, SIDE) for number in range(12)]
    return write_video(path, **{"frames": images, "audio": tone(440 + 50 * first)[None], "fps": 15, **VP9, **options})


def grey(image):
    """Decoders differ in how they blow up colours of half the resolution; here are none."""
    return image[..., :1].repeat(3, 2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [clip(folder / f"{name}.mp4", 20 * place) for place, name in enumerate(GOOD)]


@pytest.fixture
def root(clips, tmp_path):
    """A data set of four clips and one, "odd", in the middle of them, that each test makes for itself."""
    (tmp_path / "AVE").mkdir()
    for path in clips:
        shutil.copy(path, tmp_path / "AVE")
    lines = [f"Bell&{name}&good&0&10" for name in (*GOOD[:2], "odd", *GOOD[2:])]
    for name in ("Annotations.txt", "trainSet.txt"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def dataset(root, **options):
    return AVEDataset(root, "train", CONFIG, **options)


def batches(data, backend, **options):
    """What an epoch of pairs yields."""
    pipeline = AVPipeline(data, 2, backend=backend, workers=1, **options)
    try:
        return list(pipeline)
    finally:
        pipeline.close()


def odd(root, backend):
    """The tensors of "odd" out of a batch."""
    batch = batches(dataset(root), backend)[1]
    assert batch["id"] == ["odd", "three"]
    return batch["video"][0], batch["audio"][0]


def pixels(video):
    """``[3, T, S, S]`` as it was before it was normalised, ``[T, S, S, 3]``."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return ((video * std + mean) * 255).permute(1, 2, 3, 0).numpy()


def numbers(video):
    return [frame_number(image) for image in pixels(video)]


def decoded(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


def banks(samples):
    """Filterbanks of a clip's chunks, by torchaudio."""
    samples = torch.from_numpy(samples - samples.mean()).float()
    starts = np.linspace(0, len(samples) - 4000, T).astype(int)
    return torch.stack(
        [
            torchaudio.compliance.kaldi.fbank(
                samples[None, start : start + 3200],
                htk_compat=True,
                sample_frequency=RATE,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=16,
                dither=0.0,
                frame_shift=10,
            )
            for start in starts
        ]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["odd.avi", "odd.mkv", "odd.webm", "odd.MOV"])
def test_wrong_endings(name, backend, root):
    """What is in the file decides: each time it is an mp4."""
    path = clip(root / "odd.mp4", 100)
    video, audio = odd_of(path, root, name, backend)
    assert numbers(video) == [100 + int(place) - 1 for place in np.linspace(1, 12, T)]
    right_video, right_audio = odd_of(path, root, "odd.mp4", backend)
    assert torch.equal(video, right_video)
    assert torch.equal(audio, right_audio)


def odd_of(path, root, name, backend):
    for old in (root / "AVE").glob("odd.*"):
        old.unlink()
    shutil.copy(path, root / "AVE" / name)
    return odd(root, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_and_sound_with_wrong_endings(backend, root):
    """PNGs are called jpg; what is called wav is a flac."""
    images = [numbered_frame(number, SIDE, SIDE) for number in range(7)]
    folder = write_frames(root / "video_frames/odd", images)
    for path in folder.iterdir():
        path.rename(path.with_suffix(".jpg"))
    samples = np.round(tone(700) * 32767).astype(np.int16)
    path = write_wav(root / "raw_audio/odd.wav", np.zeros((1, 1)))
    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode()])
    assert path.read_bytes()[:4] == b"fLaC"
    video, audio = odd(root, backend)
    np.testing.assert_allclose(pixels(video), [images[int(place) - 1] for place in np.linspace(1, 7, T)], atol=1e-2)
    torch.testing.assert_close(audio[:, :18], (banks(samples / 32768) + 4) / 6, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_frame(backend, root):
    path = clip(root / "AVE/odd.mp4", frames=[grey(numbered_frame(77, SIDE, SIDE))])
    video, _ = odd(root, backend)
    assert numbers(video) == [77] * T
    assert np.abs(pixels(video) - decoded(path)[0]).mean() < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_variable_rate(backend, root):
    """Six frames in the first second, then one every second: at 0, 7/3, 14/3 and 7 s these are frames 0, 7, 9 and 12.

    A constant rate would have shown frames 0, 4, 8 and 12 of the thirteen there.
    """
    times = [*range(0, 1000, 167), *range(1000, 8000, 1000)]
    images = [numbered_frame(number, SIDE, SIDE) for number in range(13)]
    clip(root / "AVE/odd.mp4", frames=images, times=times, time_base=Fraction(1, 1000))
    video, _ = odd(root, backend)
    shown = [max(number for number, time in enumerate(times) if time <= 7000 * place / 12) for place in (0, 4, 8, 12)]
    assert numbers(video) == shown == [0, 7, 9, 12]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(32, 64), (32, 57), (80, 32)])
def test_portrait(size, backend, root):
    """The shorter side is as long as it should be already: the middle of the longer is what is seen."""
    width, height = size
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (12, -(-height // 8), -(-width // 8), 3), np.uint8).repeat(8, 1).repeat(8, 2)
    path = clip(root / "AVE/odd.mp4", frames=[grey(block[:height, :width]) for block in blocks])
    video, _ = odd(root, backend)
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    images = np.stack([image[top : top + SIDE, left : left + SIDE] for image in decoded(path)])
    chosen = images[[int(place) - 1 for place in np.linspace(1, 12, T)]]
    assert np.abs(pixels(video) - chosen).mean() < 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_stereo_of_8_khz(backend, root):
    """The right channel is silent: a tone at half its level, at its pitch, and nothing above 4 kHz."""
    write_wav(root / "raw_audio/odd.wav", np.stack([tone(1000, LENGTH // 2, 8000), np.zeros(LENGTH // 2)]), 8000)
    shutil.copy(root / "AVE/one.mp4", root / "AVE/odd.mp4")
    _, audio = odd(root, backend)
    energies, expected = audio[:, :18] * 6 - 4, banks(tone(1000) / 2)
    loudest = expected.mean((0, 1)).argmax()
    assert energies.mean((0, 1)).argmax() == loudest
    torch.testing.assert_close(energies[..., loudest], expected[..., loudest], atol=0.02, rtol=0)
    assert energies[..., -3:].max() < energies[..., loudest].min() - 10


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def cut_off(root):
    return cut(clip(root / "AVE/odd.mp4", container_options={"movflags": "faststart"}), 0.7)


def cut_before_the_index(root):
    return cut(clip(root / "AVE/odd.mp4"), 0.5)


def zero_bytes(root):
    (root / "AVE/odd.mp4").touch()
    return root / "AVE/odd.mp4"


def no_video(root):
    write_video(root / "AVE/odd.mp4", 1)
    with av.open(str(root / "AVE/one.mp4")) as source, av.open(str(root / "AVE/odd.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return root / "AVE/odd.mp4"


def no_audio(root):
    return clip(root / "AVE/odd.mp4", audio=None)


def text(root):
    (root / "AVE/odd.mp4").write_text("A bell rings, and nobody films it.\n" * 200)
    return root / "AVE/odd.mp4"


def picture(root):
    Image.fromarray(numbered_frame(3, SIDE, SIDE)).save(root / "AVE/odd.mp4", "jpeg")
    return root / "AVE/odd.mp4"


def is_folder(root):
    (root / "AVE/odd.mp4").mkdir()
    return root / "AVE/odd.mp4"


def missing(root):
    return root / "AVE/odd.mp4"


def link_to_itself(root):
    (root / "AVE/odd.mp4").symlink_to(root / "AVE/odd.mp4")
    return root / "AVE/odd.mp4"


def folder_without_frames(root):
    write_wav(root / "raw_audio/odd.wav", tone(440)[None])
    return write_frames(root / "video_frames/odd", [])


def frames(root):
    write_wav(root / "raw_audio/odd.wav", tone(440)[None])
    return write_frames(root / "video_frames/odd", [numbered_frame(number, SIDE, SIDE) for number in range(T)], "jpg")


def frame_that_is_text(root):
    path = frames(root) / "002.jpg"
    path.write_text("A bell.")
    return path


def frame_cut_off(root):
    return cut(frames(root) / "003.jpg", 0.9)


def frame_of_another_size(root):
    path = frames(root) / "004.jpg"
    Image.fromarray(numbered_frame(3, 2 * SIDE, SIDE)).save(path)
    return path


def sound(root):
    shutil.copy(root / "AVE/one.mp4", root / "AVE/odd.mp4")
    return root / "raw_audio/odd.wav"


def not_a_number(root):
    return write_float_wav(sound(root), np.where(np.arange(LENGTH) == 4321, np.nan, tone(440)))


def sound_cut_off(root):
    return cut(write_wav(sound(root), tone(440)[None]), 0.5)


def sound_of_20_ms(root):
    return write_wav(sound(root), tone(440, 320)[None])


BROKEN = {
    cut_off: "it is cut off",
    cut_before_the_index: "it can not be read: Invalid data found",
    zero_bytes: "it is empty (0 bytes)",
    no_video: "it has no video track, only audio",
    no_audio: "it has no audio track, only video",
    text: "it can not be read: Invalid data found",
    picture: "it has no audio track, only video",
    is_folder: "it is a folder, not a file",
    missing: "there is no such file",
    link_to_itself: "it can not be read: Too many levels of symbolic links",
    folder_without_frames: "it is a folder, not a file",
    frame_that_is_text: "it is not an image",
    frame_cut_off: "it can not be read as an image: image file is truncated",
    frame_of_another_size: "it is 64x32, but 001.jpg of the same clip 32x32",
    not_a_number: "its sample 4321 of 12800 is nan, expected finite numbers",
    sound_cut_off: "it is cut off: it has 12778 of the 25600 bytes",
    sound_of_20_ms: "it has 320 samples at 16000 Hz, expected at least 400",
}
each_broken = pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)


@each_broken
@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_files_are_named(make, backend, root):
    """By the item alone, and by a pipeline when it comes to it; the batch before comes out."""
    path, cause = make(root), BROKEN[make]
    data = dataset(root)
    with pytest.raises(MediaError) as alone:
        read_sample(data.sample(2), CONFIG)
    pipeline = AVPipeline(data, 2, backend=backend, workers=1)
    stream = iter(pipeline)
    assert next(stream)["id"] == GOOD[:2]
    with pytest.raises(MediaError) as caught:
        next(stream)
    pipeline.close()
    for error in (alone.value, caught.value):
        assert error.path == str(path)
        assert error.cause.startswith(cause)
        assert str(error).startswith(f"{path}: {cause}")


@each_broken
@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_files_are_replaced(make, backend, root, caplog):
    path = make(root)
    assert_replaced(dataset(root), path, BROKEN[make], backend, caplog)


def assert_replaced(data, path, cause, backend, caplog):
    """Over two epochs: told once, noted, and in its place another clip of the split, to the bit."""
    pipeline = AVPipeline(data, 2, backend=backend, workers=1, on_error="skip", seed=3)
    with caplog.at_level(logging.WARNING, "stgcma_fast.data"):
        epochs = [list(pipeline), list(pipeline)]
    pipeline.close()
    assert list(pipeline.skipped) == [str(path)]
    assert pipeline.skipped[str(path)].startswith(cause)
    told = [record.getMessage() for record in caplog.records if record.name == "stgcma_fast.data"]
    assert len(told) == 1
    assert told[0].startswith(f"{path}: {cause}")
    right = {}
    for index in (0, 1, 3, 4):
        (batch,) = AVPipeline(Only(data, index), 1, backend=backend, workers=1)
        right[batch["id"][0]] = batch
    for epoch in epochs:
        assert [len(batch["id"]) for batch in epoch] == [2, 2, 1]
        names = [name for batch in epoch for name in batch["id"]]
        assert names[:2] + names[3:] == GOOD
        assert names[2] in GOOD
        for batch in epoch:
            for row, name in enumerate(batch["id"]):
                for key in ("video", "audio", "label"):
                    assert torch.equal(batch[key][row], right[name][key][0]), (name, key)
    # So no two of them are alike, and none is zeros.
    for key in ("video", "audio"):
        values = [batch[key] for batch in right.values()]
        assert all(value.std() > 0.1 for value in values)
        assert all(not torch.equal(a, b) for place, a in enumerate(values) for b in values[:place])


class Only:
    """A data set of one item of another."""

    def __init__(self, data, index):
        self.config, self.root, self.split, self.data, self.index = data.config, data.root, data.split, data, index

    def __len__(self):
        return 1

    def sample(self, index, epoch=0):
        return self.data.sample(self.index, epoch)


@pytest.mark.parametrize("what", ["container", "frame", "sound"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_files_without_permission(what, backend, root, monkeypatch, caplog):
    """Whoever runs tests may often read everything, so opening fails here."""
    paths = {"container": root / "AVE/odd.mp4", "frame": root / "video_frames/odd/002.jpg", "sound": root / "raw_audio/odd.wav"}
    if what == "frame":
        frames(root)
    else:
        shutil.copy(root / "AVE/one.mp4", root / "AVE/odd.mp4")
    if what == "sound":
        write_wav(paths[what], tone(440)[None])

    def refusing(function):
        def refuse(path, *args, **kwargs):
            if str(path) == str(paths[what]):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return refuse

    for module, name in ((builtins, "open"), (io, "open"), (av, "open")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    cause = "it can not be read as an image: [Errno 13] Permission" if what == "frame" else "it can not be read: Permission"
    data = dataset(root)
    with pytest.raises(MediaError) as caught:
        batches(data, backend)
    assert caught.value.path == str(paths[what])
    assert caught.value.cause.startswith(cause)
    assert_replaced(data, paths[what], cause, backend, caplog)


@pytest.mark.parametrize("forbidden", ["file", "folder"])
def test_files_without_permission_in_earnest(forbidden, root):
    """As somebody who may not read everything."""
    user = os.geteuid()
    # Others may not enter the folders of tests.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(shutil.copytree(root, Path(folder, "set")), "AVE/odd.mp4")
        shutil.copy(root / "AVE/one.mp4", path)
        data = dataset(path.parents[1])
        place = path if forbidden == "file" else path.parent
        place.chmod(0)
        if not user:
            os.seteuid(65534)
        try:
            with pytest.raises(MediaError) as caught:
                read_sample(data.sample(2), CONFIG)
        finally:
            os.seteuid(user)
            place.chmod(0o755)
    assert str(caught.value) == f"{path}: it can not be read: Permission denied"


@pytest.mark.parametrize("backend", BACKENDS)
def test_sound_that_cannot_be_mixed_in(backend, root):
    """Every item gets the sound of another. Where that is broken, another item comes, although the own files are whole."""
    path = not_a_number(root)
    data = dataset(root, train=True, mixup=1.0)
    pipeline = AVPipeline(data, 2, backend=backend, workers=1, on_error="skip")
    seen = Counter()
    for epoch in range(8):
        partners = {data.ids[index]: data.sample(index, epoch).mix.audio for index in range(5)}
        for batch in pipeline:
            assert len(batch["id"]) == len(batch["video"]) == len(batch["audio"])
            assert all(partners[name] != path for name in batch["id"])
            assert batch["audio"].isfinite().all()
            seen.update(batch["id"])
    pipeline.close()
    assert seen.total() == 8 * 5
    assert set(seen) == set(GOOD)
    assert list(pipeline.skipped) == [str(path)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_that_are_broken(backend, root):
    """What is asked about a whole clip is replaced, too, where frames of a broken one stand beside it."""
    (root / "AVE").rename(root / "videos")
    question = {"question_content": "Is there a bell?", "templ_values": "[]", "anser": "yes", "type": "[]"}
    videos = ["odd", *GOOD * 4]
    asked = [{"video_id": video, "question_id": number, **question} for number, video in enumerate(videos)]
    (root / "avqa-train.json").write_text(json.dumps(asked))
    broken = root / "videos/odd.mp4"
    broken.write_text("no video")
    config = MediaConfig("avqa", CONFIG.audio, VideoConfig(T, SIDE, "squash", "TCHW"))
    data = open_dataset("avqa", root, "train", config)
    touched = [
        broken in (sample.video.source, sample.audio, *(frames.source for frames in sample.negatives))
        for sample in map(data.sample, range(len(data)))
    ]
    whole_but_for_negatives = [touched[index] and data.ids[index] != data.ids[0] for index in range(len(data))]
    assert any(whole_but_for_negatives)
    assert not all(touched)
    pipeline = AVPipeline(data, 2, backend=backend, workers=1, on_error="skip")
    made = list(pipeline)
    pipeline.close()
    assert list(pipeline.skipped) == [str(broken)]
    assert [len(batch["negative"]) for batch in made] == [len(rows) for rows in pipeline.batches(0)]
    questions = [question for batch in made for question in batch["question_id"]]
    for index, question in enumerate(questions):
        assert not touched[data.names.index(question)]
        assert touched[index] or question == data.names[index]
    assert all(float(row.std((0, 2, 3)).min()) > 0 for batch in made for row in batch["negative"])


@pytest.fixture(scope="module")
def avs(tmp_path_factory):
    out = tmp_path_factory.mktemp("avs") / "set"
    synthesize("avs", out, 5, workers=1)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ["cut off", "missing", "size"])
def test_masks_that_are_broken(fault, backend, avs, tmp_path):
    root = shutil.copytree(avs, tmp_path / "avs")
    config = MediaConfig("avs", replace(CONFIG.audio, chunks=5), VideoConfig(5, SIDE, "crop", "TCHW"))
    data = open_dataset("avs", root, "train", config)
    good = [data.sample(index).id for index in range(len(data))]
    mask = data.sample(1).masks[0]
    if fault == "cut off":
        cause = "it can not be read as an image: "
        cut(mask, 0.6)
    elif fault == "missing":
        cause = "there is no such file"
        mask.unlink()
    else:
        cause = "the mask is 30x20, but its frames are "
        Image.new("L", (30, 20)).save(mask)
    with pytest.raises(MediaError) as caught:
        batches(data, backend)
    assert caught.value.path == str(mask)
    assert caught.value.cause.startswith(cause)
    pipeline = AVPipeline(data, 2, backend=backend, workers=1, on_error="skip")
    made = list(pipeline)
    pipeline.close()
    names = [name for batch in made for name in batch["id"]]
    assert len(names) == len(good)
    assert [name for index, name in enumerate(names) if index != 1] == [name for index, name in enumerate(good) if index != 1]
    assert names[1] != good[1]
    assert list(pipeline.skipped) == [str(mask)]
    # The replacement's mask is its own.
    masks = torch.cat([batch["mask"] for batch in made])
    right = read_sample(data.sample(good.index(names[1])), config)["mask"]
    assert torch.equal(masks[1], right)
    assert 0 < right.mean() < 1

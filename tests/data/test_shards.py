"""Packed and unpacked data give the same tensors; shards are whole or refused, and WebDataset and DALI read them, too."""

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import wave
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stgcma_fast.cli import main
from stgcma_fast.config import BACKBONES
from stgcma_fast.data import pack as packing
from stgcma_fast.data.config import IMAGE_STD, media_config
from stgcma_fast.data.dataset import open_dataset
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.pack import pack
from stgcma_fast.data.pipeline import AVPipeline
from stgcma_fast.data.read import read_sample
from stgcma_fast.data.shards import ShardDataset, stream_shards
from tests.data.conftest import write_video

TASKS = ("ave", "avs", "avqa")
CLIPS = ("first", "se.cond", "third", "4th_5")
# A grey level of the brightest channel, after normalisation.
LEVEL = 1 / 255 / min(IMAGE_STD)
SIZES = [(120, 96), (40, 32), (84, 106), (64, 64)]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are small here: threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(task):
    """A task's settings, at a size that is soon done."""
    whole = media_config(task, BACKBONES["swin_l"], num_frames=5)
    audio = replace(whole.audio, num_mel_bins=40, frames=30)
    return replace(whole, audio=audio, video=replace(whole.video, size=56))


def write_wav(path, seconds, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.random.default_rng(seed).integers(-9000, 9000, int(16000 * seconds)).astype("<i2").tobytes())


def smooth(number, width, height):
    """An image without noise, which JPEG would not keep."""
    y, x = np.mgrid[:height, :width]
    planes = [np.sin(0.05 * x + number), np.cos(0.04 * y + number), np.sin(0.03 * (x + y))]
    return (127 + 100 * np.stack(planes, 2)).astype(np.uint8)


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """A root for each task: four clips of a train split, larger than a model's images or smaller."""
    roots = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    ave, avs, avqa = roots.values()
    rows = [f"{'Horn' if n % 2 else 'Bell'}&{clip}&good&{n}&{n + 4}" for n, clip in enumerate(CLIPS)]
    rows.append(f"Horn&{CLIPS[0]}&good&6&9")  # as in AVE, a clip may have two rows
    for name in ("Annotations", "trainSet", "testSet"):
        (ave / f"{name}.txt").write_text("\n".join(rows if name != "testSet" else rows[:2]) + "\n")
    (ave / "AVE").mkdir()
    (avqa / "json").mkdir()
    (avqa / "videos").mkdir()
    table, questions = ["name,x,category,split"], []
    for number, clip in enumerate(CLIPS):
        size = SIZES[number]
        images = [smooth(number + frame, *size) for frame in range(12 + number)]
        write_video(ave / "AVE" / f"{clip}.mp4", images)
        write_wav(ave / "raw_audio" / f"{clip}.wav", 1.5 + number, number)
        shutil.copy(ave / "AVE" / f"{clip}.mp4", avqa / "videos")
        write_wav(avqa / "audio_wav" / f"{clip}.wav", 2.5 + number, number)
        for question in range(1 + number % 2):
            questions.append(
                {
                    "video_id": clip,
                    "question_id": 10 * number + question,
                    "question_content": "Is the <Object> louder?",
                    "templ_values": '["flute"]',
                    "anser": "yes" if question else "no",
                    "type": '["Audio", "Comparative"]',
                }
            )
        table.append(f"{clip},x,cat,train")
        for index in range(1, 6):
            for kind, image in (
                ("visual_frames", smooth(number + index, 84, 63)),
                ("gt_masks", (np.indices((63, 84)).sum(0) > 15 * index) * np.uint8(255)),
            ):
                path = avs / kind / "train" / "cat" / clip / f"{clip}_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
        write_wav(avs / "audio_wav" / "train" / "cat" / f"{clip}.wav", 2.5, number)
    (avs / "s4_meta_data.csv").write_text("\n".join(table) + "\n")
    (avqa / "json" / "avqa-train.json").write_text(json.dumps(questions))
    return roots


@pytest.fixture(scope="session")
def packed(roots, tmp_path_factory):
    """Each task packed as it is, with the frames of their own size, two clips a shard at most."""
    out = {}
    for task, root in roots.items():
        out[task] = tmp_path_factory.mktemp(f"packed-{task}")
        pack(
            open_dataset(task, root, "train", config(task)), out[task], frames="raw", short_side=120, shard_size=0.25, workers=0
        )
    return out


def items(data, epoch=0):
    media = {"media": data.media} if isinstance(data, ShardDataset) else {}
    return [read_sample(data.sample(index, epoch), data.config, **media) for index in range(len(data))]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("train", [False, True])
def test_raw_frames_give_the_same_tensors(task, train, roots, packed):
    """To the bit: evaluation, and training with all its draws, whose negatives and second sounds come from shards, too."""
    files = open_dataset(task, roots[task], "train", config(task), train=train, seed=3)
    shards = ShardDataset(packed[task], "train", config(task), train=train, seed=3)
    assert len(shards) == len(files) == (4 if task == "avs" else 5 if task == "ave" else 6)
    for epoch in range(2):
        for a, b in zip(items(files, epoch), items(shards, epoch), strict=True):
            same(a, b)
    for index in range(len(files)):
        assert (files.sample(index).id, files.sample(index).meta) == (shards.sample(index).id, shards.sample(index).meta)


@pytest.mark.parametrize("task", TASKS)
def test_default_sizes(task, roots, tmp_path):
    """Frames as large as a task needs them: where it cuts, evaluation stays the same to the bit; where it squashes, they are
    rounded to grey levels. JPEG costs a few levels."""
    files = open_dataset(task, roots[task], "train", config(task))
    size = files.config.video.size
    for frames in ("raw", "jpeg"):
        pack(files, tmp_path / frames, frames=frames, short_side=size, workers=0)
        for a, b in zip(items(files), items(ShardDataset(tmp_path / frames, "train", config(task))), strict=True):
            for key in ("video", "negative"):
                if key in a and frames == "jpeg":
                    assert (a[key] - b[key]).abs().mean() < 2 * LEVEL
                    assert not torch.equal(a.pop(key), b.pop(key))
                elif key in a and task == "avqa":
                    assert (a.pop(key) - b.pop(key)).abs().max() < 0.51 * LEVEL
            same(a, b)
    index = json.loads((pack(files, tmp_path / "default", workers=0) / "index.json").read_text())
    assert index["short_side"] == (64 if task == "ave" else 56)


def test_frames_of_several_places_are_there_once(packed):
    """Of 5 and 60 places: each of a clip's 12 to 15 frames."""
    for path in sorted((packed["avqa"] / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [name.split(".", 1) for name in tar.getnames()]
    counts = Counter(key for key, name in names if name.endswith(".npy"))
    assert counts[names[-1][0]] == 15


def test_index(packed):
    """Counts, sizes and checksums are those of the files, and places in a shard are tar's."""
    for task in TASKS:
        folder = packed[task] / "train"
        index = json.loads((folder / "index.json").read_text())
        assert [shard["name"] for shard in index["shards"]] == [path.name for path in sorted(folder.glob("*.tar"))]
        assert index["shards"][0]["name"] == "train-000000.tar"
        assert [clip for shard in index["shards"] for clip in shard["clips"]] == list(CLIPS)
        for shard in index["shards"]:
            data = (folder / shard["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["size"], shard["sha256"])
            first, *lines = (folder / shard["name"]).with_suffix(".idx").read_text().splitlines()
            assert first == f"v1.2 {len(lines)}"
            assert len(lines) == len(shard["clips"])
            with tarfile.open(folder / shard["name"]) as tar:
                expected = [f"{m.name.split('.', 1)[1]} {m.offset_data} {m.size} {m.name}" for m in tar]
            assert " ".join(lines) == " ".join(expected)


def test_webdataset_reads_them(packed):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((packed["avs"] / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["json"]["id"] for sample in samples] == list(CLIPS)
    for number, sample in enumerate(samples):
        assert np.array_equal(sample["00.npy"], smooth(number + 1, 84, 63))
        assert sample["mask.0.png"].shape[:2] == (63, 84)


def test_dali_reads_them(roots, tmp_path):
    dali = pytest.importorskip("nvidia.dali")
    folder = pack(open_dataset("avs", roots["avs"], "train", config("avs")), tmp_path, workers=0)
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    @dali.pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def pipeline():
        image, sound, about = dali.fn.readers.webdataset(
            paths=paths,
            index_paths=[path.replace(".tar", ".idx") for path in paths],
            ext=["00.jpg", "wav", "json"],
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(image), dali.fn.decoders.audio(sound, dtype=dali.types.INT16, downmix=False)[0], about

    images, sounds, abouts = pipeline().run()
    for number, clip in enumerate(CLIPS):
        assert json.loads(bytes(abouts.at(number)))["id"] == clip
        assert images.at(number).shape == (56, 74, 3)
        with wave.open(str(roots["avs"] / "audio_wav" / "train" / "cat" / f"{clip}.wav")) as file:
            assert sounds.at(number).tobytes() == file.readframes(-1)


def test_pipeline_over_shards_goes_on_where_it_was_saved(packed):
    """And gives the same from worker processes, which open the shards themselves."""

    def pipe(workers):
        data = ShardDataset(packed["avqa"], "train", config("avqa"), train=True)
        return AVPipeline(data, 2, shuffle=True, seed=1, workers=workers)

    whole = list(pipe(0))
    broken = pipe(2)
    for batch in broken:
        same_batch(batch, whole[0])
        state = broken.state_dict()
        break
    resumed = pipe(2)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == 2
    for a, b in zip(rest, whole[1:], strict=True):
        same_batch(a, b)


def same_batch(a, b):
    assert {key: a[key] for key in ("id", "type", "question_id")} == {key: b[key] for key in ("id", "type", "question_id")}
    same({k: v for k, v in a.items() if torch.is_tensor(v)}, {k: v for k, v in b.items() if torch.is_tensor(v)})


def test_killed_in_the_middle(roots, packed, tmp_path):
    """Nothing that looks whole is left, and the next run makes what an undisturbed one makes."""
    data = open_dataset("ave", roots["ave"], "train", config("ave"))

    def run():
        return pack(data, tmp_path, frames="raw", short_side=120, shard_size=0.25, workers=0)

    child = os.fork()
    if not child:
        whole = packing.in_order

        def dying(*args):
            for number, clip in enumerate(whole(*args)):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield clip

        packing.in_order = dying
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".train.partial"]
    assert (tmp_path / ".train.partial" / "train-000000.tar").exists()
    with pytest.raises(ValueError, match=r"train: got no index.json, expected a folder that .* finished"):
        ShardDataset(tmp_path, "train")
    run()
    expected = packed["ave"] / "train"
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*"))
    assert sorted(str(path.relative_to(tmp_path / "train")) for path in (tmp_path / "train").rglob("*")) == names
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    for path in filter(Path.is_file, map(expected.joinpath, names)):
        assert path.read_bytes() == (tmp_path / "train" / path.relative_to(expected)).read_bytes()


def test_workers_make_the_same_shards(roots, packed, tmp_path):
    folder = pack(
        open_dataset("avs", roots["avs"], "train", config("avs")),
        tmp_path,
        frames="raw",
        short_side=120,
        shard_size=0.25,
        workers=2,
    )
    for path in sorted((packed["avs"] / "train").glob("*.tar")):
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_clip_is_told_and_nothing_looks_packed(workers, roots, tmp_path):
    root = shutil.copytree(roots["avs"], tmp_path / "root")
    Image.new("L", (10, 10)).save(root / "gt_masks" / "train" / "cat" / "third" / "third_1.png")
    with pytest.raises(MediaError, match=r"third_1.png: the mask is 10x10, but its frames are 84x63"):
        pack(open_dataset("avs", root, "train", config("avs")), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out" / "train").exists()


def test_refusals(roots, packed, tmp_path):
    data = open_dataset("ave", roots["ave"], "train", config("ave"))
    with pytest.raises(FileExistsError, match="train: it is there already"):
        pack(data, packed["ave"])
    with pytest.raises(ValueError, match="train=True"):
        pack(open_dataset("ave", roots["ave"], "train", config("ave"), train=True), tmp_path)
    for options, text in (
        ({"frames": "gif"}, "frames: got 'gif'"),
        ({"shard_size": 0}, "0 MB"),
        ({"short_side": 9}, "56 pixels"),
    ):
        with pytest.raises(ValueError, match=text):
            pack(data, tmp_path, **options)
    large = replace(data.config, video=replace(data.config.video, size=224))
    with pytest.raises(ValueError, match="got frames of 120 pixels, expected 224"):
        ShardDataset(packed["ave"], "train", large)
    with pytest.raises(ValueError, match=r"got frames at \[5\] places of a clip, expected \[7\]"):
        ShardDataset(packed["ave"], "train", media_config("ave", BACKBONES["swin_l"], num_frames=7))
    with pytest.raises(ValueError, match=r"got no index\.json"):
        ShardDataset(packed["ave"], "test")


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed["avs"], tmp_path / "copy")


def test_damaged_shards(copy):
    """A shard that is cut or gone is noticed when the data set is opened; changed bytes, by `check` or where they are read."""
    path = copy / "train" / "train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(MediaError, match=rf"train-000001.tar: it has {len(data) - 512} bytes, but .* says {len(data)}"):
        ShardDataset(copy, "train", config("avs"))
    path.unlink()
    with pytest.raises(MediaError, match=r"train-000001.tar: it is missing"):
        ShardDataset(copy, "train", config("avs"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        place = next(member for member in tar if member.name.endswith("mask.0.png")).offset_data
    path.write_bytes(data[: place + 20] + bytes(40) + data[place + 60 :])
    shards = ShardDataset(copy, "train", config("avs"))
    report = shards.check()
    assert not report.ok
    assert [(finding.kind, finding.where) for finding in report.findings] == [("broken", str(path))]
    with pytest.raises(MediaError, match=r"train-000001.tar/.*: it is damaged"):
        items(shards)
    index = copy / "train" / "index.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="got version 9, expected 1"):
        ShardDataset(copy, "train", config("avs"))


@pytest.mark.parametrize(("member", "cause"), [("json", "it is damaged"), ("wav", "its sample has no 'wav'")])
def test_damaged_samples_are_named_and_replaced(copy, member, cause):
    """What the json of a clip says can not be read, or its index does not know its sound."""
    first, *_ = sorted((copy / "train").glob("*.tar"))
    with tarfile.open(first) as tar:
        place = next(info for info in tar if info.name.endswith(".json")).offset_data
    if member == "json":
        with open(first, "r+b") as file:
            file.seek(place)
            file.write(b"?")
    else:
        index = first.with_suffix(".idx")
        index.write_text(index.read_text().replace(" wav ", " wave ", 1))
    shards = ShardDataset(copy, "train", config("avs"))
    clip = shards.sample(0).id
    with pytest.raises(MediaError, match=f"{first.name}/{clip}: {cause}"):
        list(AVPipeline(shards, 2, workers=0))
    pipe = AVPipeline(shards, 2, workers=0, on_error="skip")
    assert sum(len(batch["id"]) for batch in pipe) == len(shards)
    assert list(pipe.skipped) == [f"{first}/{clip}"]


@pytest.mark.parametrize(
    ("member", "place", "data", "cause"),
    [
        ("wav", 40, (1 << 8).to_bytes(4, "little"), r"its wav has 256 bytes of samples, expected \d+"),
        ("wav", 16, b"\xff\xff\xff\x7f", "RuntimeError"),
        ("json", 2, b"x", "its json says b.*xd"),
    ],
)
def test_changed_bytes_that_made_another_error(member, place, data, cause, copy):
    """A ValueError of the filterbank, one without a text from Python's wave, and a KeyError."""
    first, *_ = sorted((copy / "train").glob("*.tar"))
    with tarfile.open(first) as tar:
        start = next(info for info in tar if info.name.endswith(member)).offset_data
    with open(first, "r+b") as file:
        file.seek(start + place)
        file.write(data)
    shards = ShardDataset(copy, "train", config("avs"))
    with pytest.raises(MediaError, match=f"it is damaged: {cause}") as caught:
        items(shards)
    assert caught.value.path == f"{first}/{shards.sample(0).id}"


def test_two_clips_of_one_name_are_not_packed(roots, tmp_path):
    """AVSBench has its clips by category; shards have them by name."""
    root = shutil.copytree(roots["avs"], tmp_path / "root")
    for kind in ("visual_frames", "gt_masks", "audio_wav"):
        shutil.copytree(root / kind / "train" / "cat", root / kind / "train" / "dog")
    with open(root / "s4_meta_data.csv", "a") as table:
        table.write(f"{CLIPS[0]},x,dog,train\n")
    with pytest.raises(ValueError, match=f"^{CLIPS[0]}: got two clips of this name, .*cat/{CLIPS[0]} and .*dog/{CLIPS[0]}"):
        pack(open_dataset("avs", root, "train", config("avs")), tmp_path / "out", short_side=56, workers=0)


def urls(folder):
    return [str(path) for path in sorted((folder / "train").glob("*.tar"))]


@pytest.mark.parametrize("task", TASKS)
def test_stream_gives_what_the_files_give(task, packed):
    shards = ShardDataset(packed[task], "train", config(task))
    expected = {}
    for index, item in enumerate(items(shards)):
        expected.setdefault(shards.sample(index).id, []).append(item)
    seen = Counter()
    for batch in stream_shards(urls(packed[task]), shards.config, 2):
        for place, clip in enumerate(batch["id"]):
            item = {key: value[place] for key, value in batch.items() if torch.is_tensor(value)}
            own = expected[clip][seen[clip]]
            if task == "avqa":  # drawn from other clips
                assert item["negative"].shape == own.pop("negative").shape
                assert not any(torch.equal(frame, other) for frame in item.pop("negative") for other in own["video"])
            same(item, own)
            seen[clip] += 1
    assert seen == {clip: len(own) for clip, own in expected.items()}


@pytest.mark.parametrize("shuffle", [0, 4])
def test_a_stream_that_is_cut_off_is_told(shuffle, roots, tmp_path):
    """Between two clips, where the rest is a whole tar, too; and a tar of something else."""
    folder = pack(open_dataset("avs", roots["avs"], "train", config("avs")), tmp_path, workers=0)
    with tarfile.open(folder / "train-000000.tar") as tar:
        last = [info.offset for info in tar if info.name.endswith(".json")][-1]
    path = tmp_path / "cut.tar"
    path.write_bytes((folder / "train-000000.tar").read_bytes()[:last])
    with pytest.raises(MediaError, match=r"cut.tar: it is cut off: 3 clips came, expected more"):
        list(stream_shards([str(path)], config("avs"), 1, shuffle=shuffle))
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "0.txt")
    with pytest.raises(MediaError, match=r"cut.tar: its sample 0 has no 'json'"):
        list(stream_shards([str(path)], config("ave"), 1, shuffle=shuffle))


def test_stream_is_shared_by_ranks_and_workers(packed):
    """Every shard is read by one worker of one rank; seed and epoch decide order and draws."""
    paths = urls(packed["ave"])
    assert len(paths) >= 2

    def stream(**options):
        return list(stream_shards(paths, config("ave"), 2, train=True, shuffle=3, **options))

    clips = [clip for rank in range(2) for batch in stream(rank=rank, world_size=2) for clip in batch["id"]]
    assert Counter(clips) == {clip: 2 if clip == CLIPS[0] else 1 for clip in CLIPS}
    assert Counter(clip for batch in stream(workers=2) for clip in batch["id"]) == Counter(clips)
    first, again, later = stream(epoch=1), stream(epoch=1), stream(epoch=2)
    for a, b in zip(first, again, strict=True):
        assert a["id"] == b["id"]
        same({k: v for k, v in a.items() if torch.is_tensor(v)}, {k: v for k, v in b.items() if torch.is_tensor(v)})
    assert not torch.equal(first[0]["video"], later[0]["video"])
    state = torch.get_rng_state()
    stream()
    assert torch.equal(torch.get_rng_state(), state)  # the model's dropout goes on as if nothing was read
    with pytest.raises(ValueError, match=r"got \d shards, expected one or more for each of 9 ranks with 1 workers"):
        stream(world_size=9)


def test_command(roots, tmp_path, capsys):
    arguments = ["data", "pack", "--task", "ave", "--root", str(roots["ave"]), "--split", "test", "--out", str(tmp_path)]
    assert main([*arguments, "--workers", "0", "--shard-size", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path}/test: 2 clips in ")
    assert not printed.err
    assert len(ShardDataset(tmp_path, "test")) == 2
    assert main(arguments) == 1
    assert (
        capsys.readouterr().err
        == f"stgcma-fast: error: {tmp_path}/test: it is there already; remove it to pack the split anew\n"
    )

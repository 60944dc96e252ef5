"""Data sets in their published layouts: labels, words, paths and draws, compared with what these tests work out by hand."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from stgcma_fast.config import BACKBONES
from stgcma_fast.data.config import media_config
from stgcma_fast.data.dataset import generator, open_dataset
from stgcma_fast.data.sample import Frames

HEADER = "Category&VideoID&Quality&StartTime&EndTime"
ROWS = [
    "Church bell&-aXy_1&good&0&10",
    "Male speech, man speaking&bb&good&2&5",
    "Church bell&cc&good&9&10",
    "Bark&dd&bad&0&1",
    "Bark&bb&good&5&7",  # bb a second time, with another event
]
CLASSES = ("Church bell", "Male speech, man speaking", "Bark", "background")
# The class of each second of each row.
SECONDS = np.array([[0] * 10, [3, 3, 1, 1, 1, 3, 3, 3, 3, 3], [3] * 9 + [0], [2] + [3] * 9, [3] * 5 + [2, 2] + [3] * 3])


def tree(root: Path, files: dict[str | Path, Any]) -> Path:
    """Files of text, of JSON, or (values that are arrays by key) of HDF5."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode())
        elif path.suffix == ".h5":
            with h5py.File(path, "w") as file:
                for key, values in content.items():
                    file[key] = values
        else:
            path.write_text(json.dumps(content))
    return root


def one_hot(seconds: np.ndarray) -> np.ndarray:
    return np.eye(len(CLASSES))[seconds]


def config(task: str, frames: int | None = None):
    return media_config(task, BACKBONES["swin_b"], frames)


# --- what is shared


def test_open_dataset_has_the_published_settings(tmp_path):
    tree(tmp_path, {"Annotations.txt": "\n".join(ROWS), "trainSet.txt": ROWS[0]})
    dataset = open_dataset("ave", tmp_path, "train", train=True, seed=3, mixup=0.25)
    assert dataset.config == media_config("ave", BACKBONES["swin_l"])
    assert (type(dataset).__name__, dataset.root, dataset.split, dataset.train) == ("AVEDataset", tmp_path, "train", True)
    assert (dataset.seed, dataset.mixup, dataset.mix_labels, len(dataset)) == (3, 0.25, False, 1)
    small = config("ave", 4)
    assert open_dataset("ave", str(tmp_path), "train", small).config is small


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"task": "kinetics"}, ValueError, "'kinetics'.*'ave', 'avs', 'avqa'"),
        ({"split": "dev"}, ValueError, "split: got 'dev', allowed are 'train', 'val', 'test'"),
        ({"config": config("avs")}, ValueError, "config: got one of the task 'avs', expected 'ave'"),
        ({"root": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all: no such folder"),
        ({"mixup": 1.5}, ValueError, "mixup: got 1.5, expected a probability"),
        ({"mixups": 1.5}, TypeError, "mixups"),
    ],
)
def test_what_can_not_be_opened_is_named(change, error, text, tmp_path):
    tree(tmp_path, {"Annotations.txt": "\n".join(ROWS), "trainSet.txt": ROWS[0]})
    with pytest.raises(error, match=text):
        open_dataset(**{"task": "ave", "root": tmp_path, "split": "train"} | change)


def test_as_many_chunks_as_frames(tmp_path):
    from dataclasses import replace

    odd = config("ave")
    odd = replace(odd, audio=replace(odd.audio, chunks=7))
    with pytest.raises(ValueError, match="got 7 chunks of audio and 10 frames"):
        open_dataset("ave", tmp_path, "train", odd)


def test_draws_belong_to_seed_epoch_and_index():
    keys = [(seed, epoch, index) for seed in (0, 1, -1, 2**63) for epoch in range(4) for index in range(12)]
    keys += [(1, 111, 1), (11, 11, 1), (111, 1, 1), (1, 1, 111)]  # the same digits in one row
    firsts = {torch.rand(2, generator=generator(*key)).numpy().tobytes() for key in keys}
    assert len(firsts) == len(keys)
    assert torch.equal(torch.rand(5, generator=generator(3, 2, 1)), torch.rand(5, generator=generator(3, 2, 1)))


# --- AVE


@pytest.fixture
def ave(tmp_path) -> Path:
    return tree(
        tmp_path / "ave",
        {
            "Annotations.txt": "\n".join([HEADER, *ROWS, ""]),
            "trainSet.txt": "\n".join([ROWS[4], ROWS[0], ROWS[1]]) + "\n",
            "valSet.txt": ROWS[2],
            "testSet.txt": ROWS[3],
        },
    )


ENDS = {"lf": "\n", "crlf": "\r\n"}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("tail", ["", "\n", "\n  \n\n"])
def test_ave_annotations(ave, header, end, mark, tail):
    """With a header or without, lines of Unix or Windows, a byte order mark, blank lines at the end."""
    for name in ("Annotations.txt", "trainSet.txt"):
        lines = [line for line in (ave / name).read_text().splitlines() if line and line != HEADER]
        text = mark + "\n".join([HEADER] * header + lines) + tail
        (ave / name).write_bytes(text.replace("\n", ENDS[end]).encode())
    dataset = open_dataset("ave", ave, "train")
    assert dataset.classes == CLASSES
    assert [dataset.sample(index).id for index in range(3)] == ["bb", "-aXy_1", "bb"]
    for index, row in enumerate((4, 0, 1)):
        label = dataset.sample(index).target["label"]
        assert label.dtype == torch.float32
        assert np.array_equal(label, one_hot(SECONDS[row]))
    assert open_dataset("ave", ave, "val").ids == ["cc"]
    assert np.array_equal(open_dataset("ave", ave, "test").sample(0).target["label"], one_hot(SECONDS[3]))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "float64"])
@pytest.mark.parametrize("base", ["", "AVE_Dataset/"])
def test_ave_h5(ave, dtype, base):
    """Orders and labels of HDF5 go before lists and times, in any dtype and either place."""
    shifted = np.roll(SECONDS, 1, axis=1)  # not what the times say
    tree(
        ave / base, {"labels.h5": {"avadataset": one_hot(shifted).astype(dtype)}, "train_order.h5": {"order": np.array([3, 0])}}
    )
    dataset = open_dataset("ave", ave, "train")
    assert dataset.ids == ["dd", "-aXy_1"]
    assert dataset.labels.dtype == torch.float32
    assert np.array_equal(dataset.sample(0).target["label"], one_hot(shifted[3]))
    assert np.array_equal(dataset.sample(1).target["label"], one_hot(shifted[0]))
    assert open_dataset("ave", ave, "val").ids == ["cc"]  # has no order: its list serves


def test_ave_without_h5py(ave, monkeypatch):
    """Only HDF5 files need it."""
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert len(open_dataset("ave", ave, "train")) == 3


@pytest.mark.parametrize(
    ("frames", "seconds"),
    [(10, range(10)), (5, [1, 3, 5, 7, 9]), (3, [1, 5, 8]), (1, [5]), (20, [second for second in range(10) for _ in "ab"])],
)
def test_ave_labels_of_other_lengths(ave, frames, seconds):
    """Parts of 2 s have their middles at 1, 3, 5 ..., of 3.33 s at 1.67, 5 and 8.33, of 0.5 s at 0.25, 0.75 ..."""
    dataset = open_dataset("ave", ave, "train", config("ave", frames))
    sample = dataset.sample(2)
    assert np.array_equal(sample.target["label"], one_hot(SECONDS[1])[list(seconds)])
    assert sample.video.slots == tuple(range(frames))
    assert sample.video.of == frames


@pytest.mark.parametrize("base", ["", "AVE_Dataset"])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".MKV"])
def test_ave_containers(ave, base, suffix):
    video = ave / base / "AVE" / f"-aXy_1{suffix}"
    tree(video.parent, {video.name: "", "bb.mp4": "", "bb.avi": "", "notes.txt": ""})
    sample = open_dataset("ave", ave, "train").sample(1)
    assert (sample.video, sample.audio) == (Frames(video, tuple(range(10)), 10), video)
    assert (sample.masks, sample.negatives, sample.meta, sample.augmentation, sample.mix) == ((), (), {}, None, None)
    # Of two containers of a clip, the mp4.
    assert open_dataset("ave", ave, "train").sample(0).audio == ave / base / "AVE" / "bb.mp4"


@pytest.mark.parametrize("base", ["", "AVE_Dataset"])
def test_ave_frames_are_sorted_by_number(ave, base):
    folder, wav = ave / base / "video_frames/-aXy_1", ave / base / "raw_audio/-aXy_1.wav"
    names = ["1.jpg", "2.JPG", "010.jpeg", "11.png", "100.jpg"]
    tree(folder, dict.fromkeys([*reversed(names), "._3.jpg", "thumbnail.jpg", "4.txt"], ""))
    tree(wav.parent, {wav.name: ""})
    tree(ave / base / "AVE", {"-aXy_1.mp4": "", "bb.mp4": ""})
    dataset = open_dataset("ave", ave, "train")
    sample = dataset.sample(1)
    assert sample.video.source == tuple(folder / name for name in names)
    assert sample.video.name == folder
    assert sample.audio == wav
    # A clip without a folder is the container's, and one without a wav sounds as its container.
    assert dataset.sample(0).video.source == dataset.sample(0).audio == ave / base / "AVE/bb.mp4"
    wav.unlink()
    sample = open_dataset("ave", ave, "train").sample(1)
    assert (sample.video.name, sample.audio) == (folder, ave / base / "AVE/-aXy_1.mp4")


def test_ave_looks_into_the_root_first(ave):
    for base in ("", "AVE_Dataset"):
        tree(ave / base, {"video_frames/bb/1.jpg": "", "raw_audio/bb.wav": "", "AVE/-aXy_1.mp4": ""})
    one, other = (open_dataset("ave", ave, "train").sample(index) for index in (0, 1))
    assert (one.video.source, one.audio) == ((ave / "video_frames/bb/1.jpg",), ave / "raw_audio/bb.wav")
    assert other.video.source == other.audio == ave / "AVE/-aXy_1.mp4"


def test_ave_missing_media_are_named_where_they_should_be(ave):
    def named(index=1):
        sample = open_dataset("ave", ave, "train").sample(index)
        return sample.video.source, sample.audio

    assert named() == (ave / "AVE/-aXy_1.mp4", ave / "AVE/-aXy_1.mp4")
    tree(ave, {"AVE_Dataset/video_frames/bb/1.jpg": "", "AVE_Dataset/raw_audio/bb.wav": ""})
    assert named() == (ave / "AVE_Dataset/video_frames/-aXy_1", ave / "AVE_Dataset/raw_audio/-aXy_1.wav")
    (ave / "AVE_Dataset/video_frames/-aXy_1").mkdir()  # without frames: the folder is what is wrong
    assert named() == (ave / "AVE_Dataset/video_frames/-aXy_1", ave / "AVE_Dataset/raw_audio/-aXy_1.wav")
    tree(ave, {"AVE/cc.mp4": ""})
    (ave / "AVE_Dataset/video_frames/-aXy_1").rmdir()
    assert named() == (ave / "AVE/-aXy_1.mp4", ave / "AVE/-aXy_1.mp4")


def changed(name, old, new):
    return lambda root: (root / name).write_text((root / name).read_text().replace(old, new))


def written(name, content):
    return lambda root: tree(root, {name: content})


BAD_AVE = {
    "a field too few": (
        changed("Annotations.txt", "&good&9", "&9"),
        r"Annotations\.txt, line 4: got 'Church bell&cc&9&10', exp",
    ),
    "time is a word": (
        changed("Annotations.txt", "bad&0", "bad&o"),
        r"Annotations\.txt, line 5: got 'Bark&dd&bad&o&1', expected",
    ),
    "time is negative": (changed("Annotations.txt", "bad&0", "bad&-1"), r"Annotations\.txt, line 5: got 'Bark&dd&bad&-1&1'"),
    "no id": (changed("Annotations.txt", "&dd&", "&&"), r"Annotations\.txt, line 5: got 'Bark&&bad&0&1'"),
    "other times": (changed("Annotations.txt", "&2&5", "&5&5"), r"trainSet\.txt, line 3: got Male.*&bb&2&5"),
    "not text": (written("Annotations.txt", b"\xff\xfe\x00b"), r"Annotations\.txt: got bytes that are not text"),
    "empty": (written("Annotations.txt", HEADER), r"Annotations\.txt: got no row, expected one or more"),
    "row of no annotation": (changed("trainSet.txt", "&5&7", "&5&8"), r"trainSet\.txt, line 1: got Bark&bb&5&8 \(without qual"),
    "unknown category": (changed("trainSet.txt", "Bark", "Park"), r"trainSet\.txt, line 1: got the category 'Park', expected"),
    "split's line": (changed("trainSet.txt", "Bark&", "Bark"), r"trainSet\.txt, line 1: got 'Barkbb&good&5&7', expected"),
    "empty split": (written("trainSet.txt", "\n"), r"trainSet\.txt: got no row for the split 'train'"),
    "order of no list": (
        written("train_order.h5", {"order": np.ones((2, 2), int)}),
        r"train_order\.h5: got 'order' as int64 of",
    ),
    "order of no numbers": (written("train_order.h5", {"order": np.ones(2)}), r"train_order\.h5: got 'order' as float64"),
    "order too high": (
        written("train_order.h5", {"order": np.array([0, 5])}),
        r"train_order\.h5: got the row 5, expected 0 to 4",
    ),
    "order below 0": (
        written("train_order.h5", {"order": np.array([0, -1])}),
        r"train_order\.h5: got the row -1, expected 0 to 4",
    ),
    "key": (written("train_order.h5", {"rows": np.array([0])}), r"train_order\.h5: got the keys \['rows'\], expected 'order'"),
    "no HDF5": (written("train_order.h5", b"text"), r"train_order\.h5: got a file that is not HDF5"),
    "labels' width": (
        written("labels.h5", {"avadataset": np.ones((5, 10, 29))}),
        r"labels\.h5:.*\[5, 10, 29\], .*\[5, 10, 4\]",
    ),
    "labels' rows": (written("labels.h5", {"avadataset": np.ones((4, 10, 4))}), r"labels\.h5:.*\[4, 10, 4\], .*\[5, 10, 4\]"),
    "labels of words": (
        written("labels.h5", {"avadataset": np.full((5, 10, 4), b"a")}),
        r"labels\.h5: got 'avadataset' as \|?S1",
    ),
    "labels of NaN": (
        written("labels.h5", {"avadataset": np.full((5, 10, 4), np.nan)}),
        r"labels\.h5, row 4: got a label that is not",
    ),
}


@pytest.mark.parametrize("fault", BAD_AVE)
def test_ave_refuses(ave, fault):
    change, text = BAD_AVE[fault]
    change(ave)
    with pytest.raises(ValueError, match=text):
        open_dataset("ave", ave, "train")


@pytest.mark.parametrize("times", ["5&5", "6&5", "2&11"])
def test_ave_refuses_times_that_make_no_label(ave, times):
    for name in ("Annotations.txt", "trainSet.txt"):
        changed(name, "&2&5", f"&{times}")(ave)
    start, end = times.split("&")
    with pytest.raises(ValueError, match=rf"Annotations\.txt, line 3: got an event of bb from {start} to {end} s, expected"):
        open_dataset("ave", ave, "train")
    assert len(open_dataset("ave", ave, "val")) == 1  # does not have it
    # Where labels come from elsewhere, the times do not matter.
    tree(ave, {"labels.h5": {"avadataset": one_hot(SECONDS)}})
    assert np.array_equal(open_dataset("ave", ave, "train").labels[2], one_hot(SECONDS[1]))


@pytest.mark.parametrize("name", ["Annotations.txt", "trainSet.txt"])
def test_ave_missing_annotations_are_named(ave, name):
    (ave / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{ave}: expected .*{name}.* in it, got none"):
        open_dataset("ave", ave, "train")


@pytest.fixture
def ave_train(ave):
    """A data set for training of which every clip has a file."""
    tree(ave / "AVE", dict.fromkeys(["-aXy_1.mp4", "bb.mp4", "cc.mp4", "dd.mp4"], ""))
    (ave / "trainSet.txt").write_text("\n".join([ROWS[0], ROWS[1], ROWS[2], ROWS[3]]))
    return lambda **options: open_dataset("ave", ave, "train", **{"train": True} | options)


ROW_OF = {"-aXy_1": 0, "bb": 1, "cc": 2, "dd": 3}


def test_ave_training_draws(ave_train):
    """The same for the same seed, epoch and index, whatever came before; others elsewhere."""
    one, other = ave_train(), pickle.loads(pickle.dumps(ave_train()))
    seen = {}
    for epoch in range(3):
        for index in range(4):
            seen[epoch, index] = one.sample(index, epoch)
    for (epoch, index), sample in reversed(seen.items()):
        again = other.sample(index, epoch)
        assert (again.augmentation, again.mix, again.video) == (sample.augmentation, sample.mix, sample.video)
    assert all(sample.augmentation is not None for sample in seen.values())
    assert len({repr(sample.augmentation) for sample in seen.values()}) == 12
    assert ave_train(seed=1).sample(0).augmentation != seen[0, 0].augmentation
    for plain in (ave_train(train=False).sample(0), open_dataset("ave", one.root, "val").sample(0)):
        assert (plain.augmentation, plain.mix) == (None, None)


def test_ave_mixes_audio_as_published(ave_train):
    """In half of the items another clip of the split, weights of Beta(10, 10) for each chunk, labels as they are."""
    dataset = ave_train()
    samples = [dataset.sample(index, epoch) for epoch in range(100) for index in range(4)]
    mixes = [sample.mix for sample in samples if sample.mix]
    assert 150 < len(mixes) < 250  # of 400, deviation 10
    partners = Counter(mix.audio.stem for mix in mixes)
    assert partners.keys() == ROW_OF.keys()
    assert min(partners.values()) > 0.15 * len(mixes)
    assert all(dataset.sample(0, epoch).mix is None for dataset in [ave_train(mixup=0)] for epoch in range(20))
    always = ave_train(mixup=1)
    lams = np.array([always.sample(0, epoch).mix.lams for epoch in range(2000)])
    assert lams.shape == (2000, 10)
    assert all(len(set(chunks)) == 10 for chunks in lams.tolist())
    # Beta(10, 10): mean 1/2, variance 1/84, fourth moment about the mean (3 - 6/23)/84**2.
    centred = lams - 0.5
    assert abs(centred.mean()) < 5 * np.sqrt(1 / 84 / lams.size)
    assert abs((centred**2).mean() * 84 - 1) < 0.05
    assert abs((centred**4).mean() * 84**2 / (3 - 6 / 23) - 1) < 0.15
    for sample in samples:
        assert np.array_equal(sample.target["label"], one_hot(SECONDS[ROW_OF[sample.id]]))


def test_ave_labels_are_mixed_on_demand(ave_train):
    plain, mixed = ave_train(mixup=1), ave_train(mixup=1, mix_labels=True)
    others = set()
    for epoch in range(12):
        sample = mixed.sample(0, epoch)
        assert sample.mix == plain.sample(0, epoch).mix
        lam = np.array(sample.mix.lams)[:, None]
        other = sample.mix.audio.stem
        others.add(other)
        expected = lam * one_hot(SECONDS[0]) + (1 - lam) * one_hot(SECONDS[ROW_OF[other]])
        np.testing.assert_allclose(sample.target["label"], expected, atol=1e-6)
    assert len(others) > 1
    assert np.array_equal(mixed.labels[0], one_hot(SECONDS[0]))  # the data set's own stay


# --- AVSBench

S4 = "name,length,category,split\nv1_0,5,male_speech,train\nv2 x,5,cat,val\nv3,5,cat,test\nv4,5,cat,train\n"
MS3 = "video_id,time,split\nm1,5,train\nm2,5,val\n\nm3,5,test\n"


@pytest.mark.parametrize("base", ["", "s4_data"])
@pytest.mark.parametrize("table", ["", "s4_data"])
def test_s4(tmp_path, base, table):
    tree(tmp_path, {Path(table, "s4_meta_data.csv"): S4, Path(base, "visual_frames/x"): ""})
    if table:
        base = table
    below = tmp_path / base
    train = open_dataset("avs", tmp_path, "train")
    assert train.ids == ["v1_0", "v4"]
    sample = train.sample(0)
    assert sample.id == "v1_0"
    pictures = tuple(below / f"visual_frames/train/male_speech/v1_0/v1_0_{number}.png" for number in (1, 2, 3, 4, 5))
    assert sample.video == Frames(pictures, (0, 1, 2, 3, 4), 5)
    assert sample.masks == (below / "gt_masks/train/male_speech/v1_0/v1_0_1.png",)
    assert sample.audio == below / "audio_wav/train/male_speech/v1_0.wav"
    sample = open_dataset("avs", tmp_path, "val", subset="s4").sample(0)
    assert sample.masks == tuple(below / f"gt_masks/val/cat/v2 x/v2 x_{number}.png" for number in (1, 2, 3, 4, 5))
    assert len(open_dataset("avs", tmp_path, "test").sample(0).masks) == 5


@pytest.mark.parametrize("base", ["", "ms3_data"])
@pytest.mark.parametrize("form", ["{}.mp4_{}.png", "{}_{}.png"])
def test_ms3(tmp_path, base, form):
    """Several sources: five masks in training, too, and frames in folders without a split, named in one of two ways."""
    tree(tmp_path, {"ms3_meta_data.csv": MS3, Path(base, "visual_frames/m1", form.format("m1", 1)): ""})
    below = tmp_path / base
    sample = open_dataset("avs", tmp_path, "train").sample(0)
    assert sample.video == Frames(
        tuple(below / "visual_frames/m1" / form.format("m1", n) for n in (1, 2, 3, 4, 5)), (0, 1, 2, 3, 4), 5
    )
    assert sample.masks == tuple(below / f"gt_masks/train/m1/m1_{number}.png" for number in (1, 2, 3, 4, 5))
    assert sample.audio == below / "audio_wav/train/m1.wav"
    assert open_dataset("avs", tmp_path, "test").sample(0).audio == below / "audio_wav/test/m3.wav"


def test_avs_draws_nothing(tmp_path):
    tree(tmp_path, {"s4_meta_data.csv": S4})
    sample = open_dataset("avs", tmp_path, "train", train=True).sample(0, 7)
    assert (sample.augmentation, sample.mix, sample.negatives, sample.target, sample.meta) == (None, None, (), {}, {})


def test_avs_subset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected s4_meta_data\.csv or .* or ms3_meta_data\.csv or "):
        open_dataset("avs", tmp_path, "train")
    tree(tmp_path, {"s4_meta_data.csv": S4, "ms3_data/ms3_meta_data.csv": MS3})
    with pytest.raises(ValueError, match=f"subset: got None, but {tmp_path} has both, expected 's4' or 'ms3'"):
        open_dataset("avs", tmp_path, "train")
    assert open_dataset("avs", tmp_path, "train", subset="ms3").ids == ["m1"]
    assert open_dataset("avs", tmp_path, "train", subset="s4").ids == ["v1_0", "v4"]
    with pytest.raises(ValueError, match="subset: got 's3', allowed are 's4', 'ms3'"):
        open_dataset("avs", tmp_path, "train", subset="s3")
    with pytest.raises(ValueError, match="got 10 frames of a clip, expected the 5"):
        open_dataset("avs", tmp_path, "train", config("avs", 10), subset="s4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            S4.replace("split", "fold"),
            r"line 1: got the columns \['name', 'length', 'category', 'fold'\], expected 'split' and 3",
        ),
        ("name,split\nv,train\n", r"line 1: got the columns \['name', 'split'\], expected 'split' and 3 or more"),
        ("", r"line 1: got the columns \[\]"),
        (S4.replace("v2 x,5,cat", "v2 x,5"), "line 3: got 3 fields, expected 4"),
        (S4.replace("cat,val", "cat,dev"), "line 3: got the split 'dev', expected one of 'train', 'val', 'test'"),
        (S4.replace("v3,5", ",5"), r"line 4: got \['', '5', 'cat', 'test'\], expected a name and a category"),
        (S4.replace("v3,5,cat", "v3,5,"), r"line 4: got \['v3', '5', '', 'test'\], expected a name and a category"),
        ("name,n,category,split\nv3,5,cat,test\n", "got no clip of the split 'train'"),
        (b"\x89PNG\xff", "got bytes that are not text"),
    ],
)
def test_avs_refuses(tmp_path, text, message):
    tree(tmp_path, {"s4_meta_data.csv": text})
    with pytest.raises(ValueError, match=rf"s4_meta_data\.csv(, |: ){message}"):
        open_dataset("avs", tmp_path, "train")


# --- MUSIC-AVQA


def question(number, video, content, answer, values="[]", kind='["Audio", "Counting"]'):
    fields = {"video_id": video, "question_id": number, "question_content": content, "templ_values": values}
    return fields | {"anser": answer, "type": kind, "question_deleted": 0}


TRAIN = [
    question(7, "00000001", "How many <Object> are there?", "two", '["flute"]'),
    question(8, "00000002", "Is the <Object> louder than the <Object>?  ", "yes", '["Flute", "acoustic_guitar"]'),
    question(9, "00000001", "Where is the flute ?", "two", "[]"),
    question(10, "00000003", " How many there", "no"),
]
# By hand: in the order of appearance; the last loses its last character, here a mark, a blank's nothing, or a letter.
WORDS = (
    "<pad>",
    "How",
    "many",
    "flute",
    "are",
    "there",
    "Is",
    "the",
    "Flute",
    "louder",
    "than",
    "acoustic_guitar",
    "Where",
    "is",
    "",
    "ther",
)
TEST = [
    question(20, "00000002", "Where is the <LL>?", "no", "['acoustic_guitar', 'unused']", '["Visual", "Location"]'),
    question("21", "00000009", "flute flute flute flute flute flute flute flute flute flute flute flute flute flute?", "two"),
]


@pytest.fixture
def avqa(tmp_path) -> Path:
    return tree(tmp_path, {"avqa-train.json": TRAIN, "avqa-test.json": TEST})


@pytest.mark.parametrize("base", ["", "json"])
def test_avqa_words_and_answers_are_those_of_training(tmp_path, base):
    tree(tmp_path / base, {"avqa-train.json": TRAIN, "avqa-test.json": TEST})
    train, test = (open_dataset("avqa", tmp_path, split) for split in ("train", "test"))
    for dataset in (train, test):
        assert dataset.vocabulary == WORDS
        assert dataset.answers == dataset.classes == ("two", "yes", "no")
    assert [train.sample(index).target["label"].item() for index in range(4)] == [0, 1, 0, 2]
    asked = [train.sample(index).target["question"].tolist() for index in range(4)]
    assert asked == [
        [1, 2, 3, 4, 5] + [0] * 9,
        [6, 7, 8, 9, 10, 7, 11] + [0] * 7,
        [12, 13, 7, 3, 14] + [0] * 9,
        [14, 1, 2, 15] + [0] * 10,
    ]
    sample = test.sample(0)
    assert sample.target["question"].tolist() == [12, 13, 7, 11] + [0] * 10
    assert (sample.target["question"].dtype, sample.target["label"].dtype) == (torch.int64, torch.int64)
    assert (sample.target["label"].item(), sample.target["label"].shape) == (2, ())
    assert sample.id == "00000002"
    assert sample.meta == {"question_id": "20", "type": '["Visual", "Location"]'}
    assert test.sample(1).target["question"].tolist() == [3] * 14
    assert test.sample(1).meta["question_id"] == "21"


BAD_AVQA = {
    "15 words": ({"question_content": "flute " * 14 + "flute?"}, "question 20: got 15 words, expected 14 at most"),
    "unknown word": ({"question_content": "Where is the violin?"}, "question 20: got the word 'violin', expected one of"),
    "unknown answer": ({"anser": "seven"}, "question 20: got the answer 'seven', expected one of"),
    "no value": (
        {"templ_values": "[]"},
        r"question 20: got templ_values '\[\]' for 'Where is the <LL>\?', expected a list of 1",
    ),
    "values are no list": ({"templ_values": "'flute'"}, "question 20: got templ_values"),
    "values are no words": ({"templ_values": "[3]"}, "question 20: got templ_values"),
    "values are no Python": ({"templ_values": "[flute"}, "question 20: "),
    "values are code": ({"templ_values": "exit()"}, "question 20: "),
    "answer is a number": ({"anser": 2}, "question 20: got anser 2, expected a string"),
    "no answer": ({"anser": None}, "question 20: got anser None, expected a string"),
}


@pytest.mark.parametrize("fault", BAD_AVQA)
def test_avqa_refuses(avqa, fault):
    change, text = BAD_AVQA[fault]
    tree(avqa, {"avqa-test.json": [TEST[1], TEST[0] | change]})
    with pytest.raises(ValueError, match=rf"avqa-test\.json, {text}"):
        open_dataset("avqa", avqa, "test")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[{", r"avqa-test\.json: got no JSON \(.*line 1 column"),
        ({"a": 1}, r"avqa-test\.json: got JSON of the type dict, expected a list"),
        ([], r"avqa-test\.json: got no question"),
        ([3], r"avqa-test\.json, entry 0 \(question None\): expected video_id, .*type, got none"),
        ([TEST[0], {k: v for k, v in TEST[1].items() if k != "anser"}], r"entry 1 \(question 21\): expected anser, got none"),
        ([TEST[0], TEST[0]], r"avqa-test\.json: got questions about one video, 00000002, expected more"),
    ],
)
def test_avqa_refuses_files(avqa, content, text):
    tree(avqa, {"avqa-test.json": content})
    with pytest.raises(ValueError, match=text):
        open_dataset("avqa", avqa, "test")


@pytest.mark.parametrize("name", ["avqa-train.json", "avqa-test.json"])
def test_avqa_needs_the_train_questions_too(avqa, name):
    (avqa / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected {name} or json/{name} in it, got none"):
        open_dataset("avqa", avqa, "test")


def test_avqa_frames(avqa):
    tree(avqa, {f"frames/00000001/{number:08}.jpg": "" for number in (1, 2, 3)} | {"audio_wav/00000001.wav": ""})
    sample = open_dataset("avqa", avqa, "train").sample(2)
    files = tuple(avqa / f"frames/00000001/{number:08}.jpg" for number in (1, 2, 3))
    assert sample.video == Frames(files, tuple(range(10)), 10)
    assert sample.audio == avqa / "audio_wav/00000001.wav"


@pytest.mark.parametrize("folder", ["videos", "MUSIC-AVQA-videos-Real", "MUSIC-AVQA-videos-Synthetic"])
def test_avqa_containers(avqa, folder):
    tree(avqa / folder, {"00000001.mp4": ""})
    (avqa / "MUSIC-AVQA-videos-Other").mkdir()
    sample = open_dataset("avqa", avqa, "train").sample(0)
    assert sample.video.source == sample.audio == avqa / folder / "00000001.mp4"


@pytest.mark.parametrize("split", ["train", "test"])
def test_avqa_negatives(avqa, split):
    """One for each frame, at 60 places of every other video alike, drawn in tests, too."""
    tree(avqa / "videos", {f"0000000{number}.mp4": "" for number in (1, 2, 3, 9)})
    dataset = open_dataset("avqa", avqa, split)
    assert dataset.videos == {"train": ("00000001", "00000002", "00000003"), "test": ("00000002", "00000009")}[split]
    for index in range(len(dataset)):
        drawn = Counter()
        for epoch in range(120):
            sample = dataset.sample(index, epoch)
            assert len(sample.negatives) == 10
            for frames in sample.negatives:
                assert frames.of == 60
                (slot,) = frames.slots
                drawn[frames.source.stem, slot] += 1
        others = set(dataset.videos) - {sample.id}
        assert {video for video, _ in drawn} == others
        assert {slot for _, slot in drawn} == set(range(60))
        each = 1200 / (60 * len(others))
        assert max(drawn.values()) < each + 6 * each**0.5
        for video in others:
            assert sum(count for (other, _), count in drawn.items() if other == video) > 0.9 * 1200 / len(others) - 60


def test_avqa_draws_belong_to_the_item(avqa):
    tree(avqa / "videos", {f"0000000{number}.mp4": "" for number in (1, 2, 3)})
    one, other = open_dataset("avqa", avqa, "train"), pickle.loads(pickle.dumps(open_dataset("avqa", avqa, "train")))
    samples = {(index, epoch): one.sample(index, epoch).negatives for index in range(4) for epoch in range(3)}
    for key, negatives in reversed(samples.items()):
        assert other.sample(*key).negatives == negatives
    assert len(set(samples.values())) == 12
    assert open_dataset("avqa", avqa, "train", seed=5).sample(0).negatives != samples[0, 0]
    assert len(open_dataset("avqa", avqa, "train", config("avqa", 4)).sample(0).negatives) == 4


def test_avqa_without_negatives(avqa):
    """As evaluation reads it: all the rest is the same."""
    with_them, without = (open_dataset("avqa", avqa, "test", negatives=negatives) for negatives in (True, False))
    for index in range(len(without)):
        one, other = with_them.sample(index), without.sample(index)
        assert len(one.negatives) == 10
        assert other.negatives == ()
        assert (one.id, one.video, one.audio, one.meta) == (other.id, other.video, other.audio, other.meta)
        assert torch.equal(one.target["question"], other.target["question"])
    assert (with_them.places, without.places) == ((10, 60), (10,))

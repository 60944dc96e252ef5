"""`stgcma-fast data check` finds every file that is missing or broken, and nothing in a tree that is whole."""

import json
import shutil
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stgcma_fast.cli import main
from stgcma_fast.data import check
from stgcma_fast.data.check import check_root
from stgcma_fast.data.dataset import open_dataset
from stgcma_fast.data.synth import synthesize


def write_wav(path: Path, seconds: float = 0.1, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.random.default_rng(0).integers(-999, 999, int(seconds * rate), np.int16).tobytes())


def write_image(path: Path, width: int = 24, height: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_video) -> Path:
    """AVE of two containers and two clips of frames, nothing of which is wrong."""
    root = tmp_path_factory.mktemp("check") / "ave"
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 8000)).astype(np.float32)
    (root / "AVE").mkdir(parents=True)
    for clip in "ab":
        make_video(root / f"AVE/{clip}.mp4", frames=30, audio=sound)
    for clip in "cd":
        for number in range(1, 4):
            write_image(root / f"video_frames/{clip}/{number:04}.jpg")
        write_wav(root / f"raw_audio/{clip}.wav")
    rows = ["Bell&a&good&0&10", "Dog&b&good&1&3", "Bell&c&good&2&5", "Dog&d&good&0&10"]
    (root / "Annotations.txt").write_text("\n".join(rows))
    (root / "trainSet.txt").write_text("\n".join([rows[0], rows[2]]))
    (root / "valSet.txt").write_text(rows[1])
    (root / "testSet.txt").write_text(rows[3])
    return root


@pytest.fixture
def ave(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "ave [b]")  # no markup of the table's


def run(*arguments) -> int:
    return main(["data", "check", *map(str, arguments)])


def found(report, root: Path) -> set:
    return {(finding.kind, finding.where.removeprefix(f"{root}/"), finding.splits) for finding in report.findings}


@pytest.mark.parametrize("decode", [False, True])
def test_a_whole_data_set(ave, tmp_path, capsys, decode):
    assert run("--task", "ave", "--root", ave, "--json", tmp_path / "r.json", "--workers", 2, *["--decode"] * decode) == 0
    lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    for row in ("train 2 2 0 0 0 0 0", "val 1 1 0 0 0 0 0", "test 1 1 0 0 0 0 0"):
        assert row.split() in lines
    counts = {"train": 2, "val": 1, "test": 1}
    assert json.loads((tmp_path / "r.json").read_text()) == {"ok": True, "items": counts, "clips": counts, "findings": []}


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


FAULTS = {
    "missing container": ("missing", "AVE/a.mp4", Path.unlink, "there is no such file"),
    "missing wav": ("missing", "raw_audio/c.wav", Path.unlink, "there is no such file"),
    "missing folder": (
        "missing",
        "AVE/c.mp4",
        lambda path: shutil.rmtree(path.parents[1] / "video_frames/c"),
        "there is no such f",
    ),
    "empty folder": (
        "broken",
        "video_frames/c",
        lambda path: [file.unlink() for file in path.iterdir()],
        "it has no frames, images whose names end with a number",
    ),
    "empty container": ("broken", "AVE/a.mp4", lambda path: path.write_bytes(b""), "it is empty (0 bytes)"),
    "empty image": ("broken", "video_frames/c/0002.jpg", lambda path: path.write_bytes(b""), "it is empty (0 bytes)"),
    "empty wav": ("broken", "raw_audio/c.wav", lambda path: path.write_bytes(b""), "it is empty (0 bytes)"),
    "cut container": ("broken", "AVE/a.mp4", lambda path: cut(path, 0.6), ""),
    "cut wav": ("broken", "raw_audio/c.wav", lambda path: cut(path, 0.6), "it is cut off"),
    "text for a container": ("broken", "AVE/a.mp4", lambda path: path.write_text("not found\n" * 9), ""),
    "text for an image": ("broken", "video_frames/c/0002.jpg", lambda path: path.write_text("not found\n" * 9), ""),
    "text for a wav": ("broken", "raw_audio/c.wav", lambda path: path.write_text("not found\n" * 9), ""),
    "a sliver of an image": (
        "broken",
        "video_frames/c/0002.jpg",
        lambda path: write_image(path, 400, 8),
        "its frames are 400x8; at most 8192 a side are read",
    ),
    "an image of 16 bits": (
        "broken",
        "video_frames/c/0002.jpg",
        lambda path: Image.fromarray(np.zeros((16, 24), np.uint16)).save(path, "png"),
        "its pixels have more than 8 bits (mode I;16)",
    ),
    "another size": (
        "broken",
        "video_frames/c/0002.jpg",
        lambda path: write_image(path, 16, 24),
        "it is 16x24, but 0001.jpg of the same clip 24x16",
    ),
    "no sound": (
        "broken",
        "AVE/a.mp4",
        lambda path: shutil.copy(path.parents[1] / "silent.mp4", path),
        "it has no audio track",
    ),
    "a folder for a container": ("broken", "AVE/a.mp4", lambda path: (path.unlink(), path.mkdir()), ""),
}


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(ave, make_video, fault, decode):
    """One finding, which names file, split and cause, and nothing else."""
    kind, name, change, cause = FAULTS[fault]
    if fault == "no sound":
        make_video(ave / "silent.mp4", frames=3)
    change(ave / name)
    report = check_root("ave", ave, decode=decode, workers=2)
    assert {(finding.kind, finding.where, finding.splits) for finding in report.findings} == {
        (kind, str(ave / name), ("train",))
    }
    assert all(cause in finding.cause for finding in report.findings)
    assert not report.ok


DAMAGE = {
    "image": ("video_frames/d/0003.jpg", lambda path: cut(path, 0.7)),
    "container": ("AVE/a.mp4", lambda path: path.write_bytes(damaged(path.read_bytes()))),
}


def damaged(data: bytes) -> bytes:
    """Zeros in the middle of the packets, which stand between headers and index."""
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big")
    return data[: start + size // 4] + bytes(size // 2) + data[start + 3 * size // 4 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_decoding_finds_what_headers_do_not_tell(ave, damage):
    name, change = DAMAGE[damage]
    change(ave / name)
    assert check_root("ave", ave).ok
    report = check_root("ave", ave, decode=True)
    assert {(finding.kind, finding.where) for finding in report.findings} == {("broken", str(ave / name))}


def test_all_that_is_wrong_with_annotations_is_told_at_once(ave):
    """The files of the other rows are looked at nevertheless."""
    rows = (ave / "Annotations.txt").read_text().splitlines()
    rows += ["Bell&e&good&5&5", "Bell&f&good&3&11", "Bell&g&good&x&9", "Bell&h&9"]
    (ave / "Annotations.txt").write_text("\n".join(rows))
    (ave / "trainSet.txt").write_text("\n".join([*rows[:1], *rows[4:], "Cat&a&good&0&10", "Bell&a&good&0&9"]))
    for clip in "ef":
        shutil.copy(ave / "AVE/b.mp4", ave / f"AVE/{clip}.mp4")
    (ave / "AVE/a.mp4").unlink()
    report = check_root("ave", ave)
    every = ("train", "val", "test")
    assert found(report, ave) == {
        ("annotation", "Annotations.txt, line 5", ("train",)),  # its end is its start
        ("annotation", "Annotations.txt, line 6", ("train",)),  # beyond ten seconds
        ("annotation", "Annotations.txt, line 7", every),
        ("annotation", "Annotations.txt, line 8", every),
        ("annotation", "trainSet.txt, line 4", ("train",)),
        ("annotation", "trainSet.txt, line 5", ("train",)),
        ("annotation", "trainSet.txt, line 6", ("train",)),  # an unknown category
        ("annotation", "trainSet.txt, line 7", ("train",)),  # no such row
        ("missing", "AVE/a.mp4", ("train",)),
    }
    assert report.items == {"train": 3, "val": 1, "test": 1}
    assert not report.ok


def test_labels_of_hdf5(ave):
    """A second with two classes or none can be trained on, but is told; so are odd times, although they do not count."""
    import h5py

    labels = np.zeros((4, 10, 3), np.int64)
    labels[:, :, 2] = 1
    labels[1, 4] = 1, 0, 1
    labels[3, 9] = 0
    with h5py.File(ave / "labels.h5", "w") as file:
        file["avadataset"] = labels
    for name in ("Annotations.txt", "trainSet.txt"):
        (ave / name).write_text((ave / name).read_text().replace("Bell&c&good&2&5", "Bell&c&good&5&2"))
    assert found(check_root("ave", ave), ave) == {
        ("annotation", "labels.h5, row 1", ("val",)),
        ("annotation", "labels.h5, row 3", ("test",)),
        ("annotation", "Annotations.txt, line 3", ("train",)),
    }
    assert np.array_equal(open_dataset("ave", ave, "val").labels[0], labels[1])


def test_overlaps_and_duplicates_are_told_but_are_no_faults(ave):
    rows = (ave / "Annotations.txt").read_text().splitlines()
    (ave / "trainSet.txt").write_text("\n".join([rows[0], rows[2], rows[0]]))
    (ave / "testSet.txt").write_text("\n".join([rows[3], rows[2]]))
    report = check_root("ave", ave)
    assert found(report, ave) == {("duplicate", "a", ("train",)), ("overlap", "c", ("train", "test"))}
    assert (report.items, report.clips) == ({"train": 3, "val": 1, "test": 2}, {"train": 2, "val": 1, "test": 2})
    assert report.ok


def test_a_split_that_is_not_there(ave, capsys):
    (ave / "valSet.txt").unlink()
    assert run("--task", "ave", "--root", ave) == 1
    out = capsys.readouterr().out
    assert f"annotation (val): {ave}: expected val_order.h5 or" in out
    assert "missing (" not in out
    assert run("--task", "ave", "--root", ave, "--split", "train", "test") == 0


def test_the_command_names_files_and_counts_them(ave, monkeypatch, capsys):
    (ave / "AVE/a.mp4").unlink()
    (ave / "AVE/b.mp4").write_bytes(bytes(range(256)) * 9)
    cut(ave / "raw_audio/d.wav", 0.5)
    assert run("--task", "ave", "--root", ave) == 1
    out = capsys.readouterr().out
    assert f"missing (train): {ave}/AVE/a.mp4: there is no such file\n" in out
    assert f"broken (val): {ave}/AVE/b.mp4: it can not be read: " in out
    assert "more" not in out
    lines = [line.split() for line in out.replace("│", " ").splitlines()]
    for row in ("train 2 2 1 0 0 0 0", "val 1 1 0 1 0 0 0", "test 1 1 0 1 0 0 0"):
        assert row.split() in lines
    monkeypatch.setattr(check, "SHOWN", 1)
    run("--task", "ave", "--root", ave)
    assert "\nand 2 more, which --json FILE gets\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--task", "ave", "--subset", "s4"], "--subset s4: got it with --task ave, expected --task avs"),
        (["--task", "ave", "--json", "/nowhere/r.json"], "/nowhere/r.json"),
    ],
)
def test_the_command_refuses(ave, capsys, arguments, text):
    assert run("--root", ave, *arguments) == 1
    assert text in capsys.readouterr().err


def test_a_root_that_is_not_there(tmp_path):
    report = check_root("avqa", tmp_path / "none")
    assert [(finding.splits, finding.where, finding.cause) for finding in report.findings] == [
        (("train", "val", "test"), str(tmp_path / "none"), "no such folder")
    ]
    assert not report.ok


def test_a_data_set_checks_itself(ave):
    dataset = open_dataset("ave", ave, "train")
    assert dataset.check().ok
    assert dataset.check(decode=True).items == {"train": 2}
    cut(ave / "video_frames/c/0001.jpg", 0.7)
    assert dataset.check().ok
    assert found(dataset.check(decode=True), ave) == {("broken", "video_frames/c/0001.jpg", ("train",))}


def test_a_file_of_many_items_is_opened_once(tmp_path, monkeypatch):
    """MUSIC-AVQA asks about each video often, in several splits, and hears and sees it in one container."""
    from stgcma_fast.data import video

    (tmp_path / "videos").mkdir()
    fields = {"question_content": "How many?", "templ_values": "[]", "anser": "two", "type": "[]"}
    items = [{"video_id": clip, "question_id": number, **fields} for number, clip in enumerate("abab")]
    for split in ("train", "test"):
        (tmp_path / f"avqa-{split}.json").write_text(json.dumps(items))
    for clip in "ab":
        (tmp_path / f"videos/{clip}.mp4").touch()
    opened = Counter()
    monkeypatch.setattr(video, "frame_indices", lambda path, slots, of: opened.update([path.stem]))
    report = check_root("avqa", tmp_path, ["train", "test"])
    assert opened == {"a": 1, "b": 1}
    assert found(report, tmp_path) == {
        *(("overlap", clip, ("train", "test")) for clip in "ab"),
        *(("broken", f"videos/{clip}.mp4", ("train", "test")) for clip in "ab"),  # the sound's reader found them empty
    }


def test_avqa(tmp_path, make_video, monkeypatch):
    from stgcma_fast.data import video

    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 8000)).astype(np.float32)
    (tmp_path / "videos").mkdir()
    for clip in "ab":
        make_video(tmp_path / f"videos/{clip}.mp4", frames=70, size=(32, 32), audio=sound)
    fields = {"templ_values": "[]", "anser": "two", "type": "[]"}
    train = [{"video_id": clip, "question_id": 3, "question_content": "How many?"} | fields for clip in "ab"]
    test = [train[0], train[1] | {"question_content": "How much?"}, train[1] | {"anser": "six", "question_id": 4}, train[1]]
    for split, items in (("train", train), ("test", test)):
        (tmp_path / f"avqa-{split}.json").write_text(json.dumps(items))
    asked, read = set(), video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda frames: (asked.add((frames.source.stem, frames.slots)), read(frames))[1])
    report = check_root("avqa", tmp_path, ["train", "test"], decode=True)
    assert asked == {(clip, tuple(range(of))) for clip in "ab" for of in (10, 60)}  # 60: what negatives are drawn from
    assert found(report, tmp_path) == {
        ("annotation", "avqa-test.json, question 3", ("test",)),
        ("annotation", "avqa-test.json, question 4", ("test",)),
        ("duplicate", "3", ("train", "test")),
        ("overlap", "a", ("train", "test")),
        ("overlap", "b", ("train", "test")),
    }
    assert (report.items, report.clips) == ({"train": 2, "test": 2}, {"train": 2, "test": 2})


@pytest.mark.parametrize("subset", ["s4", "ms3"])
def test_avs(tmp_path, subset):
    table = {"s4": "name,n,category,split\nv,5,cat,train\nw,5,dog,val\n", "ms3": "video_id,split\nv,train\nw,val\n"}
    for name, text in table.items():
        (tmp_path / f"{name}_meta_data.csv").write_text(text)
    base = tmp_path / f"{subset}_data"
    for split, category, clip in (("train", "cat", "v"), ("val", "dog", "w")):
        folder = Path(split, category) if subset == "s4" else Path(split)
        frames = folder / clip if subset == "s4" else Path(clip)
        for number in (1, 2, 3, 4, 5):
            write_image(base / "visual_frames" / frames / f"{clip}_{number}.png")
            if split == "val" or subset == "ms3" or number == 1:
                write_image(base / "gt_masks" / folder / clip / f"{clip}_{number}.png")
        write_wav(base / "audio_wav" / folder / f"{clip}.wav")
    splits = ["train", "val"]
    assert not check_root("avs", tmp_path, splits).ok  # which of the two is not said
    assert check_root("avs", tmp_path, splits, decode=True, subset=subset).findings == ()
    assert run("--task", "avs", "--root", tmp_path, "--subset", subset, "--split", *splits) == 0
    (mask,) = base.glob("gt_masks/val/**/w_5.png")
    (image,) = base.glob("visual_frames/**/v_2.png")
    mask.unlink()
    image.write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    assert found(check_root("avs", tmp_path, splits, subset=subset), base) == {
        ("missing", str(mask.relative_to(base)), ("val",)),
        ("broken", str(image.relative_to(base)), ("train",)),
    }


@pytest.mark.parametrize(("task", "clips"), [("ave", 5), ("avs", 5), ("avqa", 10)])
def test_synthetic_sets_are_whole(tmp_path, task, clips):
    synthesize(task, tmp_path / "set", clips)
    report = check_root(task, tmp_path / "set", decode=True)
    assert report.findings == ()
    assert report.clips == {"train": 3 * clips // 5, "val": clips // 5, "test": clips // 5}

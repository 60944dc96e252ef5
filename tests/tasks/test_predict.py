"""`stgcma-fast predict`: its numbers are those of a test, files are what they are called, and what is wrong is named."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from stgcma_fast import FastSTGCMA, load_pretrained
from stgcma_fast.data import AVPipeline, Frames, MediaError, Sample, media_config, open_dataset
from stgcma_fast.data.augment import frames_to_tensor
from stgcma_fast.data.config import IMAGE_MEAN, IMAGE_STD
from stgcma_fast.reference.model import is_trainable
from stgcma_fast.tasks import Predictor, draw, predict
from stgcma_fast.tasks.predict import encode_question, find_clips, folder_names
from stgcma_fast.tasks.trained import DESCRIPTION, PREFIX, Description, backbone_digest, saved_state
from tests.data.conftest import numbered_frame, write_video
from tests.support.models import TINY_SWIN, seed, tiny_config

SECONDS, FRAMES = 2, 3
EVENTS = ("bell", "dog", "a long name of an event, which takes more than two lines beside a picture", "background")
ANSWERS = ("yes", "no", "two")
QUESTION = "How many bells are sounding in the video?"
NAMES = {"ave": (EVENTS, ()), "avs": ((), ()), "avqa": (ANSWERS, ("<pad>", *QUESTION[:-1].split(), "Is"))}
ASK = {"ave": [], "avs": [], "avqa": ["--question", QUESTION]}


@pytest.fixture(autouse=True)
def _one_thread():
    """Everything is small here: threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_clip(path: Path, *, number: int = 0, size: tuple[int, int] = (64, 48), sound: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [numbered_frame(16 * number + frame, *size) for frame in range(8 * SECONDS)]
    audio = np.random.default_rng(number).uniform(-0.3, 0.3, (1, 16000 * SECONDS)).astype(np.float32) if sound else None
    return write_video(path, images, fps=8, audio=audio)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder of two clips, of which one is upright, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "b wide.mp4", number=1)
    write_clip(folder / "a upright.mp4", number=2, size=(48, 64))
    (folder / "notes.txt").write_text("no clip")
    return folder


def save(path: Path, model: FastSTGCMA, **changes) -> Path:
    """A checkpoint as training writes it."""
    values = Description(model.config.to_dict(), "full", None, *NAMES[model.config.task])
    description = replace(values, **changes)
    state = {PREFIX + key: value for key, value in saved_state(model, description.weights).items()}
    torch.save({"state_dict": state, DESCRIPTION: description.to_dict()}, path)
    return path


def tiny(task: str) -> FastSTGCMA:
    """A model whose answers depend on what it is given."""
    classes, words = NAMES[task]
    sizes = {"num_classes": len(classes) or 1, "num_frames": FRAMES, **({"vocabulary": len(words)} if words else {})}
    model = seed(FastSTGCMA(tiny_config("swin", task=task, **sizes))).eval()
    if task == "avs":
        # So that a part of each frame sounds.
        with torch.no_grad():
            model.avstask_output_conv[-1].bias += 1
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders of runs."""
    folder = tmp_path_factory.mktemp("runs")
    for task in NAMES:
        (folder / task / "checkpoints").mkdir(parents=True)
        save(folder / task / "checkpoints/best.ckpt", tiny(task))
    return {task: folder / task for task in NAMES}


def run(*arguments) -> int:
    return predict.main(predict.parser().parse_args([str(argument) for argument in arguments]))


def strict_json(path: Path) -> dict:
    def refuse(name: str):
        raise AssertionError(f"{path} holds {name}, which is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# The numbers


@dataclass
class Files:
    """A data set of containers, as `predict` says where it takes frames and sound."""

    root: Path
    config: object
    split: str = "test"

    def __len__(self) -> int:
        return len(self._paths())

    def _paths(self) -> list[Path]:
        return sorted(self.root.glob("*.mp4"))

    def sample(self, index: int, epoch: int = 0) -> Sample:
        path = self._paths()[index]
        return Sample(path.stem, Frames(path, tuple(range(FRAMES)), FRAMES), path)


def dataset(task: str, clips: Path, root: Path):
    """The clips, in the published layout of AVE and of AVQA."""
    config = media_config(task, TINY_SWIN, FRAMES)
    if task == "avs":
        return Files(clips, config)
    paths = sorted(clips.glob("*.mp4"))
    folder = root / ("AVE" if task == "ave" else "videos")
    folder.mkdir(parents=True)
    for path in paths:
        shutil.copy(path, folder)
    if task == "ave":
        # The classes in the model's order.
        rows = [f"{event}&{paths[index % 2].stem}&good&0&2" for index, event in enumerate(EVENTS[:-1])]
        (root / "Annotations.txt").write_text("\n".join(rows))
        (root / "testSet.txt").write_text("\n".join(rows[:2]))
    else:
        items = [
            {"video_id": paths[index % 2].stem, "question_id": index, "type": "[]", "templ_values": "[]", "anser": answer}
            for index, answer in enumerate(ANSWERS)
        ]
        for item in items:
            item["question_content"] = QUESTION
        (root / "avqa-train.json").write_text(json.dumps(items))
        (root / "avqa-test.json").write_text(json.dumps(items[:2]))
    return open_dataset(task, root, "test", config)


@pytest.mark.parametrize("task", NAMES)
def test_a_prediction_is_what_a_test_is_made_of(task, clips, checkpoints, tmp_path):
    """To the bit: clip by clip, the model is given what a pipeline gives it."""
    predictor, model = Predictor(checkpoints[task]), tiny(task)
    question = QUESTION if task == "avqa" else None
    pipeline = AVPipeline(dataset(task, clips, tmp_path), 1, backend="pyav", workers=0)
    paths = sorted(clips.glob("*.mp4"))
    for path, batch in zip(paths, pipeline, strict=True):
        assert batch["id"] == [path.stem]
        prediction = predictor(path, question=question)
        with torch.inference_mode():
            if task == "ave":
                torch.testing.assert_close(
                    prediction.probabilities, model(batch["audio"], batch["video"]).softmax(-1), rtol=0, atol=0
                )
            elif task == "avs":
                logits, _, _ = model(batch["audio"], batch["video"])
                torch.testing.assert_close(prediction.probabilities, logits[:, 0].sigmoid(), rtol=0, atol=0)
                assert torch.equal(prediction.masks, logits[:, 0] > 0)
            else:
                logits, matches, _ = model(batch["audio"], batch["video"], batch["negative"], batch["question"])
                expected = dict(zip(ANSWERS, logits[0].softmax(-1).tolist(), strict=True))
                assert dict(prediction.answers) == pytest.approx(expected, rel=1e-5)
                torch.testing.assert_close(prediction.matches, matches.softmax(-1)[:, 1])
                assert [answer for answer, _ in prediction.answers] == sorted(ANSWERS, key=expected.get, reverse=True)
    # Read ahead by another process, they are the same.
    one, two = predictor.stream(paths, question=question)
    assert (one.clip.path, two.clip.path) == tuple(paths)
    assert two.to_dict() == prediction.to_dict()
    assert one.to_dict() != {**two.to_dict(), "file": str(paths[0])}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(clips, checkpoints, dtype):
    full, half = (Predictor(checkpoints["ave"], device="cpu", dtype=kind) for kind in ("float32", dtype))
    assert half.model.layers[0].blocks[0].attn.qkv.weight.dtype == getattr(torch, dtype)
    one, other = (predictor(clips / "b wide.mp4").probabilities for predictor in (full, half))
    assert other.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=0, atol=0.05)
    assert not torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("task", NAMES)
def test_a_gpu_predicts_what_a_cpu_does(task, clips, checkpoints):
    question = QUESTION if task == "avqa" else None
    for dtype, within in (("float32", 1e-3), (None, 0.05)):
        gpu, cpu = (Predictor(checkpoints[task], device=device, dtype=dtype) for device in ("cuda", "cpu"))
        assert gpu.dtype == (dtype or "bfloat16")
        one, other = (predictor(clips / "b wide.mp4", question=question) for predictor in (gpu, cpu))
        if task == "avqa":
            assert dict(one.answers) == pytest.approx(dict(other.answers), abs=within)
        else:
            torch.testing.assert_close(one.probabilities, other.probabilities, rtol=0, atol=within)


# The command


def test_ave_of_a_folder(clips, checkpoints, tmp_path, capsys):
    """Every container of it, in the order of names; a clip of 2 s has three segments."""
    assert run("--checkpoint", checkpoints["ave"], "--task", "ave", "--out", tmp_path / "new/out", clips) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == ["a upright", "b wide"]
    assert printed.index("a upright.mp4") < printed.index("b wide.mp4")
    for name in ("a upright", "b wide"):
        folder = tmp_path / "new/out" / name
        values = strict_json(folder / "prediction.json")
        expected = Predictor(checkpoints["ave"])(clips / f"{name}.mp4")
        assert values == expected.to_dict()
        assert values["file"] == str(clips / f"{name}.mp4")
        assert values["task"] == "ave"
        assert values["checkpoint"] == str(checkpoints["ave"] / "checkpoints/best.ckpt")
        # AAC's last frame is longer than the clip.
        assert values["duration"] == pytest.approx(SECONDS, abs=0.1)
        times = [(part["start"], part["end"]) for part in values["segments"]]
        thirds = [values["duration"] * third / 3 for third in range(4)]
        assert np.allclose(times, list(pairwise(thirds)), atol=1e-3)
        for part, event in zip(values["segments"], expected.events, strict=True):
            assert tuple(part["probabilities"]) == EVENTS
            assert sum(part["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert part["probabilities"][part["event"]] == part["probability"] == max(part["probabilities"].values())
            assert event.event == part["event"]
            assert f"{event.probability:.2f}" in printed
        assert Image.open(folder / "timeline.png").convert("RGB").getextrema() == ((0, 255),) * 3


def test_avs_writes_masks_overlays_and_a_video(clips, checkpoints, tmp_path):
    """The video has the frames and the overlays beside each other, each for its share of the time, and the sound."""
    assert run(clips / "b wide.mp4", "--checkpoint", checkpoints["avs"], "--out", tmp_path) == 0
    folder = tmp_path / "b wide"
    names = [f"{kind}_{number}.png" for kind in ("mask", "overlay") for number in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "overlay.mp4", "prediction.json"])
    prediction = Predictor(checkpoints["avs"])(clips / "b wide.mp4")
    values = strict_json(folder / "prediction.json")
    for part, probability in zip(values["segments"], prediction.probabilities, strict=True):
        assert part["sounding_share"] == pytest.approx((probability > 0.5).float().mean().item(), abs=1e-6)
        assert part["mean_probability"] == pytest.approx(probability.mean().item(), abs=1e-6)
        assert part["max_probability"] == pytest.approx(probability.max().item(), abs=1e-6)
    images, masks = draw.overlay(prediction.clip.frames, prediction.probabilities, 0.5)
    assert masks.any()
    for number, (image, mask) in enumerate(zip(images, masks, strict=True), 1):
        assert np.array_equal(np.asarray(Image.open(folder / f"mask_{number}.png")), mask.numpy() * 255)
        assert np.array_equal(np.asarray(Image.open(folder / f"overlay_{number}.png")), image.numpy())
    with av.open(str(folder / "overlay.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
        assert float(video.duration * video.time_base) == pytest.approx(prediction.clip.duration, abs=0.05)
        assert float(audio.duration * audio.time_base) == pytest.approx(prediction.clip.duration, abs=0.2)
    assert len(shown) % FRAMES == 0
    sides = torch.cat([prediction.clip.frames, images], 2).numpy()
    for number, frame in enumerate(shown):
        assert frame.shape == (48, 128, 3)
        # Of an encoder: near, and nearer than the other frames.
        differences = [np.abs(frame.astype(int) - side).mean() for side in sides]
        assert np.argmin(differences) == number * FRAMES // len(shown)
        assert min(differences) < 20


def test_avqa_answers(clips, checkpoints, tmp_path, capsys):
    assert run(clips / "b wide.mp4", "--checkpoint", checkpoints["avqa"], "--out", tmp_path, *ASK["avqa"]) == 0
    printed = capsys.readouterr().out
    values = strict_json(tmp_path / "b wide/prediction.json")
    assert values["question"] == QUESTION
    assert set(values["probabilities"]) == set(ANSWERS)
    assert values["probability"] == values["probabilities"][values["answer"]] == max(values["probabilities"].values())
    assert len(values["segments"]) == FRAMES
    assert all(0 <= part["match_probability"] <= 1 for part in values["segments"])
    assert all(answer in printed and f"{value:.2f}" in printed for answer, value in values["probabilities"].items())
    Image.open(tmp_path / "b wide/answers.png").load()


def test_a_broken_file_stops_no_other(clips, checkpoints, tmp_path, capsys):
    """Each is named with its cause."""
    broken = tmp_path / "c.mp4"
    broken.write_bytes((clips / "b wide.mp4").read_bytes()[:2000])
    silent = write_clip(tmp_path / "silent.mp4", sound=False)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    given = (broken, clips, silent, tmp_path / "nowhere.mp4", tmp_path / "empty")
    assert run("--checkpoint", checkpoints["ave"], "--out", out, *given) == 1
    errors = capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["a upright", "b wide"]
    for path, cause in (
        (broken, "it can not be read"),
        (silent, "it has no audio track, only video"),
        (tmp_path / "nowhere.mp4", "there is no such file"),
        (tmp_path / "empty", "it holds no clip, expected files that end in .mp4"),
    ):
        assert f"failed: {path}: {cause}" in errors
    with pytest.raises(MediaError, match="no audio track"):
        Predictor(checkpoints["ave"])(silent)


def test_files_of_one_name_get_folders_of_their_own(clips, checkpoints, tmp_path):
    """A file that is given twice, by itself and with its folder, is one."""
    other = write_clip(tmp_path / "other/b wide.mp4", number=3)
    assert run("--checkpoint", checkpoints["ave"], "--out", tmp_path / "out", clips / "b wide.mp4", other, clips) == 0
    files = {path.parent.name: strict_json(path)["file"] for path in (tmp_path / "out").glob("*/prediction.json")}
    assert files == {
        "b wide": str(clips / "b wide.mp4"),
        "b wide-2": str(other),
        "a upright": str(clips / "a upright.mp4"),
    }
    assert folder_names([Path(name) for name in ("a.mp4", "x/A.mkv", "a-2.mp4", "y/a.mp4")]) == ["a", "A-2", "a-2-2", "a-3"]


def test_what_is_not_finite_is_a_failure(clips, tmp_path, capsys):
    """JSON has no NaN: nothing is written."""
    model = tiny("ave")
    with torch.no_grad():
        next(model.mlp_head.parameters()).fill_(1e30)
    save(tmp_path / "huge.ckpt", model)
    arguments = ("--checkpoint", tmp_path / "huge.ckpt", "--device", "cpu", "--dtype", "float16", "--out", tmp_path / "out")
    assert run(clips / "b wide.mp4", *arguments) == 1
    assert "b wide.mp4: what the model makes of it in float16 is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_name_that_is_no_text(clips, checkpoints, tmp_path, capsys):
    """Old disks have such; JSON and terminals have letters alone."""
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(clips / "b wide.mp4", tmp_path / name)
    assert run(tmp_path / name, "--checkpoint", checkpoints["avs"], "--out", tmp_path / "out") == 0
    assert run(tmp_path / name, "--checkpoint", checkpoints["ave"], "--out", tmp_path / "out") == 0
    capsys.readouterr().out.encode()
    (folder,) = (tmp_path / "out").iterdir()
    assert strict_json(folder / "prediction.json")["file"] == f"{tmp_path}/caf?.mp4"


@pytest.mark.parametrize("size", [(2, 34), (33, 21)])
@pytest.mark.parametrize("duration", [0.05, 2.0, 3e9])
def test_a_video_of_any_size_and_duration(tmp_path, size, duration):
    """The last is what a damaged header may say: the file is no larger for it."""
    images = (torch.arange(FRAMES * size[0] * size[1] * 3) % 251).view(FRAMES, *size, 3).byte()
    clip = predict.Clip(Path("a.mp4"), images, images, images, torch.zeros(800), 16000, duration)
    draw.write_video(tmp_path / "clip:1.mp4", images, clip)
    with av.open(os.path.abspath(tmp_path / "clip:1.mp4")) as container:
        frames = list(container.decode(container.streams.video[0]))
    assert {(frame.height, frame.width) for frame in frames} == {tuple(side + side % 2 for side in size)}
    assert FRAMES <= len(frames) <= 100 * FRAMES
    assert len(frames) % FRAMES == 0


# What is refused before anything is read


def test_a_task_that_is_not_the_checkpoints(clips, checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"task: got 'avs', but .*best\.ckpt is of 'ave'"):
        run(clips, "--task", "avs", "--checkpoint", checkpoints["ave"], "--out", tmp_path)


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (None, "question: got None for the task 'avqa', expected a question"),
        ("  ?", "expected words"),
        ("Is the bell sounding?", r"expected words that the model was trained with, got 'bell' \(nearest: 'bells'\)"),
        ("how many xylophones are in the video", r"got 'how' \(nearest: 'How'.*\), 'xylophones'$"),
        ("Is <pad> sounding", "got '<pad>'"),
        (" ".join(["the"] * 15), "got 15 words, expected 14 at most"),
    ],
)
def test_a_question_that_the_model_can_not_read(clips, checkpoints, tmp_path, question, text):
    with pytest.raises(ValueError, match=text):
        run(clips, "--checkpoint", checkpoints["avqa"], "--out", tmp_path, *(["--question", question] if question else []))


def test_a_question_for_a_task_without(clips, checkpoints):
    with pytest.raises(ValueError, match="got 'Is it?' for the task 'ave', expected None".replace("?", r"\?")):
        Predictor(checkpoints["ave"])(clips / "b wide.mp4", question="Is it?")


def test_words_of_a_question():
    words = NAMES["avqa"][1]
    expected = [[words.index("Is"), words.index("the"), words.index("video"), *[0] * 11]]
    for question in ("Is the video?", "Is the video", " Is the video ? "):
        encoded = encode_question(question, words)
        assert encoded.dtype == torch.int64
        assert encoded.tolist() == expected


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no archive", "is truncated or is no checkpoint"),
        ({"weight": torch.ones(1)}, "expected a checkpoint that `stgcma-fast fit` wrote"),
        (None, "expected a checkpoint, or a folder"),
    ],
)
def test_what_is_no_checkpoint(clips, tmp_path, content, text):
    path = tmp_path / "some.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        run(clips, "--checkpoint", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("task", "changes", "text"),
    [
        ("ave", {"classes": EVENTS[:-1]}, "got 3 classes, expected 4 as the model has"),
        ("avqa", {"words": ("<pad>", "Is")}, "got 2 words, expected 10 as the model has"),
    ],
)
def test_names_that_do_not_fit_the_model(tmp_path, task, changes, text):
    with pytest.raises(ValueError, match=text):
        Predictor(save(tmp_path / "odd.ckpt", tiny(task), **changes))


def test_adapters_without_their_backbone(clips, tmp_path):
    path = save(tmp_path / "adapters.ckpt", tiny("ave"), weights="adapters", pretrained=str(tmp_path / "swin.pth"))
    with pytest.raises(FileNotFoundError, match=r"adapters\.ckpt holds adapters alone.*swin\.pth.*pretrained"):
        run(clips, "--checkpoint", path, "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds adapters alone.*elsewhere\.pth"):
        run(clips, "--checkpoint", path, "--out", tmp_path / "out", "--pretrained", tmp_path / "elsewhere.pth")


def test_adapters_beside_their_backbone(clips, tmp_path):
    """They predict what the whole model does, wherever the backbone's file has gone."""
    model = tiny("ave")
    frozen = {key: value for key, value in model.state_dict().items() if not is_trainable(key) and "_audio" not in key}
    frozen["patch_embed.proj.weight"] = frozen["patch_embed.proj.weight"].squeeze(2)
    torch.save({"model": frozen}, tmp_path / "swin.pth")
    load_pretrained(model, tmp_path / "swin.pth")  # audio's patches come from the file, too
    whole = Predictor(save(tmp_path / "whole.ckpt", model))(clips / "b wide.mp4")
    changes = {"weights": "adapters", "pretrained": str(tmp_path / "gone.pth"), "backbone": backbone_digest(model)}
    adapters = save(tmp_path / "adapters.ckpt", model, **changes)
    assert run(clips, "--checkpoint", adapters, "--out", tmp_path / "out", "--pretrained", tmp_path / "swin.pth") == 0
    values = strict_json(tmp_path / "out/b wide/prediction.json")
    assert values["segments"] == whole.to_dict()["segments"]


def test_hidden_files_of_a_folder_are_no_clips(tmp_path):
    """macOS keeps a second file beside each on other file systems."""
    for name in ("b.mp4", "._b.mp4", "a.webm"):
        (tmp_path / name).touch()
    assert find_clips([tmp_path]) == ([tmp_path / "a.webm", tmp_path / "b.mp4"], [])
    assert find_clips([tmp_path / "._b.mp4"]) == ([tmp_path / "._b.mp4"], [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(checkpoints):
    with pytest.raises(ValueError, match="device: got 'cuda', but PyTorch finds no GPU here"):
        Predictor(checkpoints["ave"], device="cuda")


# Pictures


def page(classes: int) -> draw.Figure:
    """Of a clip with a strange name and long names of classes, of which another is first in each segment."""
    frames = torch.zeros(10, 64, 36, 3, dtype=torch.uint8)
    path = Path("$an_odd^name$ of a clip, which somebody who liked long names made " + 12 * "longer and " + "longer.mp4")
    clip = predict.Clip(path, torch.zeros(1), torch.zeros(1), frames, torch.zeros(16000 * 10), 16000, 10.0)
    probabilities = torch.full((10, classes), 0.3 / classes)
    probabilities[torch.arange(10), torch.arange(10) % classes] += 0.7
    return draw.timeline(clip, probabilities, [f"{EVENTS[2]} {number}" for number in range(classes)])


@pytest.mark.parametrize("classes", [1, 2, 7, 29])
def test_texts_of_a_picture_do_not_overlap(classes):
    figure = page(classes)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 10 * min(classes, 6)
    for text, box in zip(texts, boxes, strict=True):
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) > -1, text
    for (one, box), (other, another) in combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(another), (one, other)


def test_main_classes():
    """All that are first somewhere, and others up to six; ordered by their means."""
    probabilities = torch.full((3, 29), 0.01)
    probabilities[0, 4] = probabilities[1, 9] = probabilities[2, 9] = 0.6
    probabilities[:, 20] = 0.1
    shown = draw.main_classes(probabilities)
    assert shown[:3] == [9, 4, 20]
    assert len(set(shown)) == 6
    assert len(draw.main_classes(torch.eye(10))) == 10
    assert draw.main_classes(torch.ones(4, 1)) == [0]


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (101, 60), (56, 56), (300, 77)])
def test_a_mask_lies_where_the_model_looks(size):
    """What is white there and black elsewhere is white to the model, and what it does not see is darker in an overlay."""
    height, width = size
    top, left, side = draw.seen(height, width, 56)
    frame = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    frame[:, top : top + side, left : left + side] = 255
    white = (1 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    given = frames_to_tensor(frame, media_config("avs", TINY_SWIN, 1).video)[0] / white[:, None, None]
    # The outermost pixels are mixed with what is beside them.
    torch.testing.assert_close(given[:, 1:-1, 1:-1], torch.ones(3, 54, 54))
    quarter = torch.zeros(1, 56, 56)
    quarter[:, :28, :28] = 1
    grey = torch.full_like(frame, 200)
    image, mask = draw.overlay(grey, quarter, 0.5)
    expected = torch.zeros(1, height, width, dtype=torch.bool)
    expected[:, top : top + side // 2, left : left + side // 2] = True
    assert (mask != expected).sum() <= 2 * side
    outside = frame[..., 0] == 0
    assert not mask[outside].any()
    untouched = outside & ~torch.nn.functional.max_pool2d(mask.float(), 3, 1, 1).bool()
    assert (image[untouched] == 100).all()
    assert (image[mask] != grey[mask]).any(-1).all()


def test_frames_of_pictures_are_not_larger_than_a_screen_needs(tmp_path):
    path = write_clip(tmp_path / "large.mp4", size=(1280, 64))
    clip = predict.read_clip(path, media_config("avs", TINY_SWIN, FRAMES))
    assert clip.frames.shape == (FRAMES, 48, 960, 3)
    assert clip.video.shape == (FRAMES, 3, 56, 56)

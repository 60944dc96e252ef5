"""Synthetic sets say of their files what the files show and sound like, and survive being stopped."""

import ast
import csv
import json
import signal
import subprocess
import sys
import time
import wave
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stgcma_fast.data import synth
from stgcma_fast.data.synth import FPS, SAMPLE_RATE, synthesize

COLOURS = {"circle": (220, 45, 45), "square": (45, 190, 60), "triangle": (60, 85, 230), "cross": (230, 210, 45)}
BANDS = {"hum": (150, 1020), "chirp": (1060, 2450), "hiss": (2650, 4700), "pulse": (5100, 6500)}
SOUND_OF = dict(zip(COLOURS, BANDS, strict=True))


@pytest.fixture(scope="module", params=["h264", "vp9"])
def ave(request, tmp_path_factory):
    return _make("ave", tmp_path_factory, codec=request.param, workers=1)


@pytest.fixture(scope="module")
def avs(tmp_path_factory):
    return _make("avs", tmp_path_factory)


@pytest.fixture(scope="module")
def avqa(tmp_path_factory):
    return _make("avqa", tmp_path_factory, clips=10)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return _make("ave", tmp_path_factory, clips=9, workers=3)


def _make(task, tmp_path_factory, clips=5, **options):
    out = tmp_path_factory.mktemp(task) / "set"
    assert synthesize(task, out, clips, **options) == clips
    return out


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def decode(path):
    """Frames uint8 [M, H, W, 3] and the waveform at 16 kHz, float64."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        parts = [part.to_ndarray()[0] for frame in [*container.decode(audio=0), None] for part in resampler.resample(frame)]
    return frames, np.concatenate(parts).astype(float)


def pixels(frame, shape):
    """Where a frame has the colour of a shape."""
    return np.abs(frame.astype(int) - COLOURS[shape]).max(-1) < 45


def rms(waveform, sound):
    """Of the band of frequencies that is the sound's."""
    spectrum = np.fft.rfft(waveform)
    f = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    low, high = BANDS[sound]
    return np.sqrt(2 * np.sum(np.abs(spectrum[(f >= low) & (f <= high)]) ** 2)) / len(waveform)


def second(waveform, s):
    return waveform[int((s + 0.08) * SAMPLE_RATE) : int((s + 0.82) * SAMPLE_RATE)]


def test_ave_annotations_say_what_is_seen_and_heard(ave):
    header, *lines = (ave / "Annotations.txt").read_text().splitlines()
    assert header == "Category&VideoID&Quality&StartTime&EndTime"
    parts = [(ave / f"{name}Set.txt").read_text().splitlines() for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [3, 1, 1]
    assert sorted(line for part in parts for line in part) == sorted(lines)
    background = Counter()
    for line in lines:
        category, name, quality, start, stop = line.split("&")
        frames, waveform = decode(ave / "AVE" / f"{name}.mp4")
        assert frames.shape == (10 * FPS, 240, 320, 3)
        assert abs(len(waveform) - 10 * SAMPLE_RATE) <= 2048  # codecs fill up their last frame
        seen = [{shape for shape in COLOURS if pixels(frames[s * FPS + FPS // 2], shape).sum() > 1000} for s in range(10)]
        heard = [{sound for sound in BANDS if rms(second(waveform, s), sound) > 0.012} for s in range(10)]
        both = [s for s in range(10) if seen[s] and heard[s]]
        assert both == list(range(int(start), int(stop)))
        assert {f"{shape} {sound}" for s in both for shape in seen[s] for sound in heard[s]} == {category}
        assert quality == "good"
        for s in set(range(10)) - set(both):
            background[bool(seen[s]), bool(heard[s])] += 1
            # Nothing else is there, either, and the whole second is alike.
            assert seen[s] | heard[s] <= set(category.split())
            assert bool(seen[s]) == any(pixels(f, category.split()[0]).sum() > 1000 for f in frames[s * FPS : (s + 1) * FPS])
    assert background[True, False] > 0
    assert background[False, True] > 0


@pytest.mark.parametrize("ave", ["vp9"], indirect=True)
def test_vp9_is_read_by_dali_without_a_gpu(ave):
    dali = pytest.importorskip("nvidia.dali")
    path = ave / "AVE" / "synth000001.mp4"

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        return dali.fn.decoders.video(dali.fn.readers.file(files=[str(path)])[0], device="cpu")

    built = pipeline()
    built.build()
    got = np.asarray(built.run()[0].at(0))
    expected, _ = decode(path)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < 3


def test_ave_needs_both_eye_and_ear():
    """Even who knows a whole clip of one modality, and the statistics of all, is right in at most three of four seconds."""
    clips = [synth.script("ave", 0, index) for index in range(6000)]
    spans, labels = [], []
    for clip in clips:
        (shape,), (sound,) = clip.shapes, clip.sounds
        spans.append(((shape.kind, shape.start, shape.stop), (sound.kind, sound.start, sound.stop)))
        event = range(max(shape.start, sound.start), min(shape.stop, sound.stop))
        labels.append([(shape.kind, sound.kind) if s in event else None for s in range(10)])
    flat = Counter(label for clip in labels for label in clip)
    assert len(flat) == 10
    accuracy = [max(flat.values()) / flat.total()]
    for modality in range(2):
        seen = defaultdict(Counter)
        for span, clip in zip(spans, labels, strict=True):
            for s, label in enumerate(clip):
                seen[span[modality], s][label] += 1
        accuracy.append(sum(max(count.values()) for count in seen.values()) / flat.total())
    assert max(accuracy) < 0.7


def test_avs_masks_are_of_what_sounds(avs):
    with open(avs / "s4_meta_data.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["name", "start", "category", "split"]
        rows = list(reader)
    assert [row["split"] for row in rows] == ["train", "train", "train", "val", "test"]
    data, files = avs / "s4_data", 0
    for row in rows:
        name, category, split = row["name"], row["category"], row["split"]
        frames, waveform = decode(data / "raw_videos" / split / category / f"{name}.mp4")
        with wave.open(str(data / "audio_wav" / split / category / f"{name}.wav")) as wav:
            assert (wav.getframerate(), wav.getnchannels(), wav.getnframes()) == (SAMPLE_RATE, 1, 5 * SAMPLE_RATE)
            exact = np.frombuffer(wav.readframes(wav.getnframes()), "<i2") / 32768
        for sounds in (waveform, exact):
            assert max(BANDS, key=lambda sound: rms(sounds[:64000], sound)) == SOUND_OF[category]
        places = np.linspace(1, len(frames), 5).astype(int) - 1
        for number, place in enumerate(places, 1):
            image = np.asarray(Image.open(data / "visual_frames" / split / category / name / f"{name}_{number}.png"))
            assert image.shape == (224, 224, 3)
            assert np.abs(image.astype(int) - frames[place]).mean() < 8
            assert 2 <= sum(pixels(image, shape).sum() > 500 for shape in COLOURS) <= 3
            path = data / "gt_masks" / split / category / name / f"{name}_{number}.png"
            assert path.exists() is (split != "train" or number == 1)
            if path.exists():
                mask = np.asarray(Image.open(path))
                files += 1
                assert set(np.unique(mask)) == {0, 255}
                assert np.array_equal(mask == 255, pixels(image, category))
    assert files == 3 * 1 + 2 * 5


def _answer(kinds, words, places, seconds, loudness):
    """An answer from what was measured: position of each seen shape; seconds and loudness of each heard one's sound."""
    both = [shape for shape in places if shape in seconds]
    numbers = ["zero", "one", "two", "three"]
    match kinds:
        case ["Audio", "Counting"]:
            return numbers[len(seconds)]
        case ["Audio", "Comparative"]:
            return "yes" if max(loudness, key=loudness.get) == words[0] else "no"
        case ["Visual", "Counting"]:
            return numbers[len(places)]
        case ["Visual", "Location"]:
            return places[words[0]]
        case ["Audio-Visual", "Existential"]:
            return "yes" if words[0] in both else "no"
        case ["Audio-Visual", "Counting"]:
            return numbers[len(both)]
        case ["Audio-Visual", "Location"]:
            return places[words[0]] if words[0] in both else "nowhere"
        case ["Audio-Visual", "Comparative"]:
            return "yes" if len(places) > len(seconds) else "no"
        case ["Audio-Visual", "Temporal"]:
            return "yes" if words[0] in both and len(seconds[words[0]]) == max(map(len, seconds.values())) else "no"
    raise AssertionError(kinds)


def _records(folder, *splits):
    return [record for split in splits for record in json.loads((folder / f"avqa-{split}.json").read_text())]


def test_avqa_answers_are_right(avqa):
    records = _records(avqa, "train", "val", "test")
    assert len({record["question_id"] for record in records}) == len(records)
    assert len({record["video_id"] for record in records}) == 10
    assert len(list((avqa / "videos").iterdir())) == 10
    measured, types = {}, set()
    for record in records:
        name = record["video_id"]
        if name not in measured:
            frames, waveform = decode(avqa / "videos" / f"{name}.mp4")
            assert frames.shape == (10 * FPS, 240, 320, 3)
            places, seconds, loudness = {}, {}, {}
            for shape, sound in SOUND_OF.items():
                x = [pixels(frame, shape).nonzero()[1] for frame in frames[:: FPS // 2]]
                assert len({len(row) > 500 for row in x}) == 1  # seen always or never
                if len(x[0]) > 500:
                    thirds = {int(np.median(row) // 107) for row in x}
                    places[shape] = ["left", "middle", "right"][thirds.pop()]
                    assert not thirds
                levels = [rms(second(waveform, s), sound) for s in range(9)]
                loud = [s for s in range(9) if levels[s] > 0.008]
                if loud:
                    assert loud == list(range(loud[0], loud[-1] + 1))
                    assert len(loud) % 3 == 0
                    seconds[shape], loudness[shape] = loud, levels[loud[0]]
            # They take turns, and one of them is much louder than the others.
            assert sorted(s for heard in seconds.values() for s in heard) == list(range(9))
            assert sum(level > 0.06 for level in loudness.values()) == 1
            measured[name] = places, seconds, loudness
        kinds, words = ast.literal_eval(record["type"]), ast.literal_eval(record["templ_values"])
        types.add(tuple(kinds))
        assert record["anser"] == _answer(kinds, words, *measured[name]), record
    assert len(types) == 9


def _words(record):
    """As the published reader finds them."""
    words = record["question_content"].rstrip().split(" ")
    words[-1] = words[-1][:-1]
    values = iter(ast.literal_eval(record["templ_values"]))
    words = [next(values) if "<" in word else word for word in words]
    assert next(values, None) is None
    return words


@pytest.mark.parametrize("clips", [10, 11, 12, 13, 20, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_avqa_training_knows_all_words(clips, seed, tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "_files", lambda task, seed, index, codec: {synth._clip(task, index): b""})
    synthesize("avqa", tmp_path / "set", clips, seed=seed, workers=1)
    train = _records(tmp_path / "set", "train")
    vocabulary = {word for record in train for word in _words(record)}
    answers = {record["anser"] for record in train}
    assert len({record["type"] for record in train}) == 9
    if clips == 100:
        assert all(len({record["type"] for record in _records(tmp_path / "set", split)}) == 9 for split in ("val", "test"))
    for split in ("val", "test"):
        others = _records(tmp_path / "set", split)
        assert others
        for record in others:
            assert set(_words(record)) <= vocabulary
            assert record["anser"] in answers
    for record in train + others:
        assert record["question_content"].endswith("?")
        assert len(_words(record)) == 14


def test_avqa_needs_question_eye_and_ear():
    """Who knows all statistics, but has the question alone, or one modality beside it, is often wrong."""
    answers = defaultdict(lambda: defaultdict(Counter))
    for index in range(6000):
        clip = synth.script("avqa", 0, index)
        seen = frozenset((shape.kind, shape.zone[0]) for shape in clip.shapes)
        heard = tuple((sound.kind, sound.start, sound.stop, sound.loudness) for sound in clip.sounds)
        for _, _, text, values, answer in synth._questions(0, index):
            for modality, known in (("none", None), ("visual", seen), ("audio", heard)):
                answers[modality][(text, *values, known)][answer] += 1
    assert max(max(count.values()) / count.total() for count in answers["none"].values()) < 0.7
    for modality, best in (("none", 0.48), ("visual", 0.72), ("audio", 0.7)):
        counts = answers[modality].values()
        assert sum(max(count.values()) for count in counts) / sum(count.total() for count in counts) < best


@pytest.mark.parametrize("ave", ["h264"], indirect=True)
def test_a_clip_is_the_same_in_any_set(ave, avs, unbroken, tmp_path):
    """For any number of clips and workers, and in the repeat. x264 needed an option for it."""
    small, large = contents(ave), contents(unbroken)
    clips = [name for name in small if name.endswith("mp4")]
    assert len(clips) == 5
    assert {name: large[name] for name in clips} == {name: small[name] for name in clips}
    synthesize("avs", tmp_path / "repeat", 5)
    assert contents(avs) == contents(tmp_path / "repeat")


@pytest.mark.parametrize("task", ["ave", "avs", "avqa"])
def test_another_seed_is_another_set(task):
    scripts = {repr(synth.script(task, seed, index)) for seed in range(5) for index in range(20)}
    assert len(scripts) == 100


def _start(folder, clips):
    """The command in a process of its own, stopped by the test when it has made some clips and not all."""
    command = ["-m", "stgcma_fast.cli", "data", "synth", "--task", "ave", "--out", str(folder)]
    command += ["--clips", str(clips), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests in a shell's background ignore ^C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(folder.rglob("*.mp4"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_is_finished_by_the_next(stop, unbroken, tmp_path):
    process = _start(tmp_path / "set", 9)
    process.send_signal(stop)
    _, errors = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[stop]
    assert "Traceback" not in errors
    assert not (tmp_path / "set" / "Annotations.txt").exists()
    found = {name: content for name, content in contents(tmp_path / "set").items() if name.endswith(".mp4")}
    assert synthesize("ave", tmp_path / "set", 9) == 9 - len(found) > 0
    finished = contents(tmp_path / "set")
    assert finished == contents(unbroken)
    assert found.items() <= finished.items()
    assert synthesize("ave", tmp_path / "set", 9) == 0


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(path, content, write=Path.write_bytes):
        if "synth000003" in path.name:
            write(path, content[:1000])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: .*synth000003"):
        synthesize("ave", tmp_path / "set", 5, workers=1)
    monkeypatch.undo()
    assert set(contents(tmp_path / "set")) <= {"synth.json", *(f"AVE/synth00000{index}.mp4" for index in (0, 1, 2, 4))}
    # What a killed run left half-written goes, too.
    (tmp_path / "set" / "AVE" / ".synth000003.mp4.7.part").write_bytes(b"half")
    assert synthesize("ave", tmp_path / "set", 5) >= 1
    assert len(contents(tmp_path / "set")) == 5 + 1 + 4


def test_other_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "_files", lambda task, seed, index, codec: {synth._clip(task, index): b""})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"mine is not empty and not of this command"):
        synthesize("ave", tmp_path / "mine", 5)
    with pytest.raises(FileExistsError, match=r"thesis.tex is no folder"):
        synthesize("ave", tmp_path / "mine" / "thesis.tex", 5)
    assert contents(tmp_path / "mine") == {"thesis.tex": b"all of it"}
    (tmp_path / "empty").mkdir()
    synthesize("ave", tmp_path / "empty", 5)
    before = contents(tmp_path / "empty")
    for options, named in (
        ({"seed": 1}, r"seed 0 \(asked for: 1\)"),
        ({"codec": "vp9"}, r"codec 'h264' \(asked for: 'vp9'\)"),
        ({"clips": 6}, r"clips 5 \(asked for: 6\)"),
        ({"task": "avs"}, r"task 'ave' \(asked for: 'avs'\)"),
    ):
        with pytest.raises(FileExistsError, match=rf"empty holds another set: {named};"):
            synthesize(**{"task": "ave", "out": tmp_path / "empty", "clips": 5} | options)
    assert contents(tmp_path / "empty") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "vqa"}, r"task: got 'vqa', allowed are 'ave', 'avs', 'avqa'"),
        ({"codec": "av1"}, r"codec: got 'av1', allowed are 'h264', 'vp9'"),
        ({"clips": 4}, r"clips: got 4, expected at least 5"),
        ({"task": "avqa", "clips": 9}, r"clips: got 9, expected at least 10"),
        ({"seed": -1}, r"seed: got -1, expected at least 0"),
    ],
)
def test_wrong_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        synthesize(**{"task": "ave", "out": tmp_path / "set", "clips": 5} | options)
    assert not (tmp_path / "set").exists()

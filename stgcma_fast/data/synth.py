"""Synthetic data sets: real media files in the published layouts, which teach a task only to those who look and listen.

Four shapes move over a texture, and four sounds are heard. A script, drawn from the seed and the clip's number, says which of
them are there and when; the files of the clip and the annotations are both made of it. So clip 7 is the same file in a set of
10 and in one of 1000.

ave: 10 s. An event is a shape and a sound at once; each of three shapes with each of three sounds is a category. Before and
after it the shape may be seen in silence, or the sound heard without the shape: seconds of background.
avs: 5 s. Two or three shapes, and the sound of one of them, whose mask it is.
avqa: 10 s. One to three shapes before three panels, and one to three sounds that take turns, one of them loud; some of shapes
that are not seen. Questions of all nine types.
"""

from __future__ import annotations

import io
import json
import os
import time
import wave
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from numpy.random import Generator
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from .config import DataTask

Codec = Literal["h264", "vp9"]

SHAPES = ("circle", "square", "triangle", "cross")
SOUNDS = ("hum", "chirp", "hiss", "pulse")  # in AVS and AVQA of the shape at the same place
COLOURS = ((220, 45, 45), (45, 190, 60), (60, 85, 230), (230, 210, 45))
POSITIONS = ("left", "middle", "right")
NUMBERS = ("zero", "one", "two", "three")
SPLITS = ("train", "train", "train", "val", "test")  # of clips in turn

FPS = 16
SAMPLE_RATE = 16000  # of what is made, and of wavs
MASKED_FRAMES = 5
# A sound is over so long before its span is: the published windows of a clip's last seconds begin up to this much early.
EARLY = 0.1
LOUDEST = 0.12  # root mean square
MANIFEST = "synth.json"
VERSION = 2  # of what a seed makes

AVE_CATEGORIES = tuple((shape, sound) for shape in range(3) for sound in range(3))


@dataclass(frozen=True)
class Shape:
    """A moving shape; lengths are in pixels, times in seconds of the clip.

    Args:
        kind: index into `SHAPES`.
        start, stop: when it is seen.
        radius: half its size.
        zone: left, top, right and bottom of the rectangle that it stays in.
        offset, speed: its place in the zone at time 0, and its way in a second, both (x, y).
        colour: RGB.
    """

    kind: int
    start: int
    stop: int
    radius: float
    zone: tuple[int, int, int, int]
    offset: tuple[float, float]
    speed: tuple[float, float]
    colour: tuple[int, int, int]

    def centre(self, t: float) -> tuple[float, float]:
        """(x, y) at time t: it bounces from the edges of its zone."""
        low = [edge + self.radius for edge in self.zone[:2]]
        room = [b - a - 2 * self.radius for a, b in zip(self.zone[:2], self.zone[2:], strict=True)]
        way = [(o + s * t) % (2 * r) for o, s, r in zip(self.offset, self.speed, room, strict=True)]
        return tuple(a + min(w, 2 * r - w) for a, w, r in zip(low, way, room, strict=True))

    def mask(self, t: float, width: int, height: int) -> np.ndarray:
        """Its pixels at time t, bool ``[height, width]``."""
        x, y = self.centre(t)
        u = np.abs((np.arange(width, dtype=np.float32) + 0.5 - x) / self.radius)
        v = ((np.arange(height, dtype=np.float32) + 0.5 - y) / self.radius)[:, None]
        match SHAPES[self.kind]:
            case "circle":
                return u * u + v * v <= 1
            case "square":
                return (u <= 0.85) & (np.abs(v) <= 0.85)
            case "triangle":
                return (2 * u <= v + 1) & (v <= 0.8)
        v = np.abs(v)
        return ((u <= 0.3) & (v <= 0.95)) | ((v <= 0.3) & (u <= 0.95))


@dataclass(frozen=True)
class Sound:
    """A sound.

    Args:
        kind: index into `SOUNDS`.
        start, stop: seconds of the clip between which it is heard.
        loudness: at most 1.
        pitch: a factor of its frequencies.
    """

    kind: int
    start: int
    stop: int
    loudness: float
    pitch: float

    def waveform(self, rng: Generator) -> np.ndarray:
        """It alone, float64 ``[samples]``. The four share no frequency: hum below chirp, chirp below hiss, hiss below pulse."""
        t = np.arange(int((self.stop - self.start - EARLY) * SAMPLE_RATE)) / SAMPLE_RATE
        match SOUNDS[self.kind]:
            case "hum":
                x = sum(np.sin(2 * np.pi * 220 * self.pitch * k * t) / k for k in range(1, 5))
            case "chirp":  # from 1200 to 2200 Hz, four times a second
                x = np.sin(2 * np.pi * self.pitch * np.cumsum(1200 + 4000 * (t % 0.25)) / SAMPLE_RATE)
            case "hiss":
                spectrum = np.fft.rfft(rng.standard_normal(len(t)))
                f = np.fft.rfftfreq(len(t), 1 / SAMPLE_RATE) / self.pitch
                x = np.fft.irfft(np.where((f > 3000) & (f < 4200), spectrum, 0), len(t))
            case "pulse":  # eight strokes a second
                x = np.sin(2 * np.pi * 5800 * self.pitch * t) * np.exp(-(t % 0.125) / 0.03)
        ramp = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
        return x * ramp * (self.loudness * LOUDEST / np.sqrt(np.mean(x * x)))


@dataclass(frozen=True)
class Script:
    """What is seen and heard in a clip; shapes never touch each other.

    Args:
        seconds, width, height: of the clip.
        shapes, sounds: in it.
        panels: what is added to the background's grey, of as many equally wide parts from left to right.
    """

    seconds: int
    width: int
    height: int
    shapes: tuple[Shape, ...]
    sounds: tuple[Sound, ...]
    panels: tuple[int, ...] = ()

    def waveform(self, rng: Generator) -> np.ndarray:
        """int16 ``[samples]``."""
        x = 0.002 * rng.standard_normal(self.seconds * SAMPLE_RATE)
        for sound in self.sounds:
            part = sound.waveform(rng)
            x[sound.start * SAMPLE_RATE :][: len(part)] += part
        return np.clip(x * 32768, -32768, 32767).astype(np.int16)

    def frames(self, rng: Generator) -> Iterator[np.ndarray]:
        """uint8 ``[height, width, 3]``, `FPS` a second."""
        blocks = rng.integers(70, 150, (self.height // 16, self.width // 16, 1)) + rng.integers(-12, 13, 3)
        texture = np.kron(blocks, np.ones((16, 16, 1), int)) + rng.integers(-8, 9, (self.height, self.width, 1))
        edges = np.linspace(0, self.width, len(self.panels) + 1).astype(int)
        for left, right, grey in zip(edges, edges[1:], self.panels, strict=False):
            texture[:, left:right] += grey
        texture = texture.clip(0, 255).astype(np.uint8)
        for number in range(self.seconds * FPS):
            frame = texture.copy()
            for shape in self.shapes:
                if shape.start * FPS <= number < shape.stop * FPS:
                    frame[shape.mask(number / FPS, self.width, self.height)] = shape.colour
            yield frame


def _generator(task: DataTask, seed: int, index: int, purpose: int) -> Generator:
    return np.random.default_rng([seed, get_args(DataTask).index(task), index, purpose])


def _shape(rng: Generator, kind: int, start: int, stop: int, radius: tuple[int, int], zone: tuple[int, int, int, int]) -> Shape:
    return Shape(
        kind,
        start,
        stop,
        rng.uniform(*radius),
        zone,
        tuple(rng.uniform(0, 500, 2)),
        tuple(rng.choice([-1, 1], 2) * rng.uniform(15, 50, 2)),
        tuple(int(c) for c in np.clip(COLOURS[kind] + rng.integers(-20, 21, 3), 0, 255)),
    )


def _sound(rng: Generator, kind: int, start: int, stop: int, loudness: float) -> Sound:
    return Sound(kind, start, stop, loudness, rng.uniform(0.9, 1.1))


def _ave(rng: Generator, index: int) -> Script:
    shape, sound = AVE_CATEGORIES[index % len(AVE_CATEGORIES)]
    length = int(rng.integers(4, 8))
    start = int(rng.integers(0, 11 - length))
    spans = {"shape": [start, start + length], "sound": [start, start + length]}
    for side, room, outwards in ((0, start, -1), (1, 10 - start - length, 1)):
        longer = rng.choice(["shape", "sound", "neither"], p=[0.4, 0.4, 0.2])
        if room and longer != "neither":
            spans[longer][side] += outwards * int(rng.integers(1, room + 1))
    # The model sees the middle 240 columns.
    return Script(
        10,
        320,
        240,
        (_shape(rng, shape, *spans["shape"], (38, 54), (40, 0, 280, 240)),),
        (_sound(rng, sound, *spans["sound"], 0.25 ** rng.uniform(0, 1)),),
    )


def _avs(rng: Generator, index: int) -> Script:
    sounding = index % len(SHAPES)
    others = rng.permutation([kind for kind in range(len(SHAPES)) if kind != sounding])[: rng.integers(1, 3)]
    quarters = rng.permutation(4)
    shapes = []
    for kind, quarter in zip([sounding, *others.tolist()], quarters.tolist(), strict=False):
        x, y = quarter % 2 * 112, quarter // 2 * 112
        shapes.append(_shape(rng, kind, 0, 5, (38, 50), (x, y, x + 112, y + 112)))
    return Script(5, 224, 224, tuple(shapes), (_sound(rng, sounding, 0, 5, 0.25 ** rng.uniform(0, 1)),))


def _avqa(rng: Generator, index: int) -> Script:
    # Each type of question can be asked of the first clip.
    seen, heard = 3 - index % 3, (2, 3, 1)[index // 3 % 3]
    shapes = [
        _shape(rng, kind, 0, 10, (42, 52), (place * 106, 0, place * 106 + 106, 240))
        for kind, place in zip(rng.permutation(3)[:seen].tolist(), rng.permutation(3).tolist(), strict=False)
    ]
    # Each of three published windows begins in another third. The last second is in none of them.
    turns = {1: [0, 9], 2: [0, int(rng.choice([3, 6])), 9], 3: [0, 3, 6, 9]}[heard]
    loudest = rng.integers(heard)
    sounds = [
        _sound(rng, kind, turns[number], turns[number + 1], 1 if number == loudest else 0.2)
        for number, kind in enumerate(rng.permutation(3)[:heard].tolist())
    ]
    # A model without absolute positions sees the place by the panel.
    return Script(10, 320, 240, tuple(shapes), tuple(sounds), (-60, 0, 80))


_SCRIPTS = {"ave": _ave, "avs": _avs, "avqa": _avqa}


def script(task: DataTask, seed: int, index: int) -> Script:
    """What happens in a clip."""
    return _SCRIPTS[task](_generator(task, seed, index, 0), index)


def _split(index: int) -> str:
    return SPLITS[index % len(SPLITS)]


def _name(index: int) -> str:
    return f"synth{index:06d}"


def _clip(task: DataTask, index: int) -> str:
    """Where a clip stands in its data set."""
    if task == "avs":
        return f"s4_data/raw_videos/{_split(index)}/{SHAPES[index % len(SHAPES)]}/{_name(index)}.mp4"
    return f"{'AVE' if task == 'ave' else 'videos'}/{_name(index)}.mp4"


def _encode(frames: Iterable[np.ndarray], waveform: np.ndarray, width: int, height: int, codec: Codec) -> bytes:
    """An mp4 file. One thread a codec, so that the number of cores is not in it."""
    import av

    if codec == "h264":
        # x264's mbtree depends on what its memory held before: one clip in thirty came out otherwise the next time. Without it,
        # a quality of 27 takes about as many bytes as the usual 23 with it.
        video_codec, audio_codec, rate = "libx264", "aac", 44100
        options = {"preset": "veryfast", "crf": "27", "x264-params": "mbtree=0"}
    else:  # in mp4, too, which PyAV and DALI read
        video_codec, audio_codec, rate = "libvpx-vp9", "libopus", 48000
        options = {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream(video_codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.gop_size = 2 * FPS
        video.codec_context.thread_count = 1
        # As clips from the web have it. PyAV resamples what it is given.
        audio = container.add_stream(audio_codec, rate=rate, layout="stereo")
        sound = av.AudioFrame.from_ndarray(waveform[None], "s16", "mono")
        sound.sample_rate = SAMPLE_RATE
        container.mux([*audio.encode(sound), *audio.encode()])
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(video.encode())
    return file.getvalue()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def _wav(waveform: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, SAMPLE_RATE, len(waveform), "NONE", ""))
        wav.writeframes(waveform.astype("<i2").tobytes())
    return file.getvalue()


def _files(task: DataTask, seed: int, index: int, codec: Codec) -> dict[str, bytes]:
    """The files of a clip, itself last."""
    play, rng = script(task, seed, index), _generator(task, seed, index, 1)
    waveform, frames = play.waveform(rng), play.frames(rng)
    files = {}
    if task == "avs":
        frames = list(frames)
        folder = f"{_split(index)}/{SHAPES[index % len(SHAPES)]}"
        # Those that a reader takes who counts off the clip's frames.
        for number, frame in enumerate(np.linspace(1, len(frames), MASKED_FRAMES).astype(int) - 1, 1):
            name = f"{folder}/{_name(index)}/{_name(index)}_{number}.png"
            files[f"s4_data/visual_frames/{name}"] = _png(frames[frame])
            if number == 1 or _split(index) != "train":
                mask = play.shapes[0].mask(frame / FPS, play.width, play.height)
                files[f"s4_data/gt_masks/{name}"] = _png(mask.astype(np.uint8) * 255)
        files[f"s4_data/audio_wav/{folder}/{_name(index)}.wav"] = _wav(waveform)
    files[_clip(task, index)] = _encode(frames, waveform, play.width, play.height, codec)
    return files


def _questions(seed: int, index: int) -> Iterator[tuple[str, str, str, list[str], str]]:
    """Modality, kind, question, values of its ``<placeholders>``, answer.

    All have 14 words, as many as the model reads: it reads the padding of a shorter one, too, and forgets the words over it.
    """
    play, rng = script("avqa", seed, index), _generator("avqa", seed, index, 2)
    place = {shape.kind: POSITIONS[shape.zone[0] // 106] for shape in play.shapes}
    loudness = {sound.kind: sound.loudness for sound in play.sounds}
    seconds = {sound.kind: sound.stop - sound.start for sound in play.sounds}
    both = [kind for kind in loudness if kind in place]

    def yes(truth: bool) -> str:
        return "yes" if truth else "no"

    def choose(*groups: list[int]) -> int:
        """A kind of one of the groups that are not empty, each as likely as the others."""
        groups = [group for group in groups if group]
        return int(rng.choice(groups[rng.integers(len(groups))]))

    def either(heard: list[int]) -> int:
        """A kind that is seen and in ``heard``, or in one of these alone."""
        return choose(
            [kind for kind in heard if kind in place],
            [kind for kind in heard if kind not in place],
            [kind for kind in place if kind not in heard],
        )

    text = "When you listen to the whole of this video, how many sounds are heard?"
    yield "Audio", "Counting", text, [], NUMBERS[len(loudness)]
    if len(loudness) > 1:
        loudest = max(loudness, key=loudness.__getitem__)
        kind = choose([loudest], [kind for kind in loudness if kind != loudest])
        text = "Of all the sounds in the video, is the loudest that of the <Object>?"
        yield "Audio", "Comparative", text, [SHAPES[kind]], yes(kind == loudest)
    text = "When you look at the whole of this video, how many shapes are visible?"
    yield "Visual", "Counting", text, [], NUMBERS[len(place)]
    kind = int(rng.choice(list(place)))
    text = "In which of the three places of this video do you see the <Object>?"
    yield "Visual", "Location", text, [SHAPES[kind]], place[kind]
    kind = either(list(loudness))
    text = "Is it true of this video that one both sees and hears the <Object>?"
    yield "Audio-Visual", "Existential", text, [SHAPES[kind]], yes(kind in both)
    text = "Of all the shapes that are visible in this video, how many are sounding?"
    yield "Audio-Visual", "Counting", text, [], NUMBERS[len(both)]
    kind = choose(both, [kind for kind in place if kind not in both])
    text = "In which of the three places of this video is there a sounding <Object>?"
    yield "Audio-Visual", "Location", text, [SHAPES[kind]], place[kind] if kind in both else "nowhere"
    text = "Are the shapes that one sees in this video more than the sounds heard?"
    yield "Audio-Visual", "Comparative", text, [], yes(len(place) > len(loudness))
    if len(loudness) < 3:
        longest = max(seconds, key=seconds.__getitem__)
        kind = either([longest])
        text = "Is the longest sound of this video that of a shape seen, the <Object>?"
        yield "Audio-Visual", "Temporal", text, [SHAPES[kind]], yes(kind == longest and kind in place)


def _annotate_ave(seed: int, clips: int) -> dict[str, str]:
    header, lines = "Category&VideoID&Quality&StartTime&EndTime", []
    for index in range(clips):
        (shape,), (sound,) = (play := script("ave", seed, index)).shapes, play.sounds
        start, stop = max(shape.start, sound.start), min(shape.stop, sound.stop)
        lines.append(f"{SHAPES[shape.kind]} {SOUNDS[sound.kind]}&{_name(index)}&good&{start}&{stop}")
    files = {
        f"{split}Set.txt": "\n".join(lines[i] for i in range(clips) if _split(i) == split) for split in dict.fromkeys(SPLITS)
    }
    return {name: text + "\n" for name, text in files.items()} | {"Annotations.txt": "\n".join([header, *lines]) + "\n"}


def _annotate_avs(seed: int, clips: int) -> dict[str, str]:
    lines = [f"{_name(index)},0,{SHAPES[index % len(SHAPES)]},{_split(index)}" for index in range(clips)]
    return {"s4_meta_data.csv": "\n".join(["name,start,category,split", *lines]) + "\n"}


def _annotate_avqa(seed: int, clips: int) -> dict[str, str]:
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for index in range(clips):
        for number, (modality, kind, text, values, answer) in enumerate(_questions(seed, index)):
            record = {
                "video_id": _name(index),
                "question_id": 10 * index + number,
                "type": json.dumps([modality, kind]),
                "question_content": text,
                "templ_values": json.dumps(values),
                "anser": answer,
            }
            records[_split(index)].append(record)
    # Words are numbered as the training questions have them, so the others ask and answer in these words only. The first clip
    # asks all questions, and the first eight have all numbers of shapes and sounds; every split keeps those.
    values = {value for record in records["train"] for value in json.loads(record["templ_values"])}
    answers = {record["anser"] for record in records["train"]}
    return {
        f"avqa-{split}.json": json.dumps(
            [r for r in part if r["anser"] in answers and values.issuperset(json.loads(r["templ_values"]))], indent=1
        )
        for split, part in records.items()
    }


_ANNOTATIONS = {"ave": _annotate_ave, "avs": _annotate_avs, "avqa": _annotate_avqa}


def _write(path: Path, content: bytes) -> None:
    """All of a file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        part.unlink(missing_ok=True)


def _open_folder(out: Path, manifest: dict[str, Any]) -> None:
    """Take a new folder, or one that an earlier run with the same arguments began; clean up what it left half-written."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is no folder")
    path = out / MANIFEST
    if path.exists():
        found = json.loads(path.read_text())
        differing = [
            f"{key} {found.get(key)!r} (asked for: {value!r})" for key, value in manifest.items() if found.get(key) != value
        ]
        if differing:
            raise FileExistsError(f"{out} holds another set: {', '.join(differing)}; take another folder or the same arguments")
    elif out.exists() and any(not entry.name.startswith(f".{MANIFEST}.") for entry in out.iterdir()):
        raise FileExistsError(f"{out} is not empty and not of this command (it has no {MANIFEST}); take another folder")
    for part in out.rglob(".*.part"):
        part.unlink(missing_ok=True)
    _write(path, json.dumps(manifest).encode())


def synthesize(
    task: DataTask,
    out: str | os.PathLike[str],
    clips: int,
    *,
    seed: int = 0,
    codec: Codec = "h264",
    workers: int | None = None,
    progress: bool = False,
) -> int:
    """Make a data set, or finish one that an earlier call with the same arguments was stopped at.

    A clip's files depend on task, seed, codec and its number alone. Three of five clips are for training, one each for
    validation and test. Files appear whole, annotations last; nothing else in the folder is touched.

    Args:
        task: "ave", "avs" or "avqa".
        out: folder; it may exist when it is empty or was begun by this function.
        clips: how many, at least 5, of "avqa" 10.
        seed: of the scripts, at least 0.
        codec: "h264" (with AAC) or "vp9" (with Opus), which DALI decodes without a GPU, too. Both in mp4.
        workers: threads; None: as many as there are cores. Codecs and numpy do the work, so they run at once.
        progress: show a bar on standard error.

    Returns:
        How many clips were made now; the others were there.

    Raises:
        ValueError: a task or codec that is unknown, too few clips, a negative seed.
        FileExistsError: the folder holds something else, or a set of other arguments.
        OSError: the disk is full, or not to be written to.
    """
    for name, value, allowed in (("task", task, get_args(DataTask)), ("codec", codec, get_args(Codec))):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, allowed are {', '.join(map(repr, allowed))}")
    # Negatives of AVQA are of another clip of the split.
    for name, value, least in (("clips", clips, len(SPLITS) * (1 + (task == "avqa"))), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    out = Path(out)
    _open_folder(out, {"version": VERSION, "task": task, "seed": seed, "codec": codec, "clips": clips})
    missing = [index for index in range(clips) if not (out / _clip(task, index)).exists()]

    def make(index: int) -> None:
        for name, content in _files(task, seed, index, codec).items():
            _write(out / name, content)

    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True), disable=not progress)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    with bar:
        line = bar.add_task("clips", total=clips, completed=clips - len(missing))
        try:
            for done in as_completed([pool.submit(make, index) for index in missing]):
                done.result()
                bar.advance(line)
        finally:
            pool.shutdown(cancel_futures=True)
    for name, text in _ANNOTATIONS[task](seed, clips).items():
        _write(out / name, text.encode())
    return len(missing)


def parser() -> ArgumentParser:
    """The command line of ``stgcma-fast data synth``."""
    p = ArgumentParser(
        description="Make a synthetic data set of real media files, in the published layout of a task. Shapes move, sounds are "
        "heard, and only who uses both gets the labels right: ave, an event is a shape with a sound; avs, the mask is that of "
        "the shape which sounds; avqa, questions of all nine types. Stopped or killed, the same command finishes the work. "
        "Example: stgcma-fast data synth --task ave --out toy --clips 100"
    )
    p.add_argument("--task", type=DataTask, required=True, help="what the clips teach, and the layout")
    p.add_argument("--out", type=str, required=True, metavar="DIR", help="folder: new, empty, or begun with the same arguments")
    p.add_argument(
        "--clips",
        type=PositiveInt,
        required=True,
        help="how many, at least 5, of avqa 10: three of five train, one val, one test",
    )
    p.add_argument("--seed", type=NonNegativeInt, default=0, help="another seed, another set")
    p.add_argument("--codec", type=Codec, default="h264", help="vp9 is what DALI decodes without a GPU, too")
    p.add_argument("--workers", type=PositiveInt | None, default=None, help="threads; as many as there are cores if not given")
    return p


def main(args: Namespace) -> int:
    """Run the command. Returns its exit status."""
    begun = time.perf_counter()
    options = {"seed": args.seed, "codec": args.codec, "workers": args.workers}
    made = synthesize(args.task, args.out, args.clips, **options, progress=True)
    print(f"{args.out}: {args.clips} clips, {made} of them made now in {time.perf_counter() - begun:.1f} s")
    return 0

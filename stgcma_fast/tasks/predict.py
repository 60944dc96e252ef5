"""Predict on your own files: events of every second, masks of what sounds, or answers to a question."""

from __future__ import annotations

import difflib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import av
import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..config import Task
from ..data.audio import read_audio
from ..data.augment import frames_to_tensor
from ..data.avqa import WORDS
from ..data.config import MediaConfig, media_config
from ..data.dataset import CONTAINERS
from ..data.errors import MediaError
from ..data.fbank import filterbanks
from ..data.sample import Frames
from ..data.torch_backend import in_order
from ..data.video import opened, read_frames
from ..ops.checks import check_choice
from ..ops.dispatch import Impl
from . import draw
from .trained import find_checkpoint, load_trained

Dtype = Literal["float32", "bfloat16", "float16"]
# Pixels of the longer side of frames that pictures are made of: two of them beside each other fill a screen.
LARGEST = 960
THRESHOLD = 0.5  # above it a pixel sounds
TOP = 5  # answers on a terminal and in a picture
DIGITS = 6  # of a probability in JSON


@dataclass(frozen=True, eq=False)
class Clip:
    """What was read of a file.

    Attributes:
        path: of the file.
        audio, video: what the model takes, without its first dimension.
        frames: that the model is shown, uint8 ``[T, H, W, 3]``, whole, at most 960 pixels a side.
        waveform: float32 ``[N]``.
        sample_rate: of the waveform, in Hz.
        duration: in seconds, of the longer of picture and sound.
    """

    path: Path
    audio: Tensor
    video: Tensor
    frames: Tensor
    waveform: Tensor
    sample_rate: int
    duration: float

    @property
    def file(self) -> str:
        """The path in letters: bytes of a name that are none become question marks."""
        return str(self.path).encode(errors="replace").decode()

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each of the T segments, in seconds: equal shares of the duration."""
        edges = [self.duration * index / len(self.frames) for index in range(len(self.frames) + 1)]
        return list(pairwise(edges))


def read_clip(path: Path, config: MediaConfig) -> Clip:
    """A container as training and tests read it.

    Its T frames are the first, the last and those evenly between: of n frames, counted from 1, those of
    ``linspace(1, n, T)``, truncated. Chunks of sound begin evenly between the start and the last whole chunk.

    Raises:
        MediaError: the file is broken, or has no video or no sound.
    """
    count, rate = config.video.frames, config.audio.sample_rate
    frames, waveform = read_frames(Frames(path, tuple(range(count)), count)), read_audio(path, rate)
    audio, video = filterbanks([waveform], config.audio)[0], frames_to_tensor(frames, config.video)
    images = frames.permute(0, 3, 1, 2)
    scale = LARGEST / max(images.shape[2:])
    if scale < 1:
        images = F.resize(images, [max(1, round(scale * side)) for side in images.shape[2:]], antialias=True)
    with opened(path) as (container, _):
        # What a browser records has no duration.
        duration = max((container.duration or 0) / av.time_base, len(waveform) / rate)
    return Clip(path, audio, video, images.permute(0, 2, 3, 1).contiguous(), waveform, rate, duration)


def _try_clip(path: Path, config: MediaConfig) -> tuple[Clip | MediaError]:
    # In a tuple, for `in_order` raises an error that it is handed as it is.
    try:
        return (read_clip(path, config),)
    except MediaError as error:
        return (error,)


@dataclass(frozen=True, eq=False)
class Prediction(ABC):
    """What a model says about a clip.

    Attributes:
        clip: what was read of the file.
        checkpoint: file of the weights.
    """

    task: ClassVar[Task]

    clip: Clip = field(repr=False)
    checkpoint: Path

    def save(self, out: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write ``prediction.json`` and pictures into a folder of the clip's own; files of these names are replaced.

        Args:
            out: the folder to make it in.
            name: of the clip's folder; None: the file's name without its ending.

        Returns:
            The clip's folder.

        Raises:
            OSError: it can not be written to.
        """
        folder = Path(out) / (name or self.clip.path.stem)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_pictures(folder)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
        return folder

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the file, the task, the checkpoint, the duration and the segments' times in seconds, and what
        is said about them."""
        head = {"file": self.clip.file, "task": self.task, "checkpoint": str(self.checkpoint)}
        values, parts = self._values()
        spans = self.clip.spans
        segments = [
            {"start": round(start, 3), "end": round(end, 3), **part} for (start, end), part in zip(spans, parts, strict=True)
        ]
        return head | {"duration": round(self.clip.duration, 3)} | values | {"segments": segments}

    @abstractmethod
    def _values(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What is said about the clip, and about each segment."""

    @abstractmethod
    def _save_pictures(self, folder: Path) -> None: ...

    @abstractmethod
    def __rich__(self) -> Table:
        """For a terminal."""


class Event(NamedTuple):
    """The most probable class of a segment. Times are in seconds."""

    start: float
    end: float
    event: str
    probability: float


@dataclass(frozen=True, eq=False)
class EventPrediction(Prediction):
    """Of AVE: the class of each segment.

    Attributes:
        classes: names of the classes.
        probabilities: float32 ``[T, classes]``.
    """

    task = "ave"

    classes: tuple[str, ...] = field(repr=False)
    probabilities: Tensor = field(repr=False)

    @property
    def events(self) -> list[Event]:
        """The event of each segment."""
        best = zip(self.clip.spans, *(values.tolist() for values in self.probabilities.max(1)), strict=True)
        return [Event(*span, self.classes[index], probability) for span, probability, index in best]

    def _values(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        parts = []
        for event, row in zip(self.events, self.probabilities.tolist(), strict=True):
            probabilities = {name: round(value, DIGITS) for name, value in zip(self.classes, row, strict=True)}
            parts.append(
                {"event": event.event, "probability": round(event.probability, DIGITS), "probabilities": probabilities}
            )
        return {}, parts

    def _save_pictures(self, folder: Path) -> None:
        figure = draw.timeline(self.clip, self.probabilities, self.classes)
        figure.savefig(folder / "timeline.png", dpi=draw.DPI)

    def __rich__(self) -> Table:
        table = _table("seconds", "event", "probability")
        for event in self.events:
            table.add_row(_span(event.start, event.end), Text(event.event), f"{event.probability:.2f}")
        return table


@dataclass(frozen=True, eq=False)
class MaskPrediction(Prediction):
    """Of AVS: which pixels sound, of the square in the middle of each frame, which is all that the model sees.

    Attributes:
        probabilities: float32 ``[T, S, S]``; the square is the largest there is, at the size of the model's images.
    """

    task = "avs"

    probabilities: Tensor = field(repr=False)

    @property
    def masks(self) -> Tensor:
        """Where something sounds, bool ``[T, S, S]``: where the probability is above 0.5."""
        return self.probabilities > THRESHOLD

    @property
    def shares(self) -> list[float]:
        """Of each frame's square, the share that sounds."""
        return self.masks.float().mean((1, 2)).tolist()

    def _values(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        numbers = {
            "sounding_share": self.shares,
            "mean_probability": self.probabilities.mean((1, 2)).tolist(),
            "max_probability": self.probabilities.amax((1, 2)).tolist(),
        }
        rows = zip(*numbers.values(), strict=True)
        parts = [{name: round(value, DIGITS) for name, value in zip(numbers, row, strict=True)} for row in rows]
        return {"threshold": THRESHOLD}, parts

    def _save_pictures(self, folder: Path) -> None:
        images, masks = draw.overlay(self.clip.frames, self.probabilities, THRESHOLD)
        for number, (image, mask) in enumerate(zip(images, masks, strict=True), 1):
            Image.fromarray(image.numpy()).save(folder / f"overlay_{number}.png")
            Image.fromarray(mask.byte().mul(255).numpy()).save(folder / f"mask_{number}.png")
        draw.write_video(folder / "overlay.mp4", torch.cat([self.clip.frames, images], 2), self.clip)

    def __rich__(self) -> Table:
        table = _table("seconds", "of the frame sounds", "highest probability")
        for (start, end), share, most in zip(
            self.clip.spans, self.shares, self.probabilities.amax((1, 2)).tolist(), strict=True
        ):
            table.add_row(_span(start, end), f"{share:.1%}", f"{most:.2f}")
        return table


class Answer(NamedTuple):
    """A possible answer."""

    answer: str
    probability: float


@dataclass(frozen=True, eq=False)
class AnswerPrediction(Prediction):
    """Of AVQA: answers to a question.

    Attributes:
        question: as it was asked.
        answers: all the model knows, the most probable first.
        matches: how probable it is that the sound belongs to each frame, float32 ``[T]``.
    """

    task = "avqa"

    question: str
    answers: list[Answer] = field(repr=False)
    matches: Tensor = field(repr=False)

    def _values(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        (answer, probability), *_ = self.answers
        probabilities = {answer: round(value, DIGITS) for answer, value in self.answers}
        values = {"question": self.question, "answer": answer, "probability": round(probability, DIGITS)}
        parts = [{"match_probability": round(match, DIGITS)} for match in self.matches.tolist()]
        return values | {"probabilities": probabilities}, parts

    def _save_pictures(self, folder: Path) -> None:
        figure = draw.bars(self.clip, self.question, self.answers[:TOP])
        figure.savefig(folder / "answers.png", dpi=draw.DPI)

    def __rich__(self) -> Table:
        table = _table("answer", "probability")
        for answer, probability in self.answers[:TOP]:
            table.add_row(Text(answer), f"{probability:.2f}")
        return table


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("event", "answer") else "right")
    return table


def _span(start: float, end: float) -> str:
    return f"{start:.1f} - {end:.1f}"


def encode_question(question: str, words: Sequence[str]) -> Tensor:
    """A question as the model reads it.

    Args:
        question: in the words of the training questions, with or without its question mark.
        words: that the model knows; the first stands for no word.

    Returns:
        int64 ``[1, 14]``.

    Raises:
        ValueError: no word, more than 14, or unknown ones, which are named with their nearest known ones.
    """
    given = question.strip().removesuffix("?").rstrip().split(" ")
    numbers = {word: number for number, word in enumerate(words) if number}
    if given == [""]:
        raise ValueError(f"question: got {question!r}, expected words")
    if len(given) > WORDS:
        raise ValueError(f"question: got {len(given)} words, expected {WORDS} at most: {question!r}")
    unknown = [_suggested(word, numbers) for word in dict.fromkeys(given) if word not in numbers]
    if unknown:
        raise ValueError(f"question: expected words that the model was trained with, got {', '.join(unknown)}")
    return torch.tensor([[*(numbers[word] for word in given), *[0] * (WORDS - len(given))]])


def _suggested(word: str, known: Iterable[str]) -> str:
    """The word, and those that are near it; capitals count for the model, but not for being near."""
    lower: dict[str, list[str]] = {}
    for other in known:
        lower.setdefault(other.casefold(), []).append(other)
    near = [repr(other) for match in difflib.get_close_matches(word.casefold(), lower) for other in lower[match]]
    return f"{word!r} (nearest: {', '.join(near)})" if near else repr(word)


class Predictor:
    """A trained model, which is called with a file.

    A container is read as in training and tests, and its clip's prediction is the one that a test would be made of. Where its
    frames are taken says `read_clip`; AVS is trained on five frames, one a second, so clips of about five seconds are like its
    own, of about ten those of AVE, and of a minute those of AVQA.

    Args:
        checkpoint: a run's folder, or a checkpoint of it.
        task: "ave", "avs" or "avqa", which the checkpoint must be of; None: whichever it is of.
        pretrained: see `load_trained`.
        device: "auto": a GPU where there is one.
        dtype: of the products; None: "bfloat16" on a GPU, "float32" on a CPU.
        impl: see `FastSTGCMA`.

    Attributes:
        model: on the device, in evaluation mode.
        description: what its numbers mean.

    Raises:
        FileNotFoundError, ValueError: see `load_trained`; or a checkpoint of another task, a device that is not there, an
            unknown dtype, or names that do not fit the model.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        task: Task | None = None,
        pretrained: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: Dtype | None = None,
        impl: Impl = "auto",
    ) -> None:
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: got '{self.device}', but PyTorch finds no GPU here")
        self.dtype: Dtype = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        check_choice("dtype", self.dtype, get_args(Dtype))
        self.checkpoint = find_checkpoint(checkpoint)
        self.model, self.description = load_trained(self.checkpoint, pretrained=pretrained, impl=impl)
        config = self.model.config
        if task not in (None, config.task):
            raise ValueError(f"task: got {task!r}, but {self.checkpoint} is of {config.task!r}")
        expected = {"classes": 0 if config.task == "avs" else config.num_classes}
        expected["words"] = config.vocabulary if config.task == "avqa" else 0
        for name, count in expected.items():
            if len(given := getattr(self.description, name)) != count:
                raise ValueError(f"{self.checkpoint}: got {len(given)} {name}, expected {count} as the model has")
        self.media = media_config(config.task, config.backbone, config.num_frames)
        self.model.to(self.device)
        if self.dtype != "float32":
            self.model.cast_frozen(getattr(torch, self.dtype))

    def __call__(self, path: str | os.PathLike[str], *, question: str | None = None) -> Prediction:
        """Predict on a file.

        Args:
            path: a container with video and sound.
            question: for AVQA, in words of its training.

        Returns:
            An `EventPrediction` with ``events``, a `MaskPrediction` with ``masks`` or an `AnswerPrediction` with ``answers``.

        Raises:
            ValueError: AVQA without a question, another task with one, or words that the model does not know.
            MediaError: the file is broken, or what the model makes of it is not finite.
        """
        (prediction,) = self.stream([path], question=question)
        if isinstance(prediction, MediaError):
            raise prediction
        return prediction

    def stream(
        self, paths: Iterable[str | os.PathLike[str]], *, question: str | None = None
    ) -> Iterator[Prediction | MediaError]:
        """Predict on files, in their order; while the model works on one, the next is read.

        Args:
            paths, question: see `__call__`.

        Yields:
            A prediction, or what is wrong with the file.

        Raises:
            ValueError: see `__call__`.
        """
        if (question is None) is (self.model.config.task == "avqa"):
            expected = "a question" if question is None else "None"
            raise ValueError(f"question: got {question!r} for the task {self.model.config.task!r}, expected {expected}")
        words = None if question is None else encode_question(question, self.description.words).to(self.device)
        paths = [Path(path) for path in paths]
        workers = int(len(paths) > 1)
        with closing(in_order(partial(_try_clip, config=self.media), paths, workers)) as clips:
            for (clip,) in clips:
                yield clip if isinstance(clip, MediaError) else self._predict(clip, question, words)

    def _predict(self, clip: Clip, question: str | None, words: Tensor | None) -> Prediction | MediaError:
        outputs = self._outputs(clip, words)
        if not all(bool(output.isfinite().all()) for output in outputs):
            return MediaError(clip.path, f"what the model makes of it in {self.dtype} is not finite")
        where, classes = (clip, self.checkpoint), self.description.classes
        if self.model.config.task == "ave":
            return EventPrediction(*where, classes, outputs[0].softmax(-1))
        if self.model.config.task == "avs":
            return MaskPrediction(*where, outputs[0][:, 0].sigmoid())
        probabilities, order = outputs[0][0].softmax(-1).sort(descending=True, stable=True)
        answers = [Answer(classes[index], value) for index, value in zip(order.tolist(), probabilities.tolist(), strict=True)]
        return AnswerPrediction(*where, question, answers, outputs[1].softmax(-1)[:, 1])

    @torch.inference_mode()
    def _outputs(self, clip: Clip, words: Tensor | None) -> list[Tensor]:
        """The model's logits, float32 on the CPU."""
        audio, video = (tensor[None].to(self.device) for tensor in (clip.audio, clip.video))
        with torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32"):
            outputs = self.model(audio, video) if words is None else self.model(audio, video, None, words)
        logits = {"ave": lambda: [outputs], "avs": lambda: outputs[:1], "avqa": lambda: outputs[:2]}[self.model.config.task]()
        return [output.float().cpu() for output in logits]


def find_clips(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[MediaError]]:
    """Files, each once: those that are given, and the containers of folders in the order of their names.

    Returns:
        The files, and an error for each folder that holds none.
    """
    found: dict[Path, Path] = {}
    errors = []
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            # What is hidden is no clip: some systems keep a second file beside each.
            shown = (file for file in path.iterdir() if not file.name.startswith("."))
            files = sorted(file for file in shown if file.suffix.lower() in CONTAINERS and file.is_file())
            if not files:
                errors.append(MediaError(path, f"it holds no clip, expected files that end in {', '.join(CONTAINERS)}"))
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values()), errors


def folder_names(paths: Sequence[Path]) -> list[str]:
    """A folder's name for each file: its own without the ending, and a number behind it where another file has that name."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 1
        # Some file systems do not tell capitals apart.
        while name.casefold() in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def parser() -> ArgumentParser:
    """The command line of ``stgcma-fast predict``."""
    p = ArgumentParser(
        description="Predict on your own files with a model that `stgcma-fast fit` trained. The event of every second: "
        "`stgcma-fast predict --task ave clip.mp4 --checkpoint runs/ave`. Which pixels sound, in every clip of a folder: "
        "`stgcma-fast predict --task avs clips/ --checkpoint runs/avs --out masks`. An answer to a question in the words "
        "of the training questions: `stgcma-fast predict --task avqa concert.mp4 --checkpoint runs/avqa --question "
        '"How many instruments are sounding in the video?"`. '
        "Results are printed, and below --out each clip gets a folder: prediction.json with times and probabilities; of ave "
        "timeline.png; of avs mask_1.png, overlay_1.png and so on, and overlay.mp4, the input beside it; of avqa answers.png. "
        "A file that is broken does not stop the others: it is named at the end, and the exit status is 1."
    )
    p.add_argument("paths", type=str, nargs="+", metavar="PATH", help="clips with video and sound, or folders of such")
    p.add_argument("--checkpoint", type=str, required=True, metavar="DIR", help="folder of a run, or a checkpoint of it")
    p.add_argument("--task", choices=get_args(Task), help="that the checkpoint is expected to be of")
    p.add_argument("--question", type=str, metavar="TEXT", help="for a checkpoint of avqa")
    p.add_argument("--out", type=str, default="predictions", metavar="DIR", help="folder for the results")
    p.add_argument(
        "--pretrained", type=str, metavar="FILE", help="backbone of a checkpoint of adapters, if not where it was in training"
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    p.add_argument("--dtype", choices=get_args(Dtype), help="of the products; by default bfloat16 on a GPU, float32 on a CPU")
    return p


def main(args: Namespace) -> int:
    """Run the command. Returns its exit status: 1 where a file is broken."""
    paths, failed = find_clips(args.paths)
    names = folder_names(paths)
    # First: it should not fail when the work is done.
    Path(args.out).mkdir(parents=True, exist_ok=True)
    options = {"task": args.task, "pretrained": args.pretrained, "device": args.device, "dtype": args.dtype}
    predictor = Predictor(args.checkpoint, **options)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(), transient=True) as progress:
        results = progress.track(predictor.stream(paths, question=args.question), total=len(paths), description="clips")
        for name, result in zip(names, results, strict=True):
            if isinstance(result, MediaError):
                failed.append(result)
                continue
            folder = result.save(args.out, name)
            text = f"{result.clip.file}: saved in {str(folder).encode(errors='replace').decode()}"
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            progress.console.print(result)
    errors = Console(stderr=True)
    for error in failed:
        errors.print(f"failed: {error}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0

"""What the data sets of the tasks share: where files are, what annotations get wrong, and draws that belong to an item."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..config import BACKBONES
from .config import DataTask, MediaConfig, media_config
from .sample import Sample

if TYPE_CHECKING:
    from .check import Report

SPLITS = ("train", "val", "test")
CONTAINERS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")  # the first of them where a clip has several
_FRAME = re.compile(r"(?!\.).*?(\d+)\.(?:jpe?g|png)", re.IGNORECASE)


def read_text(path: Path) -> str:
    """A text file of UTF-8, with a byte order mark or without.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got bytes that are not text ({error}), expected UTF-8") from error


def frame_files(folder: Path) -> tuple[Path, ...]:
    """The images of a folder, sorted by the number their names end with. Files without one are no frames."""
    try:
        names = os.listdir(folder)
    except OSError:  # whoever reads the folder says what is wrong with it
        return ()
    matches = [match for name in names if (match := _FRAME.fullmatch(name))]
    return tuple(folder / match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[0])))


def generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The draws of one item in one epoch. A hash makes them unrelated to those of its neighbours, whatever the numbers are."""
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class MediaFiles:
    """Media by the name of their clip: a folder of frames and an audio file, or a container with both.

    A folder of frames goes before a container, and an audio file before a container's track. What is there is looked up once,
    here.

    Args:
        frames, audio, containers: folders that may hold them, the first before the others. They need not exist.
    """

    def __init__(self, frames: Sequence[Path], audio: Sequence[Path], containers: Sequence[Path]) -> None:
        self._folders = {}
        for place in filter(Path.is_dir, reversed(frames)):
            self._folders |= {entry.name: Path(entry.path) for entry in os.scandir(place) if entry.is_dir()}
        self._audio = _by_stem(audio, (".wav", ".flac", ".ogg"))
        self._containers = _by_stem(containers, CONTAINERS)
        # Where a clip should be that is nowhere.
        self._no_containers = not any(map(Path.is_dir, containers)) and any(map(Path.is_dir, frames))
        self._places = [next(filter(Path.is_dir, places), places[0]) for places in (frames, audio, containers)]

    def video(self, clip: str) -> Path:
        """The folder of its frames or its container, which may be missing."""
        if path := self._folders.get(clip) or self._containers.get(clip):
            return path
        return self._places[0] / clip if self._no_containers else self._places[2] / f"{clip}.mp4"

    def audio(self, clip: str) -> Path:
        """Its wav or its container, which may be missing."""
        if path := self._audio.get(clip) or self._containers.get(clip):
            return path
        return self._places[1] / f"{clip}.wav" if self._no_containers or clip in self._folders else self.video(clip)

    def frames(self, clip: str) -> Path | tuple[Path, ...]:
        """A source of `Frames`: its container, or the files of its frames."""
        path = self.video(clip)
        # A folder without frames, too, is a path: reading it tells what is wrong.
        return (clip in self._folders and frame_files(path)) or path


def _by_stem(places: Sequence[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    paths = [path for place in places if place.is_dir() for path in place.iterdir() if path.suffix.lower() in suffixes]
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: suffixes.index(path.suffix.lower())):
        found.setdefault(path.stem, path)
    return found


class MediaDataset(ABC):
    """The items of one split. No media file is opened here: an item is a `Sample`, which a backend reads.

    Args:
        root: folder of the data set, in its published layout.
        split: "train", "val" or "test".
        config: what the task makes of media.
        train: whether an item gets the draws of training.
        seed: of all draws. Those of an item depend on the seed, the epoch and its index alone.
        problems: None: an annotation that makes no sense raises ValueError. A list: where and what it is gets written there
            instead, and what it concerns is left out, so that all that is wrong can be told at once (`check` does).

    Attributes:
        ids: the clip of each item.
        names: of the items; each should be there once.
        places: in how many places of a clip frames may be asked for.
        annotations: files that tell what is in the split.

    Raises:
        FileNotFoundError: the root or an annotation file is not there.
        ValueError: a line of an annotation file that makes no sense, a split without items, a config of another task.
    """

    task: ClassVar[DataTask]
    ids: list[str]

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        config: MediaConfig,
        *,
        train: bool = False,
        seed: int = 0,
        problems: list[tuple[str, str]] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, allowed are {', '.join(map(repr, SPLITS))}")
        if config.task != self.task:
            raise ValueError(f"config: got one of the task {config.task!r}, expected {self.task!r}")
        if config.audio.chunks != config.video.frames:
            raise ValueError(
                f"config: got {config.audio.chunks} chunks of audio and {config.video.frames} frames, expected as many of both"
            )
        self.root, self.split, self.config, self.train, self.seed = Path(root), split, config, train, seed
        self.places, self._problems = (config.video.frames,), problems
        self.annotations: list[Path] = []
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder")

    @abstractmethod
    def sample(self, index: int, epoch: int = 0) -> Sample:
        """An item: its files and its draws."""

    @abstractmethod
    def files(self, index: int) -> list[tuple[str, Path | tuple[Path, ...]]]:
        """What an item is read from, other clips left out, by kind: "video", a container, a folder of frames, or images of one
        size; "audio", a file or a container."""

    @property
    def names(self) -> list[str]:
        return self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, decode: bool = False) -> Report:
        """Open every file of the split and tell what is missing or broken; see `check.check_datasets`.

        Args:
            decode: decode what training may ask for, instead of reading headers.
        """
        from .check import check_datasets

        return check_datasets([self], decode=decode)

    def _complain(self, where: str, what: str, usable: bool = False) -> None:
        """Refuse an annotation. One that is odd, but usable, only those learn of who collect problems."""
        if self._problems is not None:
            self._problems.append((where, what))
        elif not usable:
            raise ValueError(f"{where}: {what}")

    def _find(self, *names: str) -> Path:
        """The first of these below the root that exists."""
        for name in names:
            if (path := self.root / name).exists():
                self.annotations.append(path)
                return path
        raise FileNotFoundError(f"{self.root}: expected {' or '.join(names)} in it, got none")


def open_dataset(
    task: str, root: str | os.PathLike[str], split: str, config: MediaConfig | None = None, **options: Any
) -> MediaDataset:
    """The data set of a task.

    Args:
        task: "ave", "avs" or "avqa".
        root, split: see `MediaDataset`.
        config: None: that of the published model on Swin-L.
        options: of `AVEDataset`, `AVSDataset` or `AVQADataset`.

    Raises:
        ValueError, FileNotFoundError: see `MediaDataset`; or an unknown task.
    """
    config = config or media_config(task, BACKBONES["swin_l"])  # refuses unknown tasks
    from .ave import AVEDataset
    from .avqa import AVQADataset
    from .avs import AVSDataset

    datasets = {"ave": AVEDataset, "avs": AVSDataset, "avqa": AVQADataset}
    if task not in datasets:
        raise ValueError(f"task: got {task!r}, allowed are 'ave', 'avs', 'avqa'")
    return datasets[task](root, split, config, **options)

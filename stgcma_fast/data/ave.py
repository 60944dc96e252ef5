"""AVE: ten seconds of an event that is seen and heard, a class for each second."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import draw
from .config import MediaConfig
from .dataset import MediaDataset, MediaFiles, generator, read_text
from .sample import Frames, Mix, Sample

SECONDS = 10
_HEADER = ["category", "videoid", "quality", "starttime", "endtime"]


@dataclass(frozen=True)
class _Row:
    line: int
    category: str
    clip: str
    start: int
    end: int

    @property
    def event(self) -> tuple[str, str, int, int]:
        return self.category, self.clip, self.start, self.end


class AVEDataset(MediaDataset):
    """A split of AVE.

    Below the root, or below ``AVE_Dataset`` in it: ``Annotations.txt``; which of its rows are in the split, from
    ``{split}_order.h5`` (key "order") or else ``{split}Set.txt``; the labels of all rows from ``labels.h5`` (key
    "avadataset", ``[rows, 10, classes]``), or else from the annotated times; and clips as ``video_frames/{id}`` with
    ``raw_audio/{id}.wav``, or as ``AVE/{id}.mp4``.

    A clip that is cut into T other than 10 parts gets for each the label of the second in which the middle of the part is.

    With ``train`` an item gets the visual augmentation's draws, and with probability ``mixup`` the audio of another clip of
    the split, drawn from all of them, with a weight from Beta(10, 10) for each chunk.

    Args:
        root, split, config, train, seed, problems: see `MediaDataset`.
        mixup: probability of mixing audio.
        mix_labels: whether a chunk's label is mixed as its audio is; the published training does not.

    Attributes:
        classes: categories in the order in which Annotations.txt names them first, then "background".
        labels: float32 ``[items, T, classes]``.
    """

    task = "ave"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        config: MediaConfig,
        *,
        train: bool = False,
        seed: int = 0,
        mixup: float = 0.5,
        mix_labels: bool = False,
        problems: list[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(root, split, config, train=train, seed=seed, problems=problems)
        if not 0 <= mixup <= 1:
            raise ValueError(f"mixup: got {mixup}, expected a probability")
        self.mixup, self.mix_labels = mixup, mix_labels
        annotations = self._find("Annotations.txt", "AVE_Dataset/Annotations.txt")
        rows = self._rows(annotations)
        if not any(rows):
            raise ValueError(f"{annotations}: got no row, expected one or more")
        self.classes = (*dict.fromkeys(row.category for row in rows if row), "background")
        split_file, indices = self._split(annotations, rows)
        indices = [index for index in indices if rows[index]]
        if not indices:
            raise ValueError(f"{split_file}: got no row for the split {split!r}, expected one or more")
        self.ids = [rows[index].clip for index in indices]
        self.labels = self._labels(annotations, rows, indices)
        bases = (self.root, self.root / "AVE_Dataset")
        self._media = MediaFiles(*([base / name for base in bases] for name in ("video_frames", "raw_audio", "AVE")))

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """An item: "label" is float32 ``[T, classes]``."""
        count, clip, label = self.config.video.frames, self.ids[index], self.labels[index]
        augmentation = mix = None
        if self.train:
            draws = generator(self.seed, epoch, index)
            augmentation = draw(draws)
            if torch.rand((), generator=draws) < self.mixup:
                other = int(torch.randint(len(self), (), generator=draws))
                # The tenth smallest of 19 uniform numbers has the distribution Beta(10, 10).
                lams = torch.rand(count, 19, generator=draws).median(1).values
                mix = Mix(self._media.audio(self.ids[other]), tuple(lams.tolist()))
                if self.mix_labels:
                    label = torch.lerp(self.labels[other], label, lams[:, None])
        frames = Frames(self._media.frames(clip), tuple(range(count)), count)
        return Sample(clip, frames, self._media.audio(clip), {"label": label}, augmentation=augmentation, mix=mix)

    def files(self, index: int) -> list[tuple[str, Path | tuple[Path, ...]]]:
        clip = self.ids[index]
        return [("video", self._media.video(clip)), ("audio", self._media.audio(clip))]

    def _rows(self, path: Path) -> list[_Row | None]:
        """Rows of an annotation file; None stands for one that was refused, for the numbers of the others are theirs."""
        rows: list[_Row | None] = []
        for line, text in enumerate(read_text(path).split("\n"), 1):
            fields = [field.strip() for field in text.split("&")]
            if not text.strip() or (not rows and [field.lower() for field in fields] == _HEADER):
                continue
            if len(fields) == 5 and all(fields) and fields[3].isdecimal() and fields[4].isdecimal():
                rows.append(_Row(line, fields[0], fields[1], int(fields[3]), int(fields[4])))
            else:
                rows.append(None)
                self._complain(
                    f"{path}, line {line}", f"got {text.strip()!r}, expected category&id&quality&start&end, times in seconds"
                )
        return rows

    def _split(self, annotations: Path, rows: list[_Row | None]) -> tuple[Path, list[int]]:
        """The split's file, and which rows of the annotations it names."""
        names = [f"{self.split}_order.h5", f"{self.split}Set.txt"]
        path = self._find(*(base + name for name in names for base in ("", "AVE_Dataset/")))
        if path.suffix == ".h5":
            order = _read_h5(path, "order")
            if order.ndim != 1 or order.dtype.kind not in "iu":
                raise ValueError(
                    f"{path}: got 'order' as {order.dtype} of shape {list(order.shape)}, expected integers in a row"
                )
            wrong = [int(index) for index in order if not 0 <= index < len(rows)]
            if wrong:
                self._complain(str(path), f"got the row {wrong[0]}, expected 0 to {len(rows) - 1}, the rows of {annotations}")
            return path, [int(index) for index in order if 0 <= index < len(rows)]
        found = {row.event: index for index, row in enumerate(rows) if row}
        indices = []
        for row in filter(None, self._rows(path)):
            if row.event in found:
                indices.append(found[row.event])
            elif row.category not in self.classes[:-1]:
                self._complain(f"{path}, line {row.line}", f"got the category {row.category!r}, expected one of {annotations}")
            else:
                event = "&".join(map(str, row.event))
                self._complain(f"{path}, line {row.line}", f"got {event} (without quality), expected a row of {annotations}")
        return path, indices

    def _labels(self, annotations: Path, rows: list[_Row | None], indices: list[int]) -> Tensor:
        try:
            path = self._find("labels.h5", "AVE_Dataset/labels.h5")
        except FileNotFoundError:
            path = None
        for index in indices:
            row = rows[index]
            if not row.start < row.end <= SECONDS:
                self._complain(
                    f"{annotations}, line {row.line}",
                    f"got an event of {row.clip} from {row.start} to {row.end} s, "
                    f"expected its start before its end, and that within {SECONDS} s",
                    usable=path is not None,
                )
        if path is None:
            seconds = np.zeros((len(indices), SECONDS, len(self.classes)), np.float32)
            seconds[:, :, -1] = 1
            for label, index in zip(seconds, indices, strict=True):
                row = rows[index]
                label[row.start : row.end] = 0
                label[row.start : row.end, self.classes.index(row.category)] = 1
        else:
            seconds = _read_h5(path, "avadataset")
            expected = (len(rows), SECONDS, len(self.classes))
            if seconds.shape != expected or seconds.dtype.kind not in "biuf":
                raise ValueError(
                    f"{path}: got 'avadataset' as {seconds.dtype} of shape {list(seconds.shape)}, expected numbers of shape "
                    f"{list(expected)}: rows of {annotations}, seconds, its categories and background"
                )
            seconds = seconds[indices].astype(np.float32)
            finite, clear = np.isfinite(seconds).all((1, 2)), ((seconds == 1).sum(2) == 1).all(1)
            for index in np.flatnonzero(~finite):
                self._complain(f"{path}, row {indices[index]}", "got a label that is not finite, expected 0 or 1")
            for index in np.flatnonzero(finite & ~clear):
                self._complain(f"{path}, row {indices[index]}", "got a second without exactly one class", usable=True)
        count = self.config.video.frames
        return torch.from_numpy(seconds)[:, [(2 * part + 1) * SECONDS // (2 * count) for part in range(count)]]


def _read_h5(path: Path, key: str) -> np.ndarray:
    import h5py

    try:
        with h5py.File(path) as file:
            if not isinstance(file.get(key), h5py.Dataset):
                raise ValueError(f"{path}: got the keys {sorted(file)}, expected {key!r}")
            return file[key][()]
    except OSError as error:
        raise ValueError(f"{path}: got a file that is not HDF5 ({error}), expected one with {key!r}") from error

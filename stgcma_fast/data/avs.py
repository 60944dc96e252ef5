"""AVSBench: which pixels of five frames make the sound, one source (S4) or several (MS3)."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Literal

from .config import MediaConfig
from .dataset import SPLITS, MediaDataset, read_text
from .sample import Frames, Sample

FRAMES = 5


class AVSDataset(MediaDataset):
    """A split of AVSBench.

    Below the root, or below ``s4_data`` or ``ms3_data`` in it, are ``visual_frames``, ``gt_masks`` and ``audio_wav``. The table
    ``s4_meta_data.csv`` or ``ms3_meta_data.csv``, in one of both places, has names in its first column, for S4 categories in
    its third, and splits in the one called "split".

    Of a clip of S4 they hold ``{split}/{category}/{name}/{name}_{1..5}.png``, of masks the first alone in training, and
    ``{split}/{category}/{name}.wav``. Of one of MS3 they hold ``{name}/{name}.mp4_{1..5}.png`` (or without ``.mp4``),
    ``{split}/{name}/{name}_{1..5}.png`` and ``{split}/{name}.wav``.

    Nothing is drawn for training.

    Args:
        root, split, config, train, seed, problems: see `MediaDataset`.
        subset: "s4" or "ms3"; None: the one that has a table.
    """

    task = "avs"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        config: MediaConfig,
        *,
        train: bool = False,
        seed: int = 0,
        subset: Literal["s4", "ms3"] | None = None,
        problems: list[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(root, split, config, train=train, seed=seed, problems=problems)
        if subset not in ("s4", "ms3", None):
            raise ValueError(f"subset: got {subset!r}, allowed are 's4', 'ms3'")
        if config.video.frames != FRAMES:
            raise ValueError(f"config: got {config.video.frames} frames of a clip, expected the {FRAMES} of AVSBench")
        tables = {name: (f"{name}_meta_data.csv", f"{name}_data/{name}_meta_data.csv") for name in ("s4", "ms3")}
        if subset is None:
            there = [name for name, paths in tables.items() if any((self.root / path).exists() for path in paths)]
            if len(there) == 2:
                raise ValueError(f"subset: got None, but {self.root} has both, expected 's4' or 'ms3'")
            subset = there[0] if there else None
        self.subset = subset
        table = self._find(*(tables[subset] if subset else (path for paths in tables.values() for path in paths)))
        base = self.root / f"{subset}_data"
        self._base = base if base.is_dir() else self.root
        self._clips = self._read(table)
        if not self._clips:
            raise ValueError(f"{table}: got no clip of the split {split!r}, expected one or more")
        self.ids = [name for _, name in self._clips]

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """An item, without draws. There are five masks; in the training split of S4, one."""
        (_, images), (_, audio) = self.files(index)
        frames = Frames(images[:FRAMES], tuple(range(FRAMES)), FRAMES)
        return Sample(self.ids[index], frames, audio, masks=images[FRAMES:])

    def files(self, index: int) -> list[tuple[str, Path | tuple[Path, ...]]]:
        folder, name = self._clips[index]
        frames, masks, audio = (self._base / kind for kind in ("visual_frames", "gt_masks", "audio_wav"))
        stem = frames / (name if self.subset == "ms3" else f"{folder}/{name}") / name
        if self.subset == "ms3" and Path(f"{stem}.mp4_1.png").exists():
            stem = f"{stem}.mp4"
        numbers = range(1, FRAMES + 1)
        masked = numbers[:1] if self.subset == "s4" and self.split == "train" else numbers
        images = [Path(f"{stem}_{number}.png") for number in numbers]
        images += [masks / folder / name / f"{name}_{number}.png" for number in masked]
        return [("video", tuple(images)), ("audio", audio / folder / f"{name}.wav")]

    def _read(self, table: Path) -> list[tuple[str, str]]:
        """Folder, below those of a kind of file, and name of each clip of the split."""
        rows = csv.reader(read_text(table).splitlines(keepends=True))
        header = next(rows, [])
        needed = 3 if self.subset == "s4" else 1
        if "split" not in header or len(header) < needed:
            raise ValueError(
                f"{table}, line 1: got the columns {header}, expected 'split' and {needed} or more: a name first"
                + (", a category third" if needed == 3 else "")
            )
        clips = []
        for row in rows:
            if not any(field.strip() for field in row):
                continue
            where = f"{table}, line {rows.line_num}"
            if len(row) != len(header):
                self._complain(where, f"got {len(row)} fields, expected {len(header)} as in the first line")
                continue
            split, name, category = (row[column].strip() for column in (header.index("split"), 0, needed - 1))
            if split not in SPLITS:
                self._complain(where, f"got the split {split!r}, expected one of {', '.join(map(repr, SPLITS))}")
            elif not name or not category:
                self._complain(where, f"got {row}, expected a name" + (" and a category" if needed == 3 else ""))
            elif split == self.split:
                clips.append((f"{split}/{category}" if needed == 3 else split, name))
        return clips

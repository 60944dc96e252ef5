"""Find what is missing or broken in a data set: annotations, files, clips that are in two splits."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .config import DataTask
from .dataset import SPLITS, MediaDataset, frame_files, open_dataset
from .errors import MediaError
from .sample import Frames

Kind = Literal["missing", "broken", "annotation", "duplicate", "overlap"]
# Worth knowing, but published data sets have them, too.
HARMLESS = ("duplicate", "overlap")
SHOWN = 100  # findings on a terminal; a file gets all


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        kind: a file that is "missing" or "broken"; an "annotation" that is missing or makes no sense; a "duplicate", an item
            that a split has twice; an "overlap", a clip of several splits.
        splits: that it concerns.
        where: a file, with the line if it has some, or the name of a clip or item.
        cause: what is wrong, in words.
    """

    kind: Kind
    splits: tuple[str, ...]
    where: str
    cause: str


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        items: how many each split has that could be opened.
        clips: how many different ones they are about.
        findings: everything that was found.
    """

    items: dict[str, int]
    clips: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is missing or broken. Duplicates and overlaps are not."""
        return all(finding.kind in HARMLESS for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"ok": self.ok} | asdict(self)


def check_root(
    task: DataTask,
    root: str | os.PathLike[str],
    splits: Sequence[str] = SPLITS,
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Check splits of a data set: whether they can be opened, all that is wrong with their annotations, and their files.

    Args:
        task, root: see `open_dataset`.
        splits: that should be there.
        decode, workers, progress: see `check_datasets`.
        options: of the data set.
    """
    datasets, findings = [], []
    for split in splits:
        problems: list[tuple[str, str]] = []
        try:
            datasets.append(open_dataset(task, root, split, problems=problems, **options))
        except (FileNotFoundError, ValueError) as error:
            where, _, what = str(error).partition(": ")
            problems.append((where, what))
        findings += [Finding("annotation", (split,), where, what) for where, what in problems]
    return check_datasets(datasets, decode=decode, workers=workers, progress=progress, findings=findings)


def check_datasets(
    datasets: Sequence[MediaDataset],
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    findings: Sequence[Finding] = (),
) -> Report:
    """Open every file of some splits of one data set, each once.

    Args:
        datasets: the splits.
        decode: decode all sound, and every frame that training may ask for. Otherwise the headers of images are read, wavs, and
            containers without decoding them.
        workers: threads; None: as many as there are processors.
        progress: shows how far it is.
        findings: that there are already.
    """
    found: dict[tuple[Kind, str, str], dict[str, None]] = {}

    def find(kind: Kind, splits: Iterable[str], where: str, cause: str) -> None:
        # What several splits or uses of a file meet is told once.
        found.setdefault((kind, where, cause), {}).update(dict.fromkeys(splits))

    for finding in findings:
        find(finding.kind, finding.splits, finding.where, finding.cause)
    files: dict[tuple[str, Path | tuple[Path, ...]], dict[str, None]] = {}
    for dataset in datasets:
        for name, count in Counter(dataset.names).items():
            if count > 1:
                find("duplicate", [dataset.split], name, f"the split has it {count} times")
        for index in range(len(dataset)):
            for file in dataset.files(index):
                files.setdefault(file, {})[dataset.split] = None
    clips = {dataset.split: set(dataset.ids) for dataset in datasets}
    for one, other in combinations(clips, 2):
        for clip in sorted(clips[one] & clips[other]):
            find("overlap", [one, other], clip, "it is in several splits")

    places = {count for dataset in datasets for count in dataset.places}
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        results = pool.map(partial(_faults, places=places, decode=decode), files)
        if progress:
            results = progress.track(results, total=len(files), description="files")
        for splits, faults in zip(files.values(), results, strict=True):
            for fault in faults:
                find("broken" if os.path.exists(fault.path) else "missing", splits, fault.path, fault.cause)
    finally:
        pool.shutdown(cancel_futures=True)
    return Report(
        {dataset.split: len(dataset) for dataset in datasets},
        {split: len(ids) for split, ids in clips.items()},
        tuple(Finding(kind, tuple(splits), where, cause) for (kind, where, cause), splits in found.items()),
    )


def _faults(file: tuple[str, Path | tuple[Path, ...]], places: set[int], decode: bool) -> list[MediaError]:
    """What is wrong with a file, or with each of some images."""
    kind, source = file
    images = source if isinstance(source, tuple) else frame_files(source) if kind == "video" and source.is_dir() else ()
    faults, sizes = [], {}
    try:
        if kind == "audio":
            _hear(source, decode)
        elif not images:
            _watch(source, places, decode)
    except MediaError as error:
        faults.append(error)
    for image in images:
        try:
            sizes[image] = _size(image, decode)
        except MediaError as error:
            faults.append(error)
    first = next(iter(sizes), None)
    for image, size in sizes.items():
        if size != sizes[first]:
            cause = "it is {}x{}, but {} of the same clip {}x{}".format(*size, first.name, *sizes[first])
            faults.append(MediaError(image, cause))
    return faults


def _hear(path: Path, decode: bool) -> None:
    import av

    from .audio import read_audio
    from .video import check_file

    # A wav takes no decoding, and nothing but its length tells that it was cut off.
    if decode or path.suffix.lower() == ".wav":
        read_audio(path)
        return
    check_file(path)
    try:
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise MediaError(path, "it has no audio track")
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, f"it can not be read: {error.strerror}") from error


def _watch(path: Path, places: set[int], decode: bool) -> None:
    from .video import frame_indices, read_frames

    if path.is_dir():
        raise MediaError(path, "it has no frames, images whose names end with a number")
    for count in places if decode else ():
        read_frames(Frames(path, tuple(range(count)), count))
    if not decode:
        frame_indices(path, (0,), 1)


def _size(path: Path, decode: bool) -> tuple[int, int]:
    """Width and height of an image."""
    from PIL import Image

    from .video import check_file, check_image, read_frames

    if decode:
        height, width = read_frames(Frames((path,), (0,), 1)).shape[1:3]
        return width, height
    check_file(path)
    try:
        with Image.open(path) as image:
            check_image(path, image)
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"it can not be read as an image: {error}") from error


def parser() -> ArgumentParser:
    """The command line of ``stgcma-fast data check``."""
    p = ArgumentParser(
        description=f"{__doc__} Its exit status is 1 if something is missing or broken. Clips in several splits and items "
        "that a split has twice are told, but are in published data sets, too. "
        "Example: stgcma-fast data check --task ave --root AVE --decode"
    )
    p.add_argument("--task", choices=get_args(DataTask), required=True, help="whose layout it has")
    p.add_argument("--root", type=str, required=True, metavar="DIR", help="folder of the data set")
    p.add_argument("--split", choices=SPLITS, nargs="+", default=list(SPLITS), help="splits that should be there")
    p.add_argument("--subset", choices=("s4", "ms3"), help="of AVSBench, where the folder has both")
    p.add_argument("--decode", action="store_true", help="decode what training may ask for; else headers are read")
    p.add_argument("--workers", type=PositiveInt | None, help="threads; as many as there are processors without it")
    p.add_argument("--json", type=str, metavar="FILE", help="write the report here; the folder must exist")
    return p


def main(args: Namespace) -> int:
    """Run the command. Returns its exit status."""
    options = {"subset": args.subset} if args.subset else {}
    if args.subset and args.task != "avs":
        raise ValueError(f"--subset {args.subset}: got it with --task {args.task}, expected --task avs")
    with ExitStack() as stack:
        # The file first: it should not fail when all the work is done.
        file = stack.enter_context(open(args.json, "w", encoding="utf-8")) if args.json else None
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        report = check_root(
            args.task, args.root, args.split, decode=args.decode, workers=args.workers, progress=progress, **options
        )
        if file:
            json.dump(report.to_dict(), file, indent=1)
            file.write("\n")
    _show(report, Console())
    return 0 if report.ok else 1


def _show(report: Report, console: Console) -> None:
    for finding in report.findings[:SHOWN]:
        text = f"{finding.kind} ({', '.join(finding.splits)}): {finding.where}: {finding.cause}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(report.findings) > SHOWN:
        console.print(f"and {len(report.findings) - SHOWN} more, which --json FILE gets")
    kinds = get_args(Kind)
    table = Table("split", "items", "clips", *kinds)
    for split in dict.fromkeys([*report.items, *(split for finding in report.findings for split in finding.splits)]):
        # What is wrong with a container's picture and with its sound counts as one.
        counts = Counter(kind for kind, _ in {(f.kind, f.where) for f in report.findings if split in f.splits})
        numbers = (report.items.get(split, 0), report.clips.get(split, 0), *(counts[kind] for kind in kinds))
        table.add_row(split, *map(str, numbers))
    console.print(table)

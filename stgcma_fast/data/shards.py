"""Media from tar shards that `pack` wrote: any clip by its place in a local file, or all in a stream from anywhere."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import wave
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from .augment import draw
from .avqa import PLACES
from .check import Finding, Report
from .config import MediaConfig
from .dataset import MediaDataset, generator, open_dataset
from .errors import MediaError
from .read import read_sample
from .sample import Frames, Mix, Sample

# In a split's folder: what is said about all its shards, written last, and a copy of the data set's annotations.
INDEX, ANNOTATIONS = "index.json", "annotations"
VERSION = 1
# Member of a shard's last sample: how many there are. A tar that was cut off between two members ends as one that was not.
CLIPS = "clips"
WAV_HEADER = 44  # bytes, of those that `pack` writes
# Clips of a stream that another one's audio and negatives are taken from.
NEIGHBOURS = 16


class PackedMedia(ABC):
    """Clips of shards, as `read.Media`. A path stands for its clip: the file or folder that it names need not be there."""

    @abstractmethod
    def members(self, clip: str, names: Iterable[str]) -> list[bytes]:
        """Members of a clip's sample, by the ends of their names.

        Raises:
            MediaError: there is no such clip or member.
        """

    @abstractmethod
    def where(self, clip: str) -> str:
        """What messages call a clip."""

    def about(self, clip: str) -> dict[str, Any]:
        """What the clip's ``json`` says."""
        return self._decoded(clip, _about, self.members(clip, ["json"])[0])

    def frames(self, frames: Frames) -> Tensor:
        clip = frames.source.stem if isinstance(frames.source, Path) else frames.name.name
        about = self.about(clip)
        if str(frames.of) not in about["places"]:
            packed = " and ".join(about["places"])
            raise MediaError(self.where(clip), f"frames at {packed} places were packed, {frames.of} are asked for")
        places = about["places"][str(frames.of)]
        numbers = [places[slot] for slot in frames.slots]
        images = dict(zip(numbers, self.members(clip, [f"{number:02d}.{about['suffix']}" for number in numbers]), strict=True))
        decode = _image if about["suffix"] == "jpg" else _array
        decoded = {number: self._decoded(clip, decode, image) for number, image in images.items()}
        return torch.stack([decoded[number] for number in numbers])

    def waveform(self, path: Path, sample_rate: int) -> Tensor:
        clip = path.stem
        samples, rate = self._decoded(clip, _samples, self.members(clip, ["wav"])[0])
        if rate != sample_rate:
            raise MediaError(self.where(clip), f"sound of {rate} Hz was packed, {sample_rate} Hz are asked for")
        return samples

    def clip(self, frames: Frames, audio: Path, sample_rate: int) -> tuple[Tensor, Tensor]:
        return self.frames(frames), self.waveform(audio, sample_rate)

    def mask(self, path: Path) -> Tensor:
        clip = path.parent.name
        number = self.about(clip)["masks"].index(path.name)
        return self._decoded(clip, _image, self.members(clip, [f"mask.{number}.png"])[0]) > 0

    def _decoded(self, clip: str, decode: Callable[[bytes], Any], data: bytes) -> Any:
        try:
            return decode(data)
        # Some have no text: for a part that ends behind the file, wave has a RuntimeError.
        except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, wave.Error, Image.DecompressionBombError) as error:
            raise MediaError(self.where(clip), f"it is damaged: {str(error) or type(error).__name__}") from error


def _about(data: bytes) -> dict[str, Any]:
    about = json.loads(data)
    if not isinstance(about, dict) or not {"id", "items", "places", "suffix", "masks"} <= about.keys():
        raise ValueError(f"its json says {data[:80]!r}")
    return about


def _image(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image))


def _array(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data)))


def _samples(data: bytes) -> tuple[Tensor, int]:
    with wave.open(io.BytesIO(data)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        if samples.nbytes != len(data) - WAV_HEADER:
            raise ValueError(f"its wav has {samples.nbytes} bytes of samples, expected {len(data) - WAV_HEADER}")
        return torch.from_numpy(samples.astype(np.float32) / 32768), file.getframerate()


class Shards(PackedMedia):
    """Clips of a split's folder, each read where the shards' indices say that it is.

    Args:
        folder: that `pack` wrote.

    Attributes:
        index: what ``index.json`` holds.

    Raises:
        ValueError: the folder is incomplete, or of another version.
        MediaError: a shard is missing or not as long as it was.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / INDEX
        if not path.exists():
            raise ValueError(f"{folder}: got no {INDEX}, expected a folder that `stgcma-fast data pack` finished")
        self.index: dict[str, Any] = json.loads(path.read_text())
        if self.index["version"] != VERSION:
            raise ValueError(f"{path}: got version {self.index['version']}, expected {VERSION}; pack the data set anew")
        self._places: dict[str, tuple[Path, str]] = {}
        for shard in self.index["shards"]:
            tar = folder / shard["name"]
            size = tar.stat().st_size if tar.exists() else None
            if size != shard["size"]:
                there = "it is missing" if size is None else f"it has {size} bytes"
                raise MediaError(tar, f"{there}, but {INDEX} says {shard['size']} bytes")
            lines = tar.with_suffix(".idx").read_text().splitlines()[1:]
            self._places |= {clip: (tar, line) for clip, line in zip(shard["clips"], lines, strict=True)}

    def where(self, clip: str) -> str:
        return f"{self._places[clip][0]}/{clip}"

    def members(self, clip: str, names: Iterable[str]) -> list[bytes]:
        if clip not in self._places:
            raise MediaError(clip, "the shards have no such clip")
        tar, line = self._places[clip]
        fields = line.split(" ")
        places = {name: (int(offset), int(size)) for name, offset, size, _ in zip(*[iter(fields)] * 4, strict=True)}
        parts = []
        try:
            with open(tar, "rb") as file:
                for name in names:
                    file.seek(places[name][0])
                    parts.append(file.read(places[name][1]))
        except KeyError as error:
            raise MediaError(self.where(clip), f"its sample has no {error}") from error
        except OSError as error:
            raise MediaError(tar, f"it can not be read: {error.strerror}") from error
        return parts


class ShardDataset:
    """A split that was packed. Its items are those of the data set, with the same draws; what they read are the shards.

    Args:
        root: ``out`` of `pack`.
        split: "train", "val" or "test".
        config: what the task makes of media; None: that of the published model on Swin-L.
        train, seed, options: of the data set.

    Attributes:
        dataset: the data set itself, with classes, answers and so on.
        media: the shards.

    Raises:
        ValueError: the folder is incomplete; the split was packed for fewer or smaller frames; or as the data set.
        MediaError: a shard is missing or not as long as it was.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        config: MediaConfig | None = None,
        *,
        train: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        folder = Path(root) / split
        self.media = Shards(folder)
        index = self.media.index
        self.dataset: MediaDataset = open_dataset(
            index["task"], folder / ANNOTATIONS, split, config, train=train, seed=seed, **options
        )
        self.root, self.split, self.config = folder, split, self.dataset.config
        missing = set(self.dataset.places) - set(index["places"])
        if missing:
            raise ValueError(f"{folder}: got frames at {index['places']} places of a clip, expected {sorted(missing)}, too")
        if index["short_side"] < self.config.video.size:
            raise ValueError(
                f"{folder}: got frames of {index['short_side']} pixels, expected {self.config.video.size} (--short-side)"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """An item; the paths in it name clips of ``media``."""
        return self.dataset.sample(index, epoch)

    def check(self) -> Report:
        """Read all shards and tell which are not what was written; see `check.Report`."""
        findings = [
            Finding("broken", (self.split,), str(self.root / shard["name"]), f"its checksum is not that of {INDEX}")
            for shard in self.media.index["shards"]
            if hashlib.sha256((self.root / shard["name"]).read_bytes()).hexdigest() != shard["sha256"]
        ]
        clips = sum(len(shard["clips"]) for shard in self.media.index["shards"])
        return Report({self.split: len(self)}, {self.split: clips}, tuple(findings))


def stream_shards(
    urls: Sequence[str],
    config: MediaConfig,
    batch_size: int,
    *,
    train: bool = False,
    shuffle: int = 0,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterable[dict[str, Any]]:
    """One epoch of shards that are read from their beginnings to their ends, from files or from object storage.

    Batches are those of `AVPipeline`, with all items of a clip one after the other. Each rank, and each of its workers, reads
    shards that no other does, and its last batch may be smaller; so ranks have unequally many batches, and there is no going
    on in the middle of an epoch: for both, use a `ShardDataset`. An item's draws are not those that a `ShardDataset` makes, but
    of the same distributions, save that the clips it takes audio or negatives from are some nearby in the stream.

    Args:
        urls: of the tars; whatever WebDataset opens.
        config: what the task makes of media.
        batch_size: items of a batch.
        train: whether an item gets the draws of training.
        shuffle: clips that wait, of which each time one is drawn; 0: shards and clips come in their order.
        seed, epoch: that the order and the draws depend on, beside the number of ranks and workers.
        rank, world_size: this process and the number of those that share the shards.
        workers: processes; 0: this one.

    Raises:
        ValueError: a rank or a worker has no shard.
        MediaError: while iterating, a sample is broken; with workers, a RuntimeError with its text.
    """
    import webdataset

    if len(urls) < world_size * max(workers, 1):
        raise ValueError(
            f"urls: got {len(urls)} shards, expected one or more for each of {world_size} ranks with {max(workers, 1)} workers"
        )
    order = np.random.default_rng((seed, epoch)).permutation(len(urls)) if shuffle else range(len(urls))
    own = [urls[number] for number in order][rank::world_size]
    clips = webdataset.WebDataset(own, shardshuffle=False, nodesplitter=None, empty_check=False)
    if shuffle:
        clips = clips.shuffle(shuffle, seed=zlib.crc32(f"{seed} {epoch} {rank}".encode()))
    items = clips.compose(partial(_items, config=config, train=train, seed=seed, epoch=epoch))
    batches = items.batched(batch_size, collation_fn=default_collate)
    # A generator of its own: a loader without one draws from PyTorch's, which dropout draws from.
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator())


class _Nearby(PackedMedia):
    """Clips of a stream that are in memory: the last that came."""

    def __init__(self) -> None:
        self.clips: dict[str, dict[str, Any]] = {}

    def add(self, sample: dict[str, Any]) -> str:
        if "json" not in sample:
            raise MediaError(sample["__url__"], f"its sample {sample['__key__']} has no 'json', expected what `pack` writes")
        clip = json.loads(sample["json"])["id"]
        self.clips.pop(clip, None)
        self.clips[clip] = sample
        if len(self.clips) > NEIGHBOURS:
            del self.clips[next(iter(self.clips))]
        return clip

    def where(self, clip: str) -> str:
        return f"{self.clips[clip]['__url__']}/{clip}"

    def members(self, clip: str, names: Iterable[str]) -> list[bytes]:
        try:
            return [self.clips[clip][name] for name in names]
        except KeyError as error:
            raise MediaError(self.where(clip), f"its sample has no {error}") from error


def _items(
    samples: Iterable[dict[str, Any]], config: MediaConfig, train: bool, seed: int, epoch: int
) -> Iterator[dict[str, Any]]:
    """Items of a stream's clips. Those of a clip wait until the next has come, so that even the first has a neighbour."""
    nearby = _Nearby()
    waiting = None
    there: Counter[str] = Counter()
    expected: dict[str, int] = {}
    for sample in itertools.chain(samples, [None]):
        clip = nearby.add(sample) if sample else None
        if sample:
            there[sample["__url__"]] += 1
            if CLIPS in sample:
                expected[sample["__url__"]] = int(sample[CLIPS])
        if waiting:
            about = nearby.about(waiting)
            for number, item in enumerate(about["items"]):
                draws = generator(seed, epoch, zlib.crc32(f"{waiting} {number}".encode()))
                whole = _sample(about, item, list(nearby.clips), config, train, draws)
                yield {**read_sample(whole, config, nearby), **whole.meta, "id": whole.id}
        waiting = clip
    for url, count in there.items():
        if count != expected.get(url):
            raise MediaError(url, f"it is cut off: {count} clips came, expected {expected.get(url, 'more')}")


def _sample(
    about: dict[str, Any], item: dict[str, Any], clips: list[str], config: MediaConfig, train: bool, draws: torch.Generator
) -> Sample:
    """An item of a stream, with draws as the data sets make them from all of their clips."""
    clip, count = about["id"], config.video.frames
    augmentation, mix, negatives = None, None, ()
    if train and config.task == "ave":
        augmentation = draw(draws)
        if torch.rand((), generator=draws) < 0.5:
            other = clips[torch.randint(len(clips), (), generator=draws)]
            mix = Mix(_path(other), tuple(torch.rand(count, 19, generator=draws).median(1).values.tolist()))
    if config.task == "avqa":
        others = [other for other in clips if other != clip]
        if not others:
            raise ValueError(f"{clip}: got no other clip in a worker's shards, expected one that negatives can be taken from")
        numbers = torch.randint(PLACES * len(others), (count,), generator=draws).tolist()
        negatives = tuple(Frames(_path(others[number // PLACES]), (number % PLACES,), PLACES) for number in numbers)
    return Sample(
        clip,
        Frames(_path(clip), tuple(range(count)), count),
        _path(clip),
        {name: torch.tensor(value) for name, value in item["target"].items()},
        item["meta"],
        tuple(Path(clip, name) for name in about["masks"]),
        negatives,
        augmentation,
        mix,
    )


def _path(clip: str) -> Path:
    return Path(f"{clip}.mp4")

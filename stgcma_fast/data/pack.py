"""Write a data set into tar shards: frames decoded once, sound as 16 bits at 16 kHz, masks, targets."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
import wave
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from .audio import read_audio
from .config import DataTask
from .dataset import SPLITS, MediaDataset, open_dataset
from .read import whole_masks
from .sample import Frames
from .shards import ANNOTATIONS, CLIPS, INDEX, VERSION
from .torch_backend import in_order
from .video import read_frames

FrameFormat = Literal["jpeg", "raw"]
JPEG_QUALITY = 95
SMOOTH = {"crop": InterpolationMode.BILINEAR, "squash": InterpolationMode.BICUBIC}


def pack(
    dataset: MediaDataset,
    out: str | os.PathLike[str],
    *,
    shard_size: float = 256,
    frames: FrameFormat = "jpeg",
    short_side: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write ``{out}/{split}``: shards, an index of each, a copy of the annotations, and ``index.json``.

    The folder gets its name when everything is in it, so none that has it is incomplete: what was stopped or killed leaves
    ``.{split}.partial``, which the next run removes and begins anew.

    A shard is a tar with a sample, in WebDataset's sense, for each clip: ``wav``; frames as ``00.jpg`` or ``00.npy`` (uint8
    ``[H, W, 3]``); masks as ``mask.0.png``; and ``json`` with "id", "items" (targets and words), "places" (which of its frames
    each place is), their "suffix", and names of the "masks". The last one has ``clips``, too: how many are in the shard. Beside
    it is an index, as ``wds2idx`` makes it for DALI.

    Frames and sound are read as training reads them. Frames whose shorter side is longer than ``short_side`` are resized to
    it as the task resizes them: evaluation gets the same numbers then, but for what JPEG loses, and the rounding to whole grey
    levels where the task squashes frames. Sound is rounded to 16 bits, which changes nothing of a wav of 16 kHz and 16 bits.

    Args:
        dataset: without ``train``: what is drawn for training is drawn from the shards.
        out: folder for the splits.
        shard_size: of a shard, in MB; the last is smaller, and one of a single clip may be larger.
        frames: "jpeg", of quality 95 with colours at full resolution; "raw", exact.
        short_side: None: that of the task's images; for AVE's train split, from which training cuts parts, 8/7 of it.
        workers: processes; 0: this one; None: as many as it has cores.
        progress: shows how far it is.

    Returns:
        The split's folder.

    Raises:
        FileExistsError: it is there already.
        ValueError: a data set with ``train``, arguments out of range, or different clips of one name.
        MediaError: a file is broken. Nothing is packed then; `check` tells beforehand which are.
    """
    if dataset.train:
        raise ValueError("dataset: got one with train=True, expected one without: shards serve both")
    if frames not in get_args(FrameFormat):
        raise ValueError(f"frames: got {frames!r}, allowed are {', '.join(map(repr, get_args(FrameFormat)))}")
    if shard_size <= 0:
        raise ValueError(f"shard_size: got {shard_size}, expected more than 0 MB")
    size = dataset.config.video.size
    if short_side is None:
        short_side = 8 * size // 7 if (dataset.task, dataset.split) == ("ave", "train") else size
    if short_side < size:
        raise ValueError(f"short_side: got {short_side}, expected the {size} pixels of the task's images or more")
    folder = Path(out) / dataset.split
    if folder.exists():
        raise FileExistsError(f"{folder}: it is there already; remove it to pack the split anew")
    unfinished = folder.with_name(f".{dataset.split}.partial")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # what a killed run left
    unfinished.mkdir(parents=True)

    for path in dataset.annotations:
        copy = unfinished / ANNOTATIONS / path.relative_to(dataset.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    clips = defaultdict(list)
    for index, clip in enumerate(dataset.ids):
        clips[clip].append(index)
    encoded = in_order(partial(_encode, dataset, frames, short_side), list(clips.values()), workers)
    if progress:
        encoded = progress.track(encoded, total=len(clips), description="clips")
    shards: list[dict[str, Any]] = []
    shard = None
    for number, (clip, members) in enumerate(zip(clips, encoded, strict=True)):
        if shard and shard.size + sum(map(len, members.values())) > shard_size * 1e6:
            shards.append(shard.close())
            shard = None
        shard = shard or _Shard(unfinished / f"{dataset.split}-{len(shards):06d}.tar")
        shard.add(f"{number:06d}", clip, members)
    shards.append(shard.close())
    index = {
        "version": VERSION,
        "task": dataset.task,
        "split": dataset.split,
        "frames": frames,
        "places": list(dataset.places),
        "short_side": short_side,
        "sample_rate": dataset.config.audio.sample_rate,
        "items": len(dataset),
        "shards": shards,
    }
    (unfinished / INDEX).write_text(json.dumps(index))
    os.replace(unfinished, folder)
    return folder


class _Shard:
    """A tar that is being written. The same clips make the same bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._clips: list[str] = []
        self._lines: list[list[str]] = []

    @property
    def size(self) -> int:
        return self._tar.offset

    def add(self, key: str, clip: str, members: dict[str, bytes]) -> None:
        self._clips.append(clip)
        self._lines.append([])
        self._key = key
        for name, data in members.items():
            self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(f"{self._key}.{name}")
        info.size = len(data)
        self._lines[-1].append(f"{name} {self._tar.offset + tarfile.BLOCKSIZE} {info.size} {info.name}")
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> dict[str, Any]:
        """What the index says about it."""
        self._write(CLIPS, str(len(self._clips)).encode())
        self._tar.close()
        data = self._path.read_bytes()
        self._path.with_suffix(".idx").write_text("\n".join([f"v1.2 {len(self._lines)}", *map(" ".join, self._lines), ""]))
        checksum = hashlib.sha256(data).hexdigest()
        return {"name": self._path.name, "size": len(data), "sha256": checksum, "clips": self._clips}


def _encode(dataset: MediaDataset, frames: FrameFormat, short_side: int, items: list[int]) -> dict[str, bytes]:
    """Members of a clip's sample, by the ends of their names; ``items`` are the data set's about the clip."""
    samples = [dataset.sample(index) for index in items]
    sample, config, resize = samples[0], dataset.config, dataset.config.video.resize
    for other in samples:
        if (other.video, other.audio, other.masks) != (sample.video, sample.audio, sample.masks):
            raise ValueError(
                f"{sample.id}: got two clips of this name, {sample.video.name} and {other.video.name}, expected one"
            )
    numbers: dict[bytes, int] = {}  # a frame that is in several places is there once
    places = {}
    for count in dataset.places:
        images = read_frames(Frames(sample.video.source, tuple(range(count)), count))
        small = _shrink(images.permute(0, 3, 1, 2), short_side, resize, SMOOTH[resize]).permute(0, 2, 3, 1)
        places[count] = [numbers.setdefault(_image(image, frames), len(numbers)) for image in small]
    masks = []
    if sample.masks:
        whole = whole_masks(sample, config.video, tuple(images.shape[1:3])).to(torch.uint8)
        masks = list(_shrink(whole, short_side, resize, InterpolationMode.NEAREST_EXACT))
    suffix = "jpg" if frames == "jpeg" else "npy"
    about = {
        "id": sample.id,
        "places": places,
        "suffix": suffix,
        "masks": [path.name for path in sample.masks],
        "items": [{"target": {k: v.tolist() for k, v in s.target.items()}, "meta": dict(s.meta)} for s in samples],
    }
    return {
        "json": json.dumps(about).encode(),
        "wav": _wav(read_audio(sample.audio, config.audio.sample_rate), config.audio.sample_rate),
        **{f"{number:02d}.{suffix}": image for image, number in numbers.items()},
        **{f"mask.{number}.png": _png(mask) for number, mask in enumerate(masks)},
    }


def _shrink(images: Tensor, short_side: int, resize: str, mode: InterpolationMode) -> Tensor:
    """uint8 ``[..., H, W]``, resized as the task resizes where the shorter side is too long; see `augment.frames_to_tensor`."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if short <= short_side:
        return images
    if resize == "crop":
        return F.resize(images, [short_side * height // short, short_side * width // short], mode, antialias=False)
    # The kernel for whole grey levels is off by more than the rounding.
    return F.resize(images.float(), [short_side, short_side], mode, antialias=False).round_().clamp_(0, 255).to(torch.uint8)


def _image(image: Tensor, frames: FrameFormat) -> bytes:
    file = io.BytesIO()
    if frames == "raw":
        np.save(file, image.numpy())
    else:
        Image.fromarray(image.numpy()).save(file, "jpeg", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def _png(mask: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.mul(255).numpy()).save(file, "png")
    return file.getvalue()


def _wav(waveform: Tensor, sample_rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(waveform.mul(32768).round().clamp(-32768, 32767).to(torch.int16).numpy().astype("<i2").tobytes())
    return file.getvalue()


def parser() -> ArgumentParser:
    """The command line of ``stgcma-fast data pack``."""
    p = ArgumentParser(
        description=f"{__doc__} Training from shards decodes no video. The folder OUT/SPLIT appears when it is complete; a run "
        "that was killed is begun anew. Example: stgcma-fast data pack --task ave --root AVE --split train --out packed"
    )
    p.add_argument("--task", choices=get_args(DataTask), required=True, help="whose layout the data set has")
    p.add_argument("--root", type=str, required=True, metavar="DIR", help="folder of the data set")
    p.add_argument("--split", choices=SPLITS, required=True, help="what is packed")
    p.add_argument("--out", type=str, required=True, metavar="DIR", help="folder that gets one of the split's name")
    p.add_argument("--subset", choices=("s4", "ms3"), help="of AVSBench, where the folder has both")
    p.add_argument("--shard-size", type=PositiveFloat, default=256, metavar="MB", help="size of a shard")
    p.add_argument("--frames", choices=get_args(FrameFormat), default="jpeg", help="jpeg of quality 95, or raw pixels")
    p.add_argument(
        "--short-side",
        type=PositiveInt | None,
        metavar="PIXELS",
        help="of larger frames; without it 224, for the train split of AVE 256, from which training cuts parts",
    )
    p.add_argument("--workers", type=NonNegativeInt | None, help="processes; as many as there are cores without it")
    return p


def main(args: Namespace) -> int:
    """Run the command. Returns its exit status."""
    begun = time.perf_counter()
    options = {"subset": args.subset} if args.subset else {}
    if args.subset and args.task != "avs":
        raise ValueError(f"--subset {args.subset}: got it with --task {args.task}, expected --task avs")
    dataset = open_dataset(args.task, args.root, args.split, **options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        folder = pack(
            dataset,
            args.out,
            shard_size=args.shard_size,
            frames=args.frames,
            short_side=args.short_side,
            workers=args.workers,
            progress=progress,
        )
    shards = sorted(folder.glob("*.tar"))
    size = sum(path.stat().st_size for path in shards) / 1e6
    seconds = time.perf_counter() - begun
    print(f"{folder}: {len(set(dataset.ids))} clips in {len(shards)} shards of {size:.0f} MB together, in {seconds:.1f} s")
    return 0

"""Clips a second from media files to tensors, by backend and stage, beside a plain loader.

A clip is read by a single process with a single thread, stage by stage, all ways in turn: `video`, frames out of the file;
`transform`, these to a normalised tensor; `audio`, samples out of the file; `filterbank`, these to normalised chunks (plain's
own has the decoding in it); `clip`, all of it. Then a `loader` reads the set in batches, with workers, to the device.

plain is a loader as they are commonly written, and as the published ones are: a loop over decoded frames that turns those it
wants into PIL images, PIL and torchvision transforms frame by frame, the sound decoded anew for every chunk, and torchaudio's
filterbank for each chunk. pyav and dali are `AVPipeline`'s backends, shards its reader of packed sets.

Without `--root` a synthetic set is made first. Memory is the proportional set size of the process and its workers, looked at
once a second; its slope is a least squares fit over what was seen but for the first fifth.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import torch
from harness import add_device, add_json, chosen_device, json_file, progress_bar, quantiles, save
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchaudio.compliance.kaldi import fbank
from torchaudio.functional import resample
from torchvision.transforms import v2

from stgcma_fast.config import BACKBONES
from stgcma_fast.data.audio import read_audio
from stgcma_fast.data.augment import frames_to_tensor
from stgcma_fast.data.config import IMAGE_MEAN, IMAGE_STD, AudioConfig, DataTask, MediaConfig, VideoConfig, media_config
from stgcma_fast.data.dataset import open_dataset
from stgcma_fast.data.fbank import filterbanks
from stgcma_fast.data.pack import pack
from stgcma_fast.data.pipeline import AVPipeline, Dataset, choose
from stgcma_fast.data.read import read_sample
from stgcma_fast.data.sample import Frames, Sample
from stgcma_fast.data.shards import ShardDataset
from stgcma_fast.data.synth import synthesize
from stgcma_fast.data.video import read_frames

PROVIDERS = ("plain", "pyav", "dali", "shards")
STAGES = ("video", "transform", "audio", "filterbank", "clip")
PHASES = ("eval", "train")
KEYS = ("task", "arch", "media", "phase", "stage", "provider", "batch_size", "workers", "device")


class Plain:
    """A clip as common loaders read it."""

    def __init__(self, config: MediaConfig) -> None:
        self.config = config

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """Everything that `stgcma_fast.data.read.read_sample` gives, but for masks."""
        images = self.video(sample.video)
        item = {"video": self.transform(images, sample), "audio": self.filterbank(sample), **sample.target}
        if sample.negatives:
            taken = [image for frames in sample.negatives for image in self.video(frames)]
            item["negative"] = self.evaluation(taken)
        return item

    @staticmethod
    def video(frames: Frames) -> list[Image.Image]:
        """The frames as PIL images."""
        if not isinstance(frames.source, Path):
            places = np.linspace(1, len(frames.source), frames.of)[list(frames.slots)].astype(int) - 1
            return [Image.open(frames.source[place]).convert("RGB") for place in places]
        with av.open(str(frames.source)) as container:
            stream = container.streams.video[0]
            places = np.linspace(1, stream.frames or sum(1 for _ in _decoded(frames.source)), frames.of)
            places = places[list(frames.slots)].astype(int) - 1
            images = {}
            for number, frame in enumerate(container.decode(stream)):
                if number in places:
                    images[number] = frame.to_image()
                if number == places.max():
                    break
        return [images[place] for place in places]

    def transform(self, images: list[Image.Image], sample: Sample) -> Tensor:
        """The frames' tensor."""
        return self.evaluation(images) if sample.augmentation is None else self.training(images)

    def evaluation(self, images: list[Image.Image]) -> Tensor:
        """Resize, crop and normalise, frame by frame."""
        config: VideoConfig = self.config.video
        resize = [v2.Resize(config.size), v2.CenterCrop(config.size)]
        if config.resize == "squash":
            resize = [v2.Resize((config.size, config.size), v2.InterpolationMode.BICUBIC)]
        steps = v2.Compose([*resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGE_MEAN, IMAGE_STD)])
        frames = torch.stack([steps(image) for image in images])
        return frames.transpose(0, 1) if config.layout == "CTHW" else frames

    def training(self, images: list[Image.Image]) -> Tensor:
        """RandAugment of PIL images, then random resized crop, flip and erasing of the clip."""
        from timm.data.auto_augment import rand_augment_transform

        size = self.config.video.size
        augment = rand_augment_transform(
            "rand-m7-n4-mstd0.5-inc1", {"translate_pct": 0.45, "img_mean": (128, 128, 128), "interpolation": Image.BICUBIC}
        )
        seed = random.getrandbits(32)
        frames = []
        for image in images:  # the same draws for each
            random.seed(seed)
            np.random.seed(seed)
            image = v2.functional.to_dtype(v2.functional.to_image(augment(image)), torch.float32, scale=True)
            frames.append(v2.functional.normalize(image, IMAGE_MEAN, IMAGE_STD))
        steps = v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.08, 1), (0.75, 1.3333), antialias=False),
                v2.RandomHorizontalFlip(),
                v2.RandomErasing(0.25, (0.02, 1 / 3), (0.3, 3.33), value="random"),
            ]
        )
        return steps(torch.stack(frames)).transpose(0, 1)

    def filterbank(self, sample: Sample) -> Tensor:
        """The chunks, each from a decoding of its own."""
        config: AudioConfig = self.config.audio
        chunks = []
        for chunk in range(config.chunks):
            x = self.audio(sample.audio)
            if sample.mix is not None:
                other, lam = self.audio(sample.mix.audio), sample.mix.lams[chunk]
                second = torch.zeros_like(x)
                second[: len(other)] = other[: len(x)]
                x = lam * x + (1 - lam) * second
                x = x - x.mean()
            if len(x) > config.margin:
                start = int(np.linspace(0, len(x) - config.margin, config.chunks)[chunk])
                x = x[start : start + config.window]
            bank = fbank(
                x[None],
                htk_compat=True,
                sample_frequency=config.sample_rate,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=config.num_mel_bins,
                dither=0.0,
                frame_shift=config.frame_shift_ms,
            )
            bank = (bank - config.mean) / (2 * config.std)
            chunks.append(torch.nn.functional.pad(bank, (0, 0, 0, max(0, config.frames - len(bank))))[: config.frames])
        return torch.stack(chunks)

    def audio(self, path: Path) -> Tensor:
        """The waveform, centred."""
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            parts = [frame.to_ndarray() for frame in container.decode(stream)]
            rate, channels, planar = stream.rate, stream.channels, stream.format.is_planar
        x = np.concatenate(parts, axis=1)
        x = torch.from_numpy(x if planar else x.reshape(-1, channels).T)
        x = (x if x.is_floating_point() else x / 32768.0).mean(0)
        if rate != self.config.audio.sample_rate:
            x = resample(x, rate, self.config.audio.sample_rate)
        return x - x.mean()


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


class PlainDataset(torch.utils.data.Dataset):
    """A map-style data set of what `Plain` reads."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.read = dataset, Plain(dataset.config)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.dataset.sample(index))


def plain_stages(config: MediaConfig, sample: Sample) -> dict[str, Callable[[], Any]]:
    """What the plain loader does in each stage. Its filterbank stage decodes, as many times as there are chunks."""
    plain = Plain(config)
    images = plain.video(sample.video)
    return {
        "video": partial(plain.video, sample.video),
        "transform": partial(plain.transform, images, sample),
        "audio": partial(plain.audio, sample.audio),
        "filterbank": partial(plain.filterbank, sample),
        "clip": partial(plain, sample),
    }


def own_stages(config: MediaConfig, sample: Sample) -> dict[str, Callable[[], Any]]:
    """What this package does in each stage."""
    frames, waveform = read_frames(sample.video), read_audio(sample.audio, config.audio.sample_rate)
    mix = None if sample.mix is None else (read_audio(sample.mix.audio, config.audio.sample_rate), sample.mix.lams)
    return {
        "video": partial(read_frames, sample.video),
        "transform": partial(frames_to_tensor, frames, config.video, sample.augmentation),
        "audio": partial(read_audio, sample.audio, config.audio.sample_rate),
        "filterbank": partial(filterbanks, [waveform], config.audio, [mix]),
        "clip": partial(read_sample, sample, config),
    }


def time_stages(dataset: Dataset, providers: list[str], advance: Callable[[], None]) -> list[dict[str, Any]]:
    """Milliseconds of each stage over the clips of a set, the ways in turn, with one thread."""
    makers = {"plain": plain_stages, "pyav": own_stages}
    taken: dict[tuple[str, str], list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            for provider in (name for name in makers if name in providers):
                for stage, run in makers[provider](dataset.config, sample).items():
                    start = time.perf_counter()
                    run()
                    taken.setdefault((stage, provider), []).append((time.perf_counter() - start) * 1e3)
            advance()
    finally:
        torch.set_num_threads(threads)
    return [
        {"stage": stage, "provider": provider, "workers": None, "batch_size": None, "clips": len(times)}
        | dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles(times), strict=True))
        | {"clips_per_s": 1e3 / quantiles(times)[1]}
        for (stage, provider), times in taken.items()
    ]


def memory(pid: int | None = None) -> float:
    """Megabytes of this process, or another, and of all that it started; what they share is counted once."""
    folder = Path(f"/proc/{pid or os.getpid()}")
    try:
        rollup = (folder / "smaps_rollup").read_text().splitlines()
        children = [int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, ProcessLookupError):  # it has ended meanwhile
        return 0.0
    own = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return own / 1024 + sum(map(memory, children))


def loaders(
    dataset: Dataset, shards: Dataset | None, batch_size: int, workers: int, device: str
) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """For each provider what begins an epoch of batches on the device."""

    def plain() -> Iterator[dict[str, Any]]:
        for batch in DataLoader(PlainDataset(dataset), batch_size, num_workers=workers, pin_memory=device == "cuda"):
            yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}

    pipeline = partial(AVPipeline, batch_size=batch_size, workers=workers, device=device)
    made = {"plain": plain}
    for name, source, backend in (("pyav", dataset, "pyav"), ("dali", dataset, "dali"), ("shards", shards, "pyav")):
        if source is not None:
            made[name] = partial(lambda source, backend: iter(pipeline(source, backend=backend)), source, backend)
    return made


def time_loader(begin: Callable[[], Iterator[dict[str, Any]]], clips: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """Clips a second of a loader that begins again until it has handed over so many, and how its memory grows."""
    seen, track = 0, []
    start = looked = time.perf_counter()
    while seen < clips:
        for batch in begin():
            if batch["video"].is_cuda:
                torch.cuda.synchronize()
            seen += len(batch["video"])
            advance(len(batch["video"]))
            # A look takes 20 ms of a core, which the workers want: after every batch, it was much of what was measured.
            if not track or time.perf_counter() - looked > 1:
                track.append((seen, memory()))
                looked = time.perf_counter()
    seconds = time.perf_counter() - start
    later = np.array(track[len(track) // 5 :])
    slope = float(np.polyfit(*later.T, 1)[0]) * 1000 if len(later) > 2 else None
    return {"clips": seen, "clips_per_s": seen / seconds, "peak_mb": max(mb for _, mb in track), "mb_per_1000_clips": slope}


def print_table(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """The measurements, for people."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("phase", "stage", "provider"):
        table.add_column(name, no_wrap=True)
    for heading in ("p20\nms", "p50\nms", "p80\nms", "clips\n/s", "over\nplain", "peak\nMB", "MB/1000\nclips"):
        table.add_column(heading, justify="right")
    plain = {(row["phase"], row["stage"]): row["clips_per_s"] for row in rows if row["provider"] == "plain"}
    for row in rows:
        numbers = [row.get(key) for key in ("p20_ms", "p50_ms", "p80_ms", "clips_per_s")]
        base = plain.get((row["phase"], row["stage"]))
        cells = ["-" if x is None else f"{x:.4g}" for x in numbers]
        cells.append("-" if base is None else f"{row['clips_per_s'] / base:.2f}x")
        cells += ["-" if row.get(key) is None else f"{row[key]:.0f}" for key in ("peak_mb", "mb_per_1000_clips")]
        table.add_row(row["phase"], row["stage"], row["provider"], *cells)
    console.print(table)


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="data.py", description=__doc__)
    p.add_argument("--task", choices=get_args(DataTask), default="ave", help="whose data set and settings")
    p.add_argument("--arch", choices=tuple(BACKBONES), default="swin_l", help="backbone that the tensors are for")
    p.add_argument("--root", type=str, default=None, metavar="FOLDER", help="a data set in its published layout")
    p.add_argument("--split", type=str, default="train", help="of the data set")
    p.add_argument("--codec", choices=("h264", "vp9"), default="h264", help="of the synthetic set, without --root")
    p.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES), help="without augmentation, or with")
    p.add_argument("--provider", choices=PROVIDERS, nargs="+", default=None, help="default: all that can serve")
    p.add_argument("--clips", type=PositiveInt, default=40, help="of the synthetic set, and read by each stage")
    p.add_argument("--loader-clips", type=PositiveInt, default=160, help="read by each loader, in as many epochs as it takes")
    p.add_argument("--batch-size", type=PositiveInt, default=4, help="clips in a batch")
    p.add_argument("--workers", type=PositiveInt, default=2, help="processes of a loader, threads of DALI")
    add_device(p)
    add_json(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    p = parser()
    args = p.parse_args(argv)
    device = chosen_device(p, args.device)
    file = json_file(p, args.json, device)
    config = media_config(args.task, BACKBONES[args.arch])
    console = Console()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        root, media = args.root, "files"
        if root is None:
            media = args.codec
            root = stack.enter_context(tempfile.TemporaryDirectory())
            # Three of five clips are for training.
            synthesize(args.task, Path(root), -(-args.clips * 5 // 3), codec=args.codec)
        packed, refusal = None, None
        for phase in dict.fromkeys(args.phase):
            dataset = open_dataset(args.task, root, args.split, config, train=phase == "train")
            providers = list(args.provider or PROVIDERS)
            if "dali" in providers:
                try:
                    choose("dali", dataset, torch.device(device))
                except ValueError as error:
                    if args.provider:
                        p.error(f"--provider dali: {error}")
                    refusal = str(error)
                    providers.remove("dali")
            shards = None
            if "shards" in providers:
                if packed is None:
                    packed = stack.enter_context(tempfile.TemporaryDirectory())
                    pack(open_dataset(args.task, root, args.split, config), packed)
                shards = ShardDataset(packed, args.split, config, train=phase == "train")
            labels = {"task": args.task, "arch": args.arch, "media": media, "phase": phase, "device": device}
            with progress_bar(console) as progress:
                task = progress.add_task(f"{phase} stages", total=len(dataset))
                found = time_stages(dataset, providers, partial(progress.advance, task))
                for name, begin in loaders(dataset, shards, args.batch_size, args.workers, device).items():
                    if name in providers:
                        task = progress.add_task(f"{phase} {name}", total=args.loader_clips)
                        row = time_loader(begin, args.loader_clips, partial(progress.advance, task))
                        found.append(
                            row | {"stage": "loader", "provider": name, "workers": args.workers, "batch_size": args.batch_size}
                        )
            rows += [row | labels for row in found]
            if file is not None:
                save(file, "data", rows, KEYS, device)
    print_table(rows, f"{args.task} {args.arch}, {media} on {device}, {args.workers} workers", console)
    if refusal is not None:
        console.print(f"dali is left out: {refusal}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

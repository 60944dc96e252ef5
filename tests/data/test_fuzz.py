"""Files that chance has damaged are read or refused by name: no crash, no hang, no other error, nothing left open.

A damaged file is its kind and a number: ``write(folder, "mp4", 17)`` makes the seventeenth mp4 again.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stgcma_fast.data.audio import read_audio
from stgcma_fast.data.config import AudioConfig, MediaConfig, VideoConfig
from stgcma_fast.data.errors import MediaError
from stgcma_fast.data.pipeline import AVPipeline
from stgcma_fast.data.read import read_sample
from stgcma_fast.data.sample import Frames, Sample
from tests.data.conftest import numbered_frame, write_video
from tests.data.test_audio import encode, tone, write_float_wav, write_wav

T, SIDE, BINS = 3, 16, 8
CONFIG = MediaConfig(
    "avs",
    AudioConfig(chunks=T, window=1600, margin=2000, num_mel_bins=BINS, frame_shift_ms=10, frames=10, mean=-4.0, std=3.0),
    VideoConfig(T, SIDE, "crop", "TCHW"),
)
SHAPES = {"video": (T, 3, SIDE, SIDE), "audio": (T, 10, BINS), "mask": (1, 1, SIDE, SIDE)}
# What a process may allocate on top of what it has. A file of some kilobytes needs no more, whatever its header says.
MEMORY = 2 << 30
# For a batch of files, which takes a second or two: not a measure of speed, but what tells that one of them hangs.
SECONDS = 120


def _container(ending, codec, sound, rate=16000, pixels="yuv420p", options=None, container_options=None):
    def make(path):
        return write_video(
            path.with_suffix(ending),
            12,
            (32, 24),
            codec,
            pixels=pixels,
            options=options,
            container_options=container_options,
            audio=tone(rate // 2, rate)[None],
            audio_codec=sound,
            audio_rate=rate,
        )

    return make


def _image(ending, mode="RGB"):
    def make(path):
        Image.fromarray(numbered_frame(3, 32, 24)).convert(mode).save(path.with_suffix(ending))
        return path.with_suffix(ending)

    return make


GROUPS = {"g": "6", "bf": "2"}
QUICK = {"g": "6", "deadline": "realtime", "cpu-used": "8"}
KINDS = {
    "mp4": _container(".mp4", "libx264", "aac", options=GROUPS),
    "fragments": _container(
        ".mp4", "libx264", "aac", options=GROUPS, container_options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "webm": _container(".webm", "libvpx-vp9", "libopus", 48000, options=QUICK),
    "avi": _container(".avi", "mjpeg", "pcm_s16le", pixels="yuvj420p"),
    "vp9": _container(".mp4", "libvpx-vp9", "aac", options=QUICK),
    "mov": _container(".mov", "mjpeg", "pcm_s16le", pixels="yuvj420p"),
    "mkv": _container(".mkv", "mpeg4", "flac", options=GROUPS),
    "ts": _container(".ts", "libx264", "mp2", options=GROUPS),
    "wav": lambda path: write_wav(path.with_suffix(".wav"), np.round(tone(4000)[None] * 32767).astype(np.int16)),
    "float": lambda path: write_float_wav(path.with_suffix(".wav"), tone(4000)),
    "flac": lambda path: encode(path.with_suffix(".flac"), tone(8000)[None], codec="flac"),
    "ogg": lambda path: encode(path.with_suffix(".ogg"), tone(24000, 48000)[None], 48000, "libopus"),
    "mp3": lambda path: encode(path.with_suffix(".mp3"), tone(8000)[None], codec="mp3"),
    "jpg": _image(".jpg"),
    "png": _image(".png"),
    "mask": _image(".png", "L"),
}
SOUNDS = ("wav", "float", "flac", "ogg", "mp3")
IMAGES = ("jpg", "png")
DALI = ("webm", "vp9", "mov", "avi", "jpg", "png")


@cache
def whole(folder: Path, kind: str) -> Path:
    """The undamaged file of a kind."""
    return KINDS[kind](folder / kind)


NUMBERS = (
    0,
    1,
    2,
    7,
    0x7F,
    0xFF,
    0x100,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0xFFFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xC0000000,
    0xFFFFFFFF,
)


def damage(data: bytearray, rng: np.random.Generator) -> None:
    """One change, in place; half of them within the first half kilobyte, or around a word, as headers are."""
    size = len(data)

    def place():
        near = rng.random()
        words = [match.start() for match in re.finditer(rb"[A-Za-z]{4}", bytes(data))]
        if near < 0.35 and words:
            return int(min(max(0, words[rng.integers(len(words))] + rng.integers(-8, 48)), size - 1))
        return int(rng.integers(min(size, 512) if near < 0.6 else size))

    def length():
        return int(2 ** rng.uniform(0, np.log2(size)))

    start, kind = place(), rng.integers(10)
    end = start + length()
    if kind == 0:
        for _ in range(rng.integers(1, 9)):
            data[place()] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[start] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)]))
    elif kind == 2:
        del data[start:end]
    elif kind == 3:
        data[start:start] = rng.bytes(end - start) if rng.random() < 0.5 else data[place() :][: end - start]
    elif kind == 4:
        other = place()
        count = min(end - start, abs(other - start))
        data[start : start + count], data[other : other + count] = data[other : other + count], data[start : start + count]
    elif kind == 5:
        del data[int(rng.integers(size)) :]
    elif kind == 6:
        data[start:end] = bytes(len(data[start:end]))
    else:
        form = rng.choice([">I", "<I", ">H", "<H"])
        number = struct.pack(form, int(rng.choice(NUMBERS)) & (0xFFFFFFFF if form[1] == "I" else 0xFFFF))
        data[start : start + len(number)] = number


def seal_png(data: bytearray) -> None:
    """Make the checksums of a PNG's parts right again, so that damage comes further than these."""
    start = 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[start + 4 : end]).to_bytes(4, "big")
        start = end + 4


def seal_ogg(data: bytearray) -> None:
    """The same of an Ogg's pages: CRC-32 without reflection, of the page with zeros in the checksum's place."""
    starts = [match.start() for match in re.finditer(b"OggS", bytes(data))]
    for start, end in itertools.pairwise([*starts, len(data)]):
        if end - start < 27:
            continue
        data[start + 22 : start + 26] = bytes(4)
        crc = 0
        for byte in data[start:end]:
            crc = crc << 8 & 0xFFFFFFFF ^ CRC_TABLE[crc >> 24 ^ byte]
        data[start + 22 : start + 26] = crc.to_bytes(4, "little")


def _crc(value: int) -> int:
    for _ in range(8):
        value = value << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if value >> 31 else 0)
    return value


CRC_TABLE = [_crc(byte << 24) for byte in range(256)]
SEALS = {".png": seal_png, ".ogg": seal_ogg}


def write(folder: Path, kind: str, number: int) -> Path:
    """A damaged file."""
    rng = np.random.default_rng((zlib.crc32(kind.encode()), number))
    source = whole(folder, kind)
    data = bytearray(source.read_bytes())
    for _ in range(rng.integers(1, 4)):
        if data:
            damage(data, rng)
    if source.suffix in SEALS and rng.random() < 0.8:
        SEALS[source.suffix](data)
    path = folder / f"{kind}-{number}{source.suffix}"
    path.write_bytes(data)
    return path


def sample(folder: Path, kind: str, path: Path) -> Sample:
    """An item of which only this file may be damaged; a container is both its video and its sound."""
    images, sound, masks = (whole(folder, "png"),) * T, whole(folder, "wav"), ()
    if kind in SOUNDS:
        sound = path
    elif kind in IMAGES:
        images = (whole(folder, kind), path, whole(folder, kind))
    elif kind == "mask":
        masks = (path,)
    else:
        images = sound = path
    return Sample(path.name, Frames(images, tuple(range(T)), T), sound, masks=masks)


def wrong(tensors: dict[str, Any], rows: tuple[int, ...] = ()) -> str:
    """What is wrong with the tensors of an item or of a batch."""
    for key, shape in SHAPES.items():
        value = tensors.get(key)
        if value is not None and (value.dtype != torch.float32 or tuple(value.shape) != (*rows, *shape)):
            return f"{key} is {value.dtype} of shape {tuple(value.shape)}"
        if value is not None and not value.isfinite().all():
            return f"{key} is not finite"
    return ""


def read(folder: Path, kind: str, path: Path) -> str:
    """Read an item: "read", "refused", or what is wrong with what came of it."""
    try:
        return wrong(read_sample(sample(folder, kind, path), CONFIG)) or "read"
    except MediaError as error:
        return "refused" if error.path == str(path) and error.cause else f"another file is blamed: {error}"


class Clips:
    """The data set of these samples."""

    root, split, config = Path("clips"), "train", CONFIG

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, epoch: int = 0) -> Sample:
        return self.samples[index]


def decode(folder: Path, kind: str, path: Path) -> str:
    """The same through DALI, in a batch with a clip that is not damaged."""
    good, bad = (sample(folder, kind, file) for file in (whole(folder, kind), path))
    if kind not in IMAGES:
        bad = replace(bad, audio=good.audio)
    # Which backend serves is asked of other clips than the second.
    pipeline = AVPipeline(Clips([good, bad, good, good]), 2, backend="dali", workers=1, on_error="skip")
    batch, _ = pipeline
    pipeline.close()
    result = "refused" if pipeline.skipped else "read"
    # Of images that it can not decode, DALI does not say which; their folder is named.
    named = {str(path), str(folder)} if kind in IMAGES else {str(path)}
    if batch["id"] != [good.id, good.id if pipeline.skipped else bad.id] or set(pipeline.skipped) - named:
        return f"the batch has {batch['id']}, skipped was {pipeline.skipped}"
    return wrong(batch, (2,)) or result


def go_through(folder: Path, files: list[tuple[str, str]], log: Path, how: Callable[[Path, str, Path], str]) -> None:
    """In a process of its own: a line for each file before it is read, and one behind."""
    torch.set_num_threads(1)
    faulthandler.disable()  # pytest's, which would tell of pytest
    how(folder, files[0][0], whole(folder, files[0][0]))  # loads what is loaded once
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with log.open("w", buffering=1) as file:
        for kind, name in files:
            print(json.dumps([name]), file=file)
            before = os.listdir("/proc/self/fd")
            try:
                result = how(folder, kind, folder / name)
            except BaseException:
                result = traceback.format_exc()
            if how is read and os.listdir("/proc/self/fd") != before:
                result = f"{result}, but it leaves files open"
            print(json.dumps([name, result]), file=file)


def by_fork(folder: Path, files: list[tuple[str, str]], log: Path) -> int:
    """PyAV reads files: as in a worker of a loader."""
    process = multiprocessing.get_context("fork").Process(target=go_through, args=(folder, files, log, read))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    return process.exitcode


def by_dali(folder: Path, files: list[tuple[str, str]], log: Path) -> int:
    """DALI reads files, whose threads do not live on in a fork."""
    script = "import sys, json, pathlib; from tests.data.test_fuzz import decode, go_through; " + (
        "folder, files, log = sys.argv[1:]; go_through(pathlib.Path(folder), json.loads(files), pathlib.Path(log), decode)"
    )
    command = [sys.executable, "-c", script, str(folder), json.dumps(files), str(log)]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    assert run.returncode <= 0, run.stderr
    return run.returncode


def fuzz(
    folder: Path,
    kinds: Iterable[str],
    numbers: Iterable[int],
    batch: int,
    run: Callable[[Path, list[tuple[str, str]], Path], int] = by_fork,
) -> tuple[Counter[tuple[str, str]], dict[str, str]]:
    """How many files of each kind were "read" and "refused", and what went wrong with which."""
    counts, faults, log = Counter(), {}, folder / "log"
    todo = [(kind, number) for number in numbers for kind in kinds]
    for start in range(0, len(todo), batch):
        files = [(kind, write(folder, kind, number).name) for kind, number in todo[start : start + batch]]
        left = files
        while left:
            log.unlink(missing_ok=True)
            status = run(folder, left, log)
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            results = dict(line for line in lines if len(line) == 2)
            for kind, name in left[: len(results)]:
                if results[name] in ("read", "refused"):
                    counts[kind, results[name]] += 1
                else:
                    faults[name] = results[name]
            if len(results) < len(left):
                faults[left[len(results)][1]] = f"the process ended with {status}"
            left = left[len(results) + 1 :]
        for _, name in files:
            if name not in faults:  # for whoever wants to know why
                (folder / name).unlink()
    return counts, faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged(kind, folder):
    """What is damaged below was whole."""
    assert read(folder, kind, whole(folder, kind)) == "read"


def test_damaged_files(folder):
    counts, faults = fuzz(folder, KINDS, range(40), batch=64)
    assert not faults
    assert counts.total() == 40 * len(KINDS) >= 200
    # Damage is such that some are refused and others are not.
    assert {result for _, result in counts} == {"read", "refused"}
    assert all(counts[kind, "refused"] for kind in KINDS)


def test_damaged_files_for_dali(folder):
    counts, faults = fuzz(folder, DALI, range(10), 60, by_dali)
    assert not faults
    assert counts.total() == 10 * len(DALI)
    assert {result for _, result in counts} == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_damaged_files(seed, folder):
    counts, faults = fuzz(folder, KINDS, range(1000 * seed, 1000 * seed + 190), batch=100)
    assert not faults
    assert counts.total() == 190 * len(KINDS) >= 3000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_damaged_files_for_dali(seed, folder):
    counts, faults = fuzz(folder, DALI, range(1000 * seed, 1000 * seed + 100), 100, by_dali)
    assert not faults
    assert counts.total() == 100 * len(DALI)


def _hang():
    time.sleep(1000)


def _not_finite():
    return {"video": torch.full((T, 3, SIDE, SIDE), torch.inf)}


def _misshapen():
    return {"audio": torch.zeros(T, 10, BINS + 1)}


def _leak():
    os.dup(0)
    raise MediaError("mp3-3.mp3", "damaged")


FAULTS = {
    "crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), f"the process ended with {-signal.SIGSEGV}"),
    "hang": (_hang, f"the process ended with {-signal.SIGKILL}"),
    "error": (lambda: {}["no such key"], "KeyError: 'no such key'"),
    "memory": (lambda: bytearray(3 * MEMORY // 2), "MemoryError"),
    "not finite": (_not_finite, "video is not finite"),
    "misshapen": (_misshapen, "audio is torch.float32 of shape"),
    "other file": (lambda: read_audio(__file__ + "x"), "another file is blamed"),
    "leak": (_leak, "leaves files open"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault, folder, monkeypatch):
    """The file is named whose reading goes wrong, and those behind it are read nevertheless."""
    happen, text = FAULTS[fault]

    def read_or_fail(item, config):
        return happen() if item.id.startswith("mp3-3.") else {}

    monkeypatch.setattr(sys.modules[__name__], "read_sample", read_or_fail)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2 if fault == "hang" else SECONDS)
    counts, faults = fuzz(folder, ["mp3"], range(2, 6), batch=4)
    assert list(faults) == ["mp3-3.mp3"]
    assert text in faults["mp3-3.mp3"]
    assert counts == {("mp3", "read"): 3}

"""The benchmark of reading: its plain loader reads the same, and its rows are complete. No time is asserted."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from stgcma_fast.config import BACKBONES
from stgcma_fast.data import media_config, open_dataset, read_sample, synthesize

STAGES = {"video", "transform", "audio", "filterbank", "clip", "loader"}


@pytest.fixture
def data(scripts, monkeypatch):
    """The script as a module."""
    # Nothing stops anybody from committing while tests run.
    monkeypatch.setattr(importlib.import_module("harness"), "commit", lambda: "0123456")
    return importlib.import_module("data")


@pytest.fixture(scope="module")
def ave(tmp_path_factory):
    root = tmp_path_factory.mktemp("ave")
    synthesize("ave", root, 5)
    return root


@pytest.mark.parametrize("arch", ["swin_l", "clip_b16"])
def test_plain_reads_what_the_package_reads(data, ave, arch):
    """An independent reader, written as common ones are: frames by PIL, sound chunk by chunk."""
    config = media_config("ave", BACKBONES[arch])
    dataset = open_dataset("ave", ave, "train", config)
    sample = dataset.sample(0)
    own, plain = read_sample(sample, config), data.Plain(config)(sample)
    assert own.keys() == plain.keys()
    for key, bound in (("label", 0.0), ("audio", 0.02), ("video", 0.1)):  # resamplers and resizing differ
        assert own[key].shape == plain[key].shape
        assert (own[key] - plain[key]).abs().mean() <= bound, key


def test_plain_augments_a_clip_alike(data, ave):
    config = media_config("ave", BACKBONES["swin_l"])
    sample = open_dataset("ave", ave, "train", config, train=True).sample(0)
    images = [data.Plain(config).video(sample.video)[0]] * 3
    # Where nothing is erased, for noise is drawn for every frame.
    videos = [data.Plain(config).transform(images, sample) for _ in range(8)]
    assert sum(torch.equal(video[:, 0], video[:, 2]) for video in videos) >= 3
    assert not torch.equal(videos[0], videos[1])


def test_rows(data, ave, tmp_path):
    file = tmp_path / "rows.json"
    options = ["--clips", "3", "--loader-clips", "4", "--batch-size", "2", "--workers", "1", "--device", "cpu"]
    assert data.main(["--root", str(ave), "--json", str(file), *options]) == 0
    rows = json.loads(file.read_text())["data"]
    assert {row["phase"] for row in rows} == {"eval", "train"}
    for phase in ("eval", "train"):
        found = {(row["provider"], row["stage"]) for row in rows if row["phase"] == phase}
        # H.264 is none of the codecs that DALI decodes without a GPU.
        assert found == {(p, s) for p in ("plain", "pyav") for s in STAGES} | {("shards", "loader")}
    assert len({tuple(row[key] for key in data.KEYS) for row in rows}) == len(rows)
    assert all(row["clips_per_s"] > 0 for row in rows)
    assert all(row["peak_mb"] > 0 and row["clips"] >= 4 for row in rows if row["stage"] == "loader")


def test_dali_that_cannot_serve_is_refused_when_asked_for(data, ave, capsys):
    with pytest.raises(SystemExit) as stop:
        data.main(["--root", str(ave), "--provider", "dali", "--device", "cpu"])
    assert stop.value.code == 2
    assert "h264" in capsys.readouterr().err


def test_memory_counts_workers(data):
    """A worker that holds 100 MB is told from one that holds none."""
    loader = torch.utils.data.DataLoader([0] * 8, num_workers=1, collate_fn=_hold, persistent_workers=True)
    before = data.memory()
    batches = iter(loader)
    next(batches)
    assert data.memory() - before > 90
    del batches, loader


_held = []


def _hold(batch):
    _held.append(torch.ones(100 * 2**20, dtype=torch.uint8))
    return len(_held)

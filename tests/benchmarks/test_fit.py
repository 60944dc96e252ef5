"""The benchmark of whole trainings, on a model small enough for a test. Times are never asserted."""

from __future__ import annotations

import importlib
import json
import shutil
import time

import lightning as L
import pytest
import torch

import stgcma_fast as sf
from stgcma_fast.data import synthesize
from stgcma_fast.tasks import module as tasks_module

BACKBONE = sf.SwinConfig(image_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 2))


def tiny(arch, adapters="base", **switches):
    return sf.ModelConfig(BACKBONE, adapter_ratio=0.5, **switches)


@pytest.fixture(scope="module")
def ave(tmp_path_factory):
    root = tmp_path_factory.mktemp("ave")
    synthesize("ave", root, 5)
    return root


@pytest.fixture
def fit(scripts, monkeypatch, ave):
    """The script as a module, with one tiny model behind every name, clips that are there already and few rounds."""
    # Nothing stops anybody from committing while tests run.
    monkeypatch.setattr(importlib.import_module("harness"), "commit", lambda: "0123456")
    script = importlib.import_module("fit")
    monkeypatch.setattr(tasks_module, "preset", tiny)
    monkeypatch.setattr(script.throughput, "preset", tiny)
    monkeypatch.setattr(script.throughput, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(script.throughput, "CPU_ROUNDS", 2)
    monkeypatch.setattr(script, "synthesize", lambda task, root, clips: shutil.copytree(ave, root, dirs_exist_ok=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield script
    torch.set_num_threads(threads)


def test_rows_and_table(fit, tmp_path, capsys):
    file = tmp_path / "rows.json"
    options = ["--batch-size", "2", "--seconds", "0.3", "--device", "cpu", "--workers", "1", "--json", str(file)]
    assert fit.main(["--arch", "swin_l", *options]) == 0
    rows = json.loads(file.read_text())["fit"]
    assert [tuple(row[key] for key in fit.KEYS) for row in rows] == [
        ("swin_l", "base", "ave", 2, "float32", "cpu", impl) for impl in ("fast", "fit")
    ]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["clips_per_s"] > 0
        assert row["rounds"] >= 1
        assert row["peak_mb"] > 0
    row = rows[-1]
    assert 0 <= row["waiting"] < 1
    assert (row["gpu_busy"], row["backend"]) == (None, "pyav")
    # Steps and clips are of the same time, which is not shorter than it was to be.
    assert row["clips_per_s"] <= row["rounds"] * 2 / 0.3
    text = capsys.readouterr().out
    assert "swin_l base, ave, on cpu" in text
    assert "weights are random" in text


def test_waiting_is_for_batches_alone(fit, monkeypatch):
    now = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    waiting = fit.Waiting()
    for action in ("[_TrainingEpochLoop].train_dataloader_next", "run_training_batch") * 2:
        with waiting.profile(action):
            pass
    assert waiting.seconds == 3.5


def test_a_training_that_ends_before_the_clock_is_told(fit, ave, monkeypatch):
    monkeypatch.setattr(L.Trainer, "fit", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="the training ended before"):
        fit.fit("swin_l", "base", 3, "float32", "cpu", 1.0, 1, ave)


def test_a_split_names_its_clips_again(fit, tmp_path):
    fit.make_data(tmp_path, 3, 7)
    lines = (tmp_path / "trainSet.txt").read_text().splitlines()
    assert len(lines) == 9
    assert lines[:3] == lines[3:6]
    assert len(set(lines)) == 3


def test_a_disagreement_reports_nothing(fit, tmp_path, monkeypatch, capsys):
    def disagree(*arguments):
        raise fit.throughput.DisagreementError("logits: error 1, allowed 0")

    monkeypatch.setattr(fit, "fit", lambda *arguments: {})
    monkeypatch.setattr(fit, "steps_alone", disagree)
    file = tmp_path / "rows.json"
    assert fit.main(["--arch", "swin_l", "--device", "cpu", "--seconds", "0.01", "--json", str(file)]) == 1
    assert not file.exists()
    assert "no speed is reported" in capsys.readouterr().out

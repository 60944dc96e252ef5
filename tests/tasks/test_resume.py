"""A training that was killed goes on, and ends in the same numbers as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stgcma_fast.tasks.curves import read_logs
from tests.support import processes

# Checkpoints to go on from: behind the steps 2 and 6, and at the end of both epochs of 4 steps.
EVERY = {"save_every": 2, "model__lr": 1e-2}
KILL = "tests.support.processes.Kill"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, fit_args: Callable[..., list[str]]) -> Callable[..., Path]:
    """The folder of a run that nobody killed. Tests with the same settings have it in common."""
    folders: dict[str, Path] = {}

    def run(task: str, **settings: object) -> Path:
        key = repr((task, settings))
        if key not in folders:
            folder = folders[key] = tmp_path_factory.mktemp("unbroken")
            output = folder / "output"
            assert processes.run(["fit", *fit_args(task, folder, **settings)], output) == 0, output.read_text()
        return folders[key]

    return run


def plain(value: Any, folder: Path) -> Any:
    """Of what is in a checkpoint, what two runs in different folders share."""
    if isinstance(value, dict):
        # The score of the newest epoch, which nothing reads that goes on.
        return {plain(key, folder): plain(item, folder) for key, item in value.items() if key != "current_score"}
    if isinstance(value, list | tuple):
        return [plain(item, folder) for item in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Places where two checkpoints are not the same to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [f"{place}: other tensors"]
    return [] if type(a) is type(b) and a == b else [f"{place}: {a!r} and {b!r}"]


def assert_same(folder: Path, other: Path) -> None:
    """Two runs ended alike: in all their checkpoints, in the scores that they wrote."""
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert files == sorted(path.name for path in (other / "checkpoints").iterdir())
    assert {"best.ckpt", "last.ckpt"} <= set(files)
    for name in files:
        a, b = (plain(torch.load(run / "checkpoints" / name, weights_only=True), run) for run in (folder, other))
        found = differences(a, b)
        assert not found, f"{name}: {found}"
    scores = sorted(path.name for path in folder.glob("*.json"))
    assert scores == sorted(path.name for path in other.glob("*.json"))
    for name in scores:
        assert (folder / name).read_text().replace(str(folder), "") == (other / name).read_text().replace(str(other), "")


def kill(at: str, number: int = 1, **more: Any) -> str:
    return f"--trainer.callbacks={[{'class_path': KILL, 'init_args': {'at': at, 'number': number, **more}}]}"


CASES = {
    # The fast one has two deaths, one in the middle of an epoch, one in the evaluation at the end of the next.
    "steps after a checkpoint, then in an evaluation": ("ave", EVERY, [kill("batch", 3), kill("validation", 2 + 1)]),
    "before the first checkpoint": ("ave", EVERY, [kill("batch", 2)]),
    "right behind a checkpoint": ("ave", EVERY, [kill("next batch", 3)]),
    "in the first evaluation": ("ave", EVERY, [kill("validation", 2)]),
    "between best.ckpt and last.ckpt": ("ave", EVERY, [kill("save", 2)]),
    "in the middle of writing last.ckpt": ("ave", EVERY, [kill("write", 2), kill("write", 1)]),
    "in the middle of writing best.ckpt": ("ave", EVERY, [kill("write", 1, file="best.ckpt")]),
    "at the start of an epoch": ("ave", EVERY, [kill("next batch", 5)]),
    "between the steps of accumulated gradients": (
        "ave",
        {"save_every": 1, "trainer__accumulate_grad_batches": 2},
        [kill("batch", 1), kill("next batch", 2), kill("batch", 3), kill("next batch", 2)],
    ),
    "epochs are averaged": ("ave", {**EVERY, "average": [1, 2]}, [kill("write", 1, file="epoch-01.ckpt"), kill("batch", 5)]),
    "with a mask": ("avs", {"save_every": 1}, [kill("batch", 3), kill("batch", 2)]),
    "with dropout": ("avqa", EVERY, [kill("batch", 3), kill("batch", 6)]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if number else [], id=name) for number, name in enumerate(CASES)]
)
def test_a_killed_training_ends_like_an_unbroken_one(
    case: str, fit_args: Callable[..., list[str]], unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    task, settings, kills = CASES[case]
    arguments, output = ["fit", *fit_args(task, tmp_path, **settings)], tmp_path / "output"
    for kill in kills:
        assert processes.run([*arguments, kill], output) == -signal.SIGKILL, output.read_text()
    assert processes.run(arguments, output) == 0, output.read_text()
    assert_same(tmp_path, unbroken(task, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("by", ["SIGINT", "SIGTERM"])
def test_a_stopped_training_says_how_it_goes_on(
    by: str, fit_args: Callable[..., list[str]], unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    arguments, output = ["fit", *fit_args("ave", tmp_path, **EVERY)], tmp_path / "output"
    assert processes.run([*arguments, kill("batch", 3, by=by)], output) == 128 + signal.Signals[by]
    assert "the same command goes on from" in output.read_text()
    assert processes.run(arguments, output) == 0, output.read_text()
    assert_same(tmp_path, unbroken("ave", **EVERY))


def test_an_evaluation_in_the_middle_of_an_epoch_is_not_left_out(
    fit_args: Callable[..., list[str]], unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    """A checkpoint is due where an evaluation follows, which whoever goes on from it would not do."""
    settings = {"save_every": 2, "trainer__val_check_interval": 0.5, "trainer__max_epochs": 1}
    arguments, output = ["fit", *fit_args("ave", tmp_path, **settings)], tmp_path / "output"
    # With what is evaluated before training, and again when it goes on.
    assert processes.run([*arguments, kill("validation", 1)], output) == -signal.SIGKILL, output.read_text()
    assert processes.run(arguments, output) == 0, output.read_text()
    whole = unbroken("ave", **settings)
    assert_same(tmp_path, whole)
    assert sorted(read_logs(whole)["val/loss"]) == [1, 3]
    assert read_logs(tmp_path)["val/loss"] == read_logs(whole)["val/loss"]


@pytest.mark.slow
def test_a_run_may_be_moved(fit_args: Callable[..., list[str]], unbroken: Callable[..., Path], tmp_path: Path) -> None:
    """The best epoch so far is not forgotten."""
    old, new = tmp_path / "old", tmp_path / "new"
    assert processes.run(["fit", *fit_args("ave", old, **EVERY), kill("batch", 7)], tmp_path / "output") == -signal.SIGKILL
    old.rename(new)
    assert processes.run(["fit", *fit_args("ave", new, **EVERY)], tmp_path / "output") == 0, (tmp_path / "output").read_text()
    assert not old.exists()
    assert_same(new, unbroken("ave", **EVERY))


@pytest.fixture
def finished(unbroken: Callable[..., Path], tmp_path: Path) -> Path:
    """A run's folder that a test may change."""
    return shutil.copytree(unbroken("ave", **EVERY), tmp_path / "run")


def test_a_finished_training_is_left_as_it_is(finished: Path, fit_args: Callable[..., list[str]], tmp_path: Path) -> None:
    scores = json.loads((finished / "best_val.json").read_text())["scores"]
    written = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").iterdir()}
    output = tmp_path / "output"
    assert processes.run(["fit", *fit_args("ave", finished, **EVERY)], output) == 0
    assert "`max_epochs=2` reached" in output.read_text()
    assert written == {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").iterdir()}
    assert scores == json.loads((finished / "best_val.json").read_text())["scores"]


@pytest.mark.slow
def test_other_settings_are_refused_by_name(finished: Path, fit_args: Callable[..., list[str]], tmp_path: Path) -> None:
    others = {
        "model__lr": 2e-3,
        "model__warmup_epochs": 1,
        "data__batch_size": 1,
        "data__mixup": 0.25,
        "data__selection": "test",
        "trainer__precision": "bf16-mixed",
        "trainer__max_epochs": 3,
        "trainer__accumulate_grad_batches": 2,
        "trainer__gradient_clip_val": 1.0,
    }
    assert processes.run(["fit", *fit_args("ave", finished, **others)], tmp_path / "output") == 1
    (error,) = (line for line in (tmp_path / "output").read_text().splitlines() if "error:" in line)
    assert str(finished / "checkpoints/last.ckpt") in error
    for name in others:
        assert name.removeprefix("model__").replace("__", ".") in error


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(finished: Path, fit_args: Callable[..., list[str]], tmp_path: Path) -> None:
    last = finished / "checkpoints/last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    assert processes.run(["fit", *fit_args("ave", finished, **EVERY)], tmp_path / "output") == 1
    (error,) = (line for line in (tmp_path / "output").read_text().splitlines() if "error:" in line)
    assert f"{last} is truncated" in error
    assert "remove it to begin anew" in error

"""Training and evaluation on two processes: the same numbers as on one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import processes

HERE = "tests.support.processes"
DDP = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 1}
# Draws of stochastic depth and dropout are those of a rank.
DRAWLESS = {"model__switches": {"drop_path": 0.0}}
Args = Callable[..., list[str]]


def callbacks(*given: tuple[str, dict[str, Any]]) -> str:
    return f"--trainer.callbacks={[{'class_path': f'{HERE}.{name}', 'init_args': options} for name, options in given]}"


def fit(arguments: list[str], output: Path, ranks: int = 2) -> None:
    statuses = processes.run_ranks([["fit", *arguments]] * ranks, output)
    assert statuses == [0] * ranks, output.read_text()


def weights(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing


def test_two_processes_train_like_one(fit_args: Args, tmp_path: Path) -> None:
    """Of two batches of one clip the gradients' mean is that of one batch of two. The first process alone writes."""
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    quiet = [callbacks(("NoDropout", {}), ("KeepWeights", {"folder": str(tmp_path)}))]
    single = ["fit", *fit_args("ave", one, **DRAWLESS), callbacks(("NoDropout", {}))]
    assert processes.run(single, tmp_path / "output") == 0, (tmp_path / "output").read_text()
    pair = [["fit", *fit_args("ave", folder, **DRAWLESS, **DDP), *quiet] for folder in (two, other)]
    assert processes.run_ranks(pair, tmp_path / "output") == [0, 0], (tmp_path / "output").read_text()
    assert not other.exists()
    assert_equal(weights(tmp_path, 0), weights(tmp_path, 1))

    a, b = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (one, two))
    assert_equal(b["state_dict"], weights(tmp_path, 0))
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(
            b["state_dict"][key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    names = [sorted(path.name for path in folder.rglob("*") if "tfevents" not in path.name) for folder in (one, two)]
    assert names[0] == names[1]
    # Three clips on two processes: each is counted once.
    a, b = (json.loads((folder / "best_val.json").read_text())["scores"] for folder in (one, two))
    assert a["accuracy"] == b["accuracy"]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ave", "avs", "avqa"])
def test_scores_do_not_depend_on_the_number_of_processes(
    task: str, fit_args: Args, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of the same weights, on two or three clips: in batches of two at most here, of one there."""
    output, folders = tmp_path / "output", [tmp_path / "one", tmp_path / "two"]
    fit(fit_args(task, tmp_path, trainer__max_steps=1, trainer__limit_val_batches=0), output, 1)
    scores = []
    for ranks, folder in enumerate(folders, 1):
        arguments = fit_args(task, folder, **(DDP if ranks == 2 else {}))
        command = ["validate", *arguments, f"--checkpoint={tmp_path}"]
        assert processes.run_ranks([command] * ranks, output) == [0] * ranks, output.read_text()
        scores.append(json.loads((folder / f"{tmp_path.name}_last_val.json").read_text())["scores"])
    assert scores[0].pop("loss") == pytest.approx(scores[1].pop("loss"), rel=1e-6)
    assert scores[0] == scores[1]
    assert len(scores[0]) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "switches"),
    [
        ("ave", {"fusion": "a2v"}),
        ("ave", {"fusion": "none"}),
        ("ave", {"modalities": ["audio"]}),
        ("ave", {"use_temporal": False}),
        ("avs", {}),
        ("avs", {"fusion": "v2a"}),
        ("avqa", {}),
        ("avqa", {"fusion": "a2v"}),
    ],
    ids=str,
)
def test_every_parameter_that_is_trained_gets_a_gradient(
    task: str, switches: dict[str, Any], fit_args: Args, tmp_path: Path
) -> None:
    """Else DDP, which waits for all gradients, stops at the second step. Of AVS's batch norm each process has statistics of
    its own; the first one's are kept, and sent to the others before each step and evaluation."""
    options = {"trainer__max_steps": 3, "trainer__limit_val_batches": 0, "trainer__logger": False, "model__switches": switches}
    keep = callbacks(("KeepWeights", {"folder": str(tmp_path)}))
    fit([*fit_args(task, tmp_path, **DDP, **options), keep], tmp_path / "output")
    a, b = weights(tmp_path, 0), weights(tmp_path, 1)
    own = {key for key in a if key.endswith(("running_mean", "running_var"))}
    assert bool(own) == (task == "avs")
    assert_equal(*({key: value for key, value in state.items() if key not in own} for state in (a, b)))
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert_equal(last["state_dict"], a)
    assert all(item["step"] == 3 for item in last["optimizer_states"][0]["state"].values())


@pytest.mark.slow
def test_both_ways_to_start_two_processes(fit_args: Args, tmp_path: Path) -> None:
    """Lightning starts the second one, or torchrun both; they end alike, evaluated and averaged."""
    options = {**DDP, "average": [1, 2], "trainer__limit_train_batches": 2}
    launches = {"lightning": ["-m"], "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]}
    for name, launch in launches.items():
        command = [sys.executable, *launch, "stgcma_fast.cli", "fit", *fit_args("ave", tmp_path / name, **options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        # One process speaks.
        assert done.stdout.count("written to") == 2
        scores = json.loads((tmp_path / name / "average_val.json").read_text())["scores"]
        assert scores.keys() == {"accuracy", "loss"}
    for name in ("last.ckpt", "best.ckpt", "average.ckpt"):
        states = [torch.load(tmp_path / launch / "checkpoints" / name, weights_only=True)["state_dict"] for launch in launches]
        assert_equal(*states)


@pytest.mark.slow
def test_two_killed_processes_go_on(fit_args: Args, tmp_path: Path) -> None:
    output, folders = tmp_path / "output", [tmp_path / "unbroken", tmp_path / "killed"]
    arguments = [fit_args("ave", folder, save_every=2, **DDP) for folder in folders]
    kill = callbacks(("Kill", {"at": "batch", "number": 3}))
    assert processes.run_ranks([["fit", *arguments[1], kill]] * 2, output) == [-signal.SIGKILL] * 2, output.read_text()
    for given in arguments:
        fit(given, output)
    a, b = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders)
    assert_equal(a["state_dict"], b["state_dict"])
    assert (folders[0] / "best_val.json").read_text().replace("unbroken", "killed") == (
        folders[1] / "best_val.json"
    ).read_text()


@pytest.mark.slow
def test_more_processes_than_clips_are_told_on_all_of_them(fit_args: Args, tmp_path: Path) -> None:
    """No process waits for another that has ended."""
    four = [["fit", *fit_args("ave", tmp_path, **DDP | {"trainer__devices": 4})]] * 4
    output = tmp_path / "output"
    assert processes.run_ranks(four, output) == [1] * 4, output.read_text()
    assert output.read_text().count("split 'val' of 3 items, expected one or more for each of 4 processes") == 4

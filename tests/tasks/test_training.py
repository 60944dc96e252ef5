"""What trainings leave, what they refuse, and how they fail: through the console command, on tiny data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from stgcma_fast import FastSTGCMA, ModelConfig, SwinConfig, cli
from stgcma_fast.reference.model import is_trainable
from stgcma_fast.tasks import training
from stgcma_fast.tasks.callbacks import WholeCheckpoints
from stgcma_fast.tasks.curves import read_logs
from stgcma_fast.tasks.module import STGCMAModule
from stgcma_fast.tasks.trained import backbone_digest, load_trained
from tests.support.models import seeded_state
from tests.tasks.conftest import ARCH

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
FitArgs = Callable[..., list[str]]
# Of a training that is to fail or to be looked at: as little of it as there can be.
SHORT = {"trainer__max_epochs": 1, "trainer__limit_train_batches": 1, "trainer__limit_val_batches": 1}
# Steps of an epoch of AVE's 9 clips in batches of 2.
EPOCH = 4


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the smallest Swin as Microsoft publishes them: without anything of audio or of adapters."""
    model = FastSTGCMA(ModelConfig(SwinConfig(**ARCH), 0.5))
    state = {
        key: value
        for key, value in seeded_state(model.state_dict()).items()
        if not is_trainable(key) and "_audio" not in key and "t_relative" not in key
    }
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].squeeze(2)
    state |= {"head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}
    path = tmp_path_factory.mktemp("weights") / "swin.pth"
    torch.save({"model": state}, path)
    return path


def options(backbone: Path, **changes: Any) -> dict[str, Any]:
    """Of the run that many tests look at."""
    return {"model__pretrained": backbone, "average": [1, 2], "save_every": 3, "trainer__log_every_n_steps": 1} | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fit_args: FitArgs, backbone: Path) -> Path:
    """The folder of a finished training of AVE of two epochs, beside a backbone from a file. Tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["fit", *fit_args("ave", folder, **options(backbone))]) == 0
    return folder


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def weights(path: Path) -> dict[str, Tensor]:
    return {key.removeprefix("network."): value for key, value in checkpoint(path)["state_dict"].items()}


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says when it fails."""
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("stgcma-fast: error: ") == 1
    last = err.splitlines()[-1]
    assert last.startswith("stgcma-fast: error: "), err
    return last


def assert_says(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line


# ----------------------------------------------------------------------------------------------------- What a run leaves


def test_a_run_leaves_logs_curves_and_scores(run):
    scores = {path.stem: json.loads(path.read_text()) for path in run.glob("*.json")}
    assert scores.keys() == {"best_val", "average_val"}
    curves = read_logs(run)
    steps = list(range(2 * EPOCH))
    assert list(curves["train/loss"]) == steps
    rates = [curves[name] for name in curves if name.startswith("lr-")]
    assert len(rates) == 2
    assert all(list(rate) == steps for rate in rates)
    # Scores of epochs alone; those of the best and the averaged weights are in files of their own.
    for name in ("val/accuracy", "val/loss"):
        assert list(curves[name]) == [EPOCH - 1, 2 * EPOCH - 1]
    best = scores["best_val"]
    assert best["split"] == "val"
    assert best["checkpoint"] == str(run / "checkpoints" / "best.ckpt")
    assert best["scores"]["accuracy"] == max(curves["val/accuracy"].values())
    assert best["scores"]["loss"] in [pytest.approx(loss, rel=1e-6) for loss in curves["val/loss"].values()]
    (logs,) = (run / "logs").iterdir()
    board = EventAccumulator(str(logs)).Reload()
    assert {"train/loss", "val/accuracy", "val/loss"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == steps
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(list(curves["train/loss"].values()))
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_checkpoints_of_adapters_hold_what_is_trained_and_nothing_else(run, backbone):
    folder = run / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "average.ckpt",
        "epoch-01.ckpt",
        "epoch-02.ckpt",
    }
    model, description = load_trained(run)
    assert (description.weights, description.pretrained) == ("adapters", str(backbone))
    trained = {key for key in model.state_dict() if is_trainable(key)}
    for path in folder.iterdir():
        assert weights(path).keys() == trained, path
        assert ("optimizer_states" in checkpoint(path)) == (path.name == "last.ckpt")
    first, second, mean = (weights(folder / f"{name}.ckpt") for name in ("epoch-01", "epoch-02", "average"))
    moved = 0
    for key, value in mean.items():
        torch.testing.assert_close(value.double(), (first[key].double() + second[key].double()) / 2, rtol=1e-7, atol=1e-9)
        moved += not torch.equal(first[key], second[key])
    assert moved > len(mean) / 2
    for key, value in weights(folder / "average.ckpt").items():
        assert torch.equal(model.state_dict()[key], value)
    # Frozen weights are those of the file.
    published = torch.load(backbone, weights_only=True)["model"]
    for key in ("layers.0.blocks.0.attn.qkv.weight", "layers.1.blocks.0.mlp.fc1.weight", "norm.weight"):
        assert torch.equal(model.state_dict()[key], published[key])


def test_a_whole_model_is_tested_like_a_published_one(run, fit_args, backbone, tmp_path):
    """`--model.save full` holds all; as a .pth with ``module.`` before its keys it has the same scores."""
    full = fit_args("ave", tmp_path, **options(backbone, model__save="full", average=[1, 1], **SHORT))
    assert cli.main(["fit", *full]) == 0
    state = weights(tmp_path / "checkpoints" / "last.ckpt")
    model, _ = load_trained(run)
    assert state.keys() == model.state_dict().keys()
    published = tmp_path / "published.pth"
    torch.save({f"module.{key}": value for key, value in state.items()}, published)
    # A whole model brings its backbone: the run's own need not be there.
    other = fit_args("ave", tmp_path / "other", model__pretrained=tmp_path / "nowhere.pth")
    assert cli.main(["test", *other, f"--checkpoint={published}"]) == 0
    assert cli.main(["test", *full, f"--checkpoint={tmp_path / 'checkpoints' / 'last.ckpt'}"]) == 0
    theirs = json.loads((tmp_path / "other" / "published_test.json").read_text())
    ours = json.loads((tmp_path / "last_test.json").read_text())
    assert theirs["scores"] == ours["scores"]
    assert theirs["split"] == "test"


def test_test_and_validate_take_the_average(run, fit_args, backbone, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    args = fit_args("ave", folder, **options(backbone))
    before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    assert cli.main(["validate", *args]) == 0
    assert cli.main(["test", *args]) == 0
    # Again, for nothing that the first left is in the way.
    assert cli.main(["test", *args]) == 0
    scores = {path.stem: json.loads(path.read_text())["scores"] for path in folder.glob("average_*.json")}
    assert scores.keys() == {"average_val", "average_test"}
    assert scores["average_val"] == json.loads((run / "average_val.json").read_text())["scores"]
    assert scores["average_test"] != scores["average_val"]
    assert before == {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}


# --------------------------------------------------------------------------------------------- What goes wrong on the way


def test_without_memory_a_run_says_what_to_do_and_goes_on_later(run, fit_args, backbone, tmp_path, monkeypatch, capsys):
    """The same command then ends where an unbroken run does, although its checkpoints hold adapters alone."""
    args = fit_args("ave", tmp_path, **options(backbone))
    with monkeypatch.context() as patch:
        step = STGCMAModule.training_step

        def full(self: STGCMAModule, *args: Any) -> Tensor:
            if self.trainer.global_step == EPOCH + 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return step(self, *args)

        patch.setattr(STGCMAModule, "training_step", full)
        line = refusal(["fit", *args], capsys)
    for part in (
        "batches of 2",
        "2.00 GiB",
        "--data.batch_size",
        "accumulate_grad_batches",
        "--model.checkpointing",
        "goes on",
    ):
        assert part in line
    assert checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == EPOCH
    assert cli.main(["fit", *args]) == 0
    for name in ("last", "best", "average", "epoch-01", "epoch-02"):
        path = Path("checkpoints") / f"{name}.ckpt"
        here, there = weights(tmp_path / path), weights(run / path)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here), name
    assert (tmp_path / "curves.png").is_file()
    assert read_logs(tmp_path) == read_logs(run)


class Diverges:
    """Makes a loss, or the gradients of a finite loss, NaN in one step of a training."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loss, place = STGCMAModule.loss, self

        def bad_loss(module: STGCMAModule, *args: Any) -> Tensor:
            value = loss(module, *args)
            return value * float("nan") if module.training and module.trainer.global_step == place.step else value

        def bad_gradient(module: STGCMAModule, optimizer: torch.optim.Optimizer) -> None:
            if module.trainer.global_step == place.step:
                optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))

        if self.what == "loss":
            monkeypatch.setattr(STGCMAModule, "loss", bad_loss)
        else:
            monkeypatch.setattr(STGCMAModule, "on_before_optimizer_step", bad_gradient)


@pytest.mark.parametrize(
    ("what", "step", "named", "last", "best"),
    [
        ("loss", 2, 2, 2, False),
        # A step is the last before a checkpoint, in the middle and at the end of an epoch: its loss is fine, not its weights.
        ("gradient", 1, 1, None, False),
        pytest.param("gradient", EPOCH - 1, EPOCH - 1, 2, False, marks=pytest.mark.slow),
        pytest.param("gradient", 2 * EPOCH - 1, 2 * EPOCH - 1, EPOCH + 2, True, marks=pytest.mark.slow),
        # Otherwise the loss of the next step tells.
        pytest.param("gradient", 2, 3, 2, False, marks=pytest.mark.slow),
        pytest.param("loss", EPOCH, EPOCH, EPOCH, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_diverges_stops(what, step, named, last, best, fit_args, tmp_path, monkeypatch, capsys):
    Diverges(step, what).patch(monkeypatch)
    line = refusal(["fit", *fit_args("ave", tmp_path, save_every=2, average=[1, 2])], capsys)
    assert_says(line, f"step {named} ", "not finite", "Lower lr")
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").is_file() == (last is not None)
    if last is not None:
        assert checkpoint(folder / "last.ckpt")["global_step"] == last
    assert (folder / "best.ckpt").is_file() == best
    assert not list(folder.glob(".*")), "parts of a checkpoint"
    for path in folder.glob("*.ckpt"):
        assert all(value.isfinite().all() for value in weights(path).values()), path


def test_on_error_skip_trains_without_files_that_are_missing(ave_root, fit_args, tmp_path, capsys):
    root = shutil.copytree(ave_root, tmp_path / "data")
    missing = [root / "AVE" / f"{line.split('&')[1]}.mp4" for line in (root / "trainSet.txt").read_text().splitlines()[:2]]
    for path in missing:
        path.unlink()
    args = fit_args("ave", tmp_path / "run", data__root=root, trainer__max_epochs=1, data__mixup=0)
    line = refusal(["fit", *args], capsys)
    assert_says(line, "2 files of split 'train' are missing", *map(str, missing))
    assert_says(line, f"data check --task ave --root {root}", "--data.on_error skip")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert cli.main(["fit", *args, "--data.on_error=skip"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


# ------------------------------------------------------------------------------------------------------ What is refused


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data__root": "nowhere"}, ["nowhere", "no such folder"]),
        ({"data__batch_size": 100}, ["'train' of 9 items", "no whole batch of 100"]),
        ({"trainer__max_epochs": -1}, ["neither max_epochs nor max_steps"]),
        ({"average": [1, 3]}, ["average", "1 to 3", "max_epochs 2", "--average null"]),
        ({"average": [2, 1]}, ["average", "2 to 1"]),
        ({"average": [1, 2], "trainer__max_epochs": "null", "trainer__max_steps": 8}, ["average", "max_epochs None"]),
        ({"trainer__devices": 0}, ["devices", "cpu accelerator"]),
        ({"trainer__accelerator": "tpu"}, ["torch_xla"]),
        ({"trainer__overfit_batches": 2}, ["trainer.overfit_batches", "got 2", "--trainer.limit_train_batches"]),
        ({"model__arch": "swin_x", "model__adapters": "base", "model__pretrained": "random"}, ["arch", "'swin_x'", "'swin_l'"]),
        ({"model__arch": "swin_l", "model__adapters": "base"}, ["pretrained", "'swin_l'", "random"]),
        ({"model__adapters": "base"}, ["adapters", "'base'", "numbers"]),
        ({"model__pretrained": "nowhere.pth"}, ["nowhere.pth"]),
        ({"model__save": "adapters"}, ["save", "'adapters'", "random backbone"]),
        ({"model__lr": 1e-7}, ["lr: got 1e-07", "min_lr 2e-06"]),
        ({"model__lr": 1e-5, "model__head_lr": 0.1}, ["lr * head_lr: got 1e-06", "min_lr 2e-06"]),
        ({"model__switches": {"fusion": "sideways"}}, ["fusion", "'sideways'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_serve(changes, parts, fit_args, tmp_path, capsys):
    line = refusal(["fit", *fit_args("ave", tmp_path, **changes)], capsys)
    assert_says(line, *parts)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("model: {lrr: 1}", "lrr"),
        ("model: {task: avx}", "avx"),
        ("data: {batchsize: 1}", "batchsize"),
        ("trainer: {epochs: 1}", "epochs"),
        ("optimizer: adam", "optimizer"),
        ("model: {lr: fast}", "fast"),
        ("save_every: 0", "save_every"),
        ("model: [", "config"),
    ],
)
def test_a_configuration_that_is_none(lines, named, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(lines)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", f"--config={path}", "--data.root=x", "--model.pretrained=random"])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.partition("error:")[2]


def test_a_checkpoint_of_another_model_or_a_broken_one(run, fit_args, backbone, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    other = fit_args("ave", folder, **options(backbone, model__adapters=0.25))
    for command in ("fit", "test"):
        line = refusal([command, *other], capsys)
        assert_says(line, "of another model", "0.5", "0.25")
    clip = {"class_path": "stgcma_fast.ClipConfig", "init_args": {"image_size": 32, "embed_dim": 32, "layers": 1, "heads": 1}}
    line = refusal(["test", *fit_args("ave", folder, model__arch=clip)], capsys)
    assert_says(line.lower(), "of another model", "'clip'", "'swin'")
    line = refusal(["fit", *fit_args("ave", folder, **options(backbone, model__lr=2e-3))], capsys)
    assert_says(line, "other settings", "lr 0.001 (here 0.002)")
    assert before == {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    args = fit_args("ave", folder, **options(backbone))
    for command, name in (("fit", "last.ckpt"), ("test", "average.ckpt")):
        path = folder / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-1000])
        line = refusal([command, *args], capsys)
        assert_says(line, str(path), "truncated")
    line = refusal(["test", *fit_args("ave", tmp_path / "empty", **options(backbone))], capsys)
    assert_says(line, str(tmp_path / "empty"), "average.ckpt")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model__pretrained": "other.pth"}, ["trained beside the weights of", "others, of", "other.pth"]),
        ({"model__pretrained": "random"}, ["trained beside the weights of", "others, random ones"]),
    ],
    ids=["another", "none"],
)
def test_adapters_beside_another_backbone_are_refused(change, named, run, fit_args, backbone, tmp_path, monkeypatch, capsys):
    """In training, evaluation and prediction: nothing of their shapes would tell."""
    monkeypatch.chdir(tmp_path)
    state = torch.load(backbone, weights_only=True)["model"]
    state["norm.weight"] = state["norm.weight"] + 1
    torch.save({"model": state}, "other.pth")
    folder = shutil.copytree(run, tmp_path / "run")
    for command in ("fit", "validate", "test"):
        assert_says(refusal([command, *fit_args("ave", folder, **options(backbone, **change))], capsys), *named)
    if change["model__pretrained"] != "random":
        with pytest.raises(ValueError, match="trained beside the weights of"):
            load_trained(folder, pretrained="other.pth")
    # The same weights may lie elsewhere.
    moved = shutil.copy(backbone, tmp_path / "moved.pth")
    load_trained(folder, pretrained=moved)


def test_a_backbone_is_the_same_in_every_precision():
    """A run in bfloat16 or float64 is evaluated in float32 beside the same file."""
    model = FastSTGCMA(ModelConfig(SwinConfig(**ARCH), 0.5))
    digest = backbone_digest(model)
    assert digest == backbone_digest(model.double()) == backbone_digest(model.bfloat16())
    with torch.no_grad():
        model.norm.weight[0] += 0.5
    assert digest != backbone_digest(model)


def test_a_run_does_not_go_on_with_other_data_or_another_backbone(run, fit_args, backbone, ave_root, tmp_path, capsys):
    """The rates of its steps were laid out for as many clips; a whole model is not continued as adapters of a file."""
    folder = shutil.copytree(run, tmp_path / "run")
    line = refusal(["fit", *fit_args("ave", folder, **options(backbone, trainer__limit_train_batches=0.5))], capsys)
    assert_says(line, "trainer.limit_train_batches 1.0 (here 0.5)")
    root = shutil.copytree(ave_root, tmp_path / "data")
    lines = (root / "trainSet.txt").read_text().splitlines()
    (root / "trainSet.txt").write_text("\n".join(lines[:-1]) + "\n")
    line = refusal(["fit", *fit_args("ave", folder, **options(backbone, data__root=root))], capsys)
    assert_says(line, f"data.train_clips {len(lines)} (here {len(lines) - 1})")
    drawn = tmp_path / "drawn"
    assert cli.main(["fit", *fit_args("ave", drawn, save_every=1, **SHORT)]) == 0
    line = refusal(["fit", *fit_args("ave", drawn, model__pretrained=backbone, **SHORT)], capsys)
    assert_says(line, "save 'full' (here 'adapters')")


def test_a_new_training_does_not_take_up_what_an_old_one_left(run, fit_args, backbone, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    line = refusal(["fit", *fit_args("ave", folder, **options(backbone))], capsys)
    assert_says(line, str(checkpoints / "average.ckpt"), "begin anew", "--trainer.default_root_dir")
    (checkpoints / "average.ckpt").unlink()
    assert cli.main(["fit", *fit_args("ave", folder, **options(backbone, trainer__max_steps=EPOCH))]) == 0
    assert not (checkpoints / "average.ckpt").exists()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "epoch-01.ckpt", "last.ckpt"]


def test_a_trial_run_leaves_nothing(fit_args, tmp_path):
    """`--trainer.fast_dev_run` is before a training, with the same command."""
    assert cli.main(["fit", *fit_args("ave", tmp_path, save_every=1, trainer__fast_dev_run=True)]) == 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_scores_of_another_run_have_its_name(run, fit_args, backbone, tmp_path):
    args = fit_args("ave", tmp_path / "mine", **options(backbone))
    assert cli.main(["test", *args, f"--checkpoint={run}"]) == 0
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [f"{run.name}_average_test.json"]


def test_a_limit_of_one_batch_is_no_share(fit_args, tmp_path):
    """In a process of its own: it depends on what was imported before Lightning."""
    options = {"trainer__limit_train_batches": 1, "trainer__limit_val_batches": 0.5}
    command = [sys.executable, "-m", "stgcma_fast.cli", "fit", *fit_args("ave", tmp_path, **options), "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "  limit_train_batches: 1\n" in done.stdout
    assert "  limit_val_batches: 0.5\n" in done.stdout


@pytest.mark.parametrize("ending", [None, RuntimeError("unexpected pos 64 vs 0")], ids=["open", "hidden"])
def test_a_full_disk_names_the_checkpoint_and_keeps_the_old_one(ending, tmp_path, monkeypatch):
    """PyTorch says what it finds when it closes the file, and not why."""
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"a": 1}, path)
    before = path.read_bytes()

    def save(checkpoint: dict[str, Any], file: Any) -> None:
        file.write(b"half of it")
        try:
            raise OSError(28, "No space left on device")
        finally:
            if ending:
                raise ending

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=f"{path} can not be written.*No space left"):
        WholeCheckpoints().save_checkpoint({"a": 2}, path)
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, before)]


# -------------------------------------------------------------------------------------------- Every task and precision


@pytest.mark.parametrize(
    ("task", "precision"),
    [
        ("avs", "bf16-mixed"),
        ("avqa", "bf16-mixed"),
        pytest.param("avs", "32-true", marks=pytest.mark.slow),
        pytest.param("avqa", "32-true", marks=pytest.mark.slow),
    ],
)
def test_the_other_tasks_train(task, precision, fit_args, tmp_path):
    switches = {"head": "lavish512"} if task == "avqa" else {}
    short = SHORT | {"trainer__limit_train_batches": 2, "trainer__limit_test_batches": 1}
    more = {
        "data__batch_size": 1,
        "model__switches": switches,
        "trainer__precision": precision,
        "trainer__log_every_n_steps": 1,
    }
    args = fit_args(task, tmp_path, **short, **more)
    assert cli.main(["fit", *args]) == 0
    assert cli.main(["test", *args]) == 0
    score = {"avs": "miou", "avqa": "accuracy"}[task]
    for name in ("best_val", "best_test"):
        scores = json.loads((tmp_path / f"{name}.json").read_text())["scores"]
        assert 0 <= scores[score] <= 1
    losses = list(read_logs(tmp_path)["train/loss"].values())
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())
    model, description = load_trained(tmp_path)
    assert model.config.task == task
    assert description.weights == "full"
    assert next(iter(model.state_dict().values())).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ Configurations, help


def _settings(path: Path) -> dict[str, Any]:
    """What the paper's authors trained a model of this name with."""
    task, (arch, size, adapters, *head) = path.parent.name, path.stem.split("_")
    arch = f"{arch}_{size}"
    if arch.startswith("clip"):
        ratio = {"clip_b16": {"tiny": 1 / 32, "base": 1 / 8}, "clip_l14": {"tiny": 1 / 32, "base": 1 / 16}}[arch][adapters]
    elif adapters == "tiny":
        ratio = (1 / 8, 1 / 8, 1 / 16, 1 / 16)
    else:
        ratio = {"swin_b": (1 / 4, 1 / 4, 1 / 8, 1 / 8), "swin_l": (1 / 2, 1 / 4, 1 / 8, 1 / 16)}[arch]
    rates, warmup, batch = {
        "ave": ((5e-5, 2e-6), 2, 1),
        "avs": ((3e-4, 2e-5), 5, 2),
        "avqa": ((5e-5, 5e-6) if head else (2.5e-5, 2e-6), 2, 2),
    }[task]
    return {
        "task": task,
        "ratio": ratio,
        "width": {"swin_b": 128, "swin_l": 192, "clip_b16": 768, "clip_l14": 1024}[arch],
        "head": {("avqa", True): "lavish512", ("avqa", False): "dgsct1536"}.get((task, bool(head))),
        "rates": rates,
        "head_lr": 0.1,
        "warmup": warmup,
        "batch": batch,
        "epochs": 20,
        "decay": 5e-7,
        "average": (8, 20) if task == "ave" else None,
        "mixed": task != "avs",
        "seed": 0,
    }


def test_there_is_a_configuration_for_each_model():
    assert [str(path.relative_to(ROOT / "configs")) for path in CONFIGS] == [
        *(f"ave/{arch}_{size}.yaml" for arch in ("clip_b16", "clip_l14", "swin_b", "swin_l") for size in ("base", "tiny")),
        "avqa/swin_l_base.yaml",
        "avqa/swin_l_base_lavish512.yaml",
        "avs/swin_b_base.yaml",
        "avs/swin_l_base.yaml",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configurations_hold_the_published_settings(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("fit", "validate", "test"):
        given = training._CLI(command, [f"--config={path}", "--trainer.accelerator=cpu"])
        model, data, trainer, backbone = given.model, given.datamodule, given.trainer, given.model.config.backbone
        assert {
            "task": model.config.task,
            "ratio": model.config.adapter_ratio,
            "width": backbone.embed_dim,
            "head": model.config.head if model.config.task == "avqa" else None,
            "rates": (model.lr, model.min_lr),
            "head_lr": model.head_lr,
            "warmup": model.warmup_epochs,
            "batch": data.batch_size,
            "epochs": trainer.max_epochs,
            "decay": model.weight_decay,
            "average": given.config.average,
            "mixed": trainer.precision == "bf16-mixed",
            "seed": given.config.seed_everything,
        } == _settings(path)
        assert given.folder == Path("runs") / path.parent.name / path.stem
        assert trainer.precision in ("bf16-mixed", "32-true")
        assert trainer.accumulate_grad_batches == 1
        assert model.weights == "adapters"
        assert data.selection == "val"
        assert model.loss_options.get("iou_weight", 0) == 0
    assert not list(tmp_path.iterdir())


def test_the_configuration_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("fit", "validate", "test"):
        given = training._CLI(command, [f"--config={ROOT / 'configs' / 'demo.yaml'}", "--trainer.accelerator=cpu"])
        assert (given.folder, given.datamodule.root) == (Path("demo/run"), Path("demo/clips"))


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_help_shows_examples_and_describes_every_argument(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert f"\n    stgcma-fast {command} --config configs/ave/swin_l_base.yaml --data.root AVE" in page
    parser = training._CLI(command, ["--data.root=x", "--model.pretrained=random", "--trainer.accelerator=cpu"]).parser
    own = {action.dest: action.help for action in parser._actions if action.dest.partition(".")[0] in ("model", "data")}
    own |= {action.dest: action.help for action in parser._actions if action.dest in ("save_every", "average", "checkpoint")}
    assert {"model.task", "model.arch", "model.lr", "model.save", "data.root", "data.selection", "average"} <= own.keys()
    assert ("checkpoint" in own) == (command != "fit")
    assert [name for name, text in own.items() if not text or not text.strip()] == []


def test_the_list_of_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "data", "params", "report"):
        assert f"\n    {command} " in page


def test_without_lightning_commands_say_what_to_install(tmp_path):
    code = """
        import importlib.abc, sys
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"lightning", "torchmetrics", "tensorboard", "matplotlib"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        from stgcma_fast import cli
        try:
            cli.main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        for command in ("fit", "validate", "test"):
            assert cli.main([command, "--data.root", "x"]) == 1
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    line = 'stgcma-fast: error: lightning is not installed; pip install "stgcma-fast[data,train]"\n'
    assert done.stderr == 3 * line
    assert "fit" in done.stdout

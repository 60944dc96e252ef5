"""What happens around the steps of a training: checkpoints that are whole, and the progress bar."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar

from ..checkpoint import read_state_dict
from .trained import BEST, LAST, PREFIX, read_checkpoint


class WholeCheckpoints(CheckpointIO):
    """A checkpoint is there whole or not at all, and only tensors and plain values are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, for across file systems a rename is a copy.
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            # On a full disk PyTorch ends with a position that it did not expect, and the disk's own error is behind that.
            cause = error.__context__ or error
            raise OSError(f"{path} can not be written, what was there before it stays: {cause}") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            return read_checkpoint(path)
        except ValueError:
            # A published checkpoint of a whole model can be tested, too.
            try:
                state = read_state_dict(path)
            except ValueError as error:
                if Path(path).name != LAST:
                    raise
                raise ValueError(f"{error}. There is nothing to go on from: remove it to begin anew") from error
            return {
                "state_dict": {PREFIX + key.removeprefix("module."): value for key, value in state.items()},
                "pytorch-lightning_version": L.__version__,
            }

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class RunCheckpoints(Checkpoint):
    """Keeps all that going on needs, of the newest epoch or step, and the weights of the epochs that are to be averaged.

    Args:
        folder: for them.
        every: optimizer steps from one checkpoint to go on from to the next. The end of an epoch has one, too.
        average: the first and the last epoch that are averaged, counted from 1; None: no epoch is.
    """

    def __init__(self, folder: Path, every: int, average: tuple[int, int] | None) -> None:
        self.folder, self.every = folder, every
        self.epochs = range(average[0], average[1] + 1) if average is not None else range(0)
        self._step = 0
        self._due = False

    @property
    def epoch_files(self) -> list[Path]:
        """Of the epochs that are averaged."""
        return [self.folder / f"epoch-{epoch:02d}.ckpt" for epoch in self.epochs]

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._step = trainer.global_step
        if self._step == 0 and trainer.is_global_zero and not trainer.fast_dev_run:
            # Of an earlier training that nobody goes on with: they would be averaged if this one ends early.
            for path in self.epoch_files:
                path.unlink(missing_ok=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Several batches make a step where gradients are accumulated: what the first of them gave is in no checkpoint.
        step, self._step = self._step, trainer.global_step
        if trainer.global_step == step or trainer.fast_dev_run:
            return
        self._due |= trainer.global_step % self.every == 0
        # An evaluation that follows would be left out by who goes on: it is waited for.
        if self._due and not trainer.is_last_batch and not self._evaluation_follows(trainer):
            self._save_last(trainer)

    def _evaluation_follows(self, trainer: L.Trainer) -> bool:
        loop = trainer.fit_loop.epoch_loop
        batch = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
        return trainer.val_check_batch is not None and (batch + 1) % trainer.val_check_batch == 0

    def _save_last(self, trainer: L.Trainer) -> None:
        self._due = False
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs:
            trainer.save_checkpoint(self.epoch_files[self.epochs.index(epoch)], weights_only=True)
        self._save_last(trainer)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the epoch with the highest score.

    Args:
        folder: for them.
        score: its name.
    """

    def __init__(self, folder: Path, score: str) -> None:
        super().__init__(
            folder,
            Path(BEST).stem,
            score,
            mode="max",
            save_weights_only=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Where a run was moved to another folder Lightning would forget what the best was.
        path = str(Path(self.dirpath) / BEST)
        moved = {key: path for key in ("best_model_path", "kth_best_model_path") if state_dict[key]}
        models = dict.fromkeys([path] * len(state_dict["best_k_models"]), state_dict["best_model_score"])
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})


def average_checkpoints(paths: Sequence[Path], out: Path) -> None:
    """The mean of the weights of several checkpoints, as one; what are no fractions stays as it is in all of them."""
    checkpoints = [read_checkpoint(path) for path in paths]
    states = [checkpoint["state_dict"] for checkpoint in checkpoints]
    mean = {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype) for key, value in states[-1].items()
    }
    WholeCheckpoints().save_checkpoint({**checkpoints[-1], "state_dict": mean}, out)


class Progress(RichProgressBar):
    """Lightning's bar with clips/s, loss and memory, which are looked at twice a second: a look waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}
        self._scores: dict[str, str] = {}
        self._time: float | None = None
        self._batches = 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_start(trainer, *args)
        # Neither evaluation nor waiting for the first batch is training.
        if self._time is None:
            self._time = time.monotonic()
        self._batches += 1

    def on_validation_start(self, *args: Any) -> None:
        super().on_validation_start(*args)
        self._time, self._batches = None, 0

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # They stay in sight until the next evaluation.
        values = trainer.callback_metrics.items()
        self._scores = {name: f"{float(value):.4f}" for name, value in values if name.startswith("val/")}
        super().on_validation_end(trainer, module)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        if self._batches and time.monotonic() - self._time >= 0.5:
            loss = trainer.callback_metrics.get("train/loss")
            self._shown = {"loss": f"{float(loss):.4f}" if loss is not None else "-"}
            # Behind that wait: until then the device may have done but a part of the steps that it was given.
            now = time.monotonic()
            clips = self._batches * trainer.datamodule.batch_size * trainer.world_size
            self._shown["clips/s"] = f"{clips / (now - self._time):.2f}"
            self._shown["memory"] = f"{peak_memory(module.device) / 2**30:.2f} GiB"
            self._time, self._batches = now, 0
        return self._shown | self._scores


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held so far: of the GPU by tensors, of the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

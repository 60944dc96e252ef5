"""The commands that train and evaluate: `stgcma-fast fit`, `validate` and `test`."""

from __future__ import annotations

import json
import logging
import signal
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import DefaultHelpFormatter
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

from .callbacks import BestCheckpoint, Progress, RunCheckpoints, WholeCheckpoints, average_checkpoints
from .curves import LOGS, Curves
from .datamodule import AVDataModule
from .metrics import SELECTED, table
from .module import STGCMAModule
from .trained import AVERAGE, LAST, NAMES, find_checkpoint, holds_backbone

COMMANDS = {
    "fit": "Train STG-CMA: its adapters, gates, temporal tables and the task's head, beside a frozen backbone.",
    "validate": "Evaluate a trained model on the split it was selected by.",
    "test": "Evaluate a trained model on the test split.",
}
_EXAMPLES = {
    "fit": """
    stgcma-fast fit --config configs/ave/swin_l_base.yaml --data.root AVE --model.pretrained swin_large_22k.pth
    stgcma-fast fit --config configs/avs/swin_b_base.yaml --data.root AVSBench --trainer.devices 4 --data.batch_size 2

The same command goes on where it was killed. The run's folder, --trainer.default_root_dir, gets checkpoints (last.ckpt, to go
on from; best.ckpt, the best epoch; average.ckpt, the mean of the epochs --average), logs for TensorBoard and as csv, and
curves.png.""",
    "validate": """
    stgcma-fast validate --config configs/ave/swin_l_base.yaml --data.root AVE""",
    "test": """
    stgcma-fast test --config configs/ave/swin_l_base.yaml --data.root AVE
    stgcma-fast test --config configs/ave/swin_l_base.yaml --data.root AVE --checkpoint published.pth

It takes the run's average.ckpt, or else its best.ckpt; or what --checkpoint names, a file of training or a published one.""",
}


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the examples as they are written."""


class _CLI(LightningCLI):
    """Lightning's command line for one command. A configuration file serves all three."""

    def __init__(self, command: str, args: Sequence[str]) -> None:
        self.command = command
        super().__init__(
            STGCMAModule,
            AVDataModule,
            # Beside a run's logs. Without a logger it is in the run's own folder, for each start anew.
            save_config_callback=SaveConfigCallback if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            # Under inference_mode the evaluation after a training would be compiled once more.
            trainer_defaults={
                "max_epochs": 20,
                "precision": "bf16-mixed",
                "devices": 1,
                "inference_mode": False,
                # It would be three lines about one network, and count no operations of its kernels.
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"stgcma-fast {command}",
                # Not a line for each of a hundred options.
                "usage": f"stgcma-fast {command} [--config FILE] [options]",
                "description": f"{COMMANDS[command]}\n\nExamples:{_EXAMPLES[command]}",
                "formatter_class": _Help,
            },
            args=list(args),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for part in ("model", "data"):
            parser.link_arguments("seed_everything", f"{part}.seed", compute_fn=int)
        parser.add_argument(
            "--save_every", type=PositiveInt, default=500, help="optimizer steps from one checkpoint to go on from to the next"
        )
        parser.add_argument(
            "--average",
            type=tuple[PositiveInt, PositiveInt] | None,
            help="first and last epoch whose weights are averaged in the end; published for AVE: 8 and 20",
        )
        if self.command != "fit":
            parser.add_argument(
                "--checkpoint", type=str | None, help="a file, or a run's folder; by default the folder that `fit` wrote"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.config = parser.parse_args(args)
        model, trainer = self.config.model, self.config.trainer
        if trainer.default_root_dir is None:
            arch = model.arch if isinstance(model.arch, str) else "own"
            adapters = f"_{model.adapters}" if isinstance(model.adapters, str) else ""
            trainer.default_root_dir = f"runs/{model.task}/{arch}{adapters}"
        self.folder = Path(trainer.default_root_dir)
        if trainer.overfit_batches:
            raise ValueError(
                f"trainer.overfit_batches: got {trainer.overfit_batches}, expected 0, for pipelines keep their own order; "
                "--trainer.limit_train_batches and --trainer.limit_val_batches take parts of an epoch"
            )
        average, epochs = self.config.average, trainer.max_epochs
        if self.command == "fit" and average is not None and not average[0] <= average[1] <= (epochs or 0):
            raise ValueError(
                f"average: got epochs {average[0]} to {average[1]} with trainer.max_epochs {epochs}, expected a first and a "
                "last of these, or --average null"
            )

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        given = self.config.trainer
        fit = self.command == "fit"
        callbacks: list[L.Callback] = [Progress()] if given.enable_progress_bar is not False else []
        if fit:
            task, folder = self.config.model.task, self.folder / "checkpoints"
            self.checkpoints = RunCheckpoints(folder, self.config.save_every, self.config.average)
            self.best = BestCheckpoint(folder, f"val/{SELECTED[task]}")
            callbacks += [self.best, self.checkpoints, Curves(self.folder)]
        if given.logger in (None, True):
            # Each start of a run has logs of its own.
            board = TensorBoardLogger(self.folder, LOGS) if fit else None
            options["logger"] = [CSVLogger(self.folder, LOGS, version=board.version), board] if fit else False
            callbacks += [LearningRateMonitor("step")] if fit else []
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(plugins=[*(given.plugins or []), WholeCheckpoints()], **options)


def main(command: str, args: Sequence[str]) -> int:
    """Run "fit", "validate" or "test". Returns the exit status.

    Raises:
        ValueError, OSError, MediaError: settings, files or data that cannot serve; a loss that is not finite; a device without
            enough memory.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    # Lightning asks PyTorch in an old way for each batch, and cannot know that scores are already those of all processes.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
    warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\('(val|test)/.*sync_dist=True")
    try:
        cli = _CLI(command, args)
    except (MisconfigurationException, ModuleNotFoundError) as error:  # as of an accelerator or a logger that is not there
        raise ValueError(str(error)) from error
    try:
        if command == "fit":
            _fit(cli)
        else:
            found = find_checkpoint(cli.config.checkpoint or cli.folder)
            if holds_backbone(found):
                cli.model.pretrained = None  # its file need not be there
            _report(cli, command, _evaluate(cli, command, found), found)
    except SystemExit as error:  # Lightning's way out after ^C and SIGTERM
        if not cli.trainer.interrupted:
            raise
        if command == "fit":
            last = cli.checkpoints.folder / LAST
            rank_zero_info(f"stopped; the same command goes on from {last if last.is_file() else 'the start'}")
        return 128 + (signal.SIGTERM if isinstance(error, SIGTERMException) else signal.SIGINT)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{cli.trainer.strategy.root_device} has not enough memory for batches of {cli.datamodule.batch_size} ({error}). "
            "Take a smaller --data.batch_size, with --trainer.accumulate_grad_batches for the same steps; "
            "--model.checkpointing true, which computes each block twice and keeps little; or --trainer.precision bf16-mixed. "
            f"What {cli.folder} holds stays, and the same command goes on from there"
        ) from error
    if torch.distributed.is_initialized():
        # Gloo's threads free tensors, and one that does while the interpreter ends aborts the process after all its work.
        torch.distributed.destroy_process_group()
    return 0


def _is_no_tip(record: logging.LogRecord) -> bool:
    """Not one of Lightning's advertisements."""
    return "Tip: For seamless" not in record.getMessage()


def _fit(cli: _CLI) -> None:
    last = cli.checkpoints.folder / LAST
    goes_on = last.is_file() and not cli.trainer.fast_dev_run
    if (old := last.with_name(AVERAGE)).is_file() and not last.is_file():
        raise ValueError(
            f"{old} is of a training that ended, and {last}, to go on from, is not there. To begin anew, remove both, or give "
            "another folder (--trainer.default_root_dir)"
        )
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=last if goes_on else None, weights_only=True)
    # What comes now is of no new epoch and would be drawn as one.
    cli.trainer.loggers = []
    if cli.best.best_model_path:
        found = Path(cli.best.best_model_path)
        _report(cli, "validate", _evaluate(cli, "validate", found), found)
    files = cli.checkpoints.epoch_files
    if missing := [file.name for file in files if not file.is_file()]:
        rank_zero_info(f"no average: training ended without {', '.join(missing)}")
    elif files:
        out = cli.checkpoints.folder / AVERAGE
        if cli.trainer.is_global_zero:
            average_checkpoints(files, out)
        cli.trainer.strategy.barrier()
        _report(cli, "validate", _evaluate(cli, "validate", out), out)


def _evaluate(cli: _CLI, command: str, path: Path) -> dict[str, float]:
    run = getattr(cli.trainer, command)
    (values,) = run(cli.model, cli.datamodule, ckpt_path=path, verbose=False, weights_only=True)
    return values


def _report(cli: _CLI, command: str, values: dict[str, float], path: Path) -> None:
    """Print a table, and keep the numbers in the run's folder."""
    if not cli.trainer.is_global_zero:
        return
    split = "test" if command == "test" else cli.datamodule.selection
    scores = {name.partition("/")[2]: value for name, value in values.items()}
    console = Console()
    console.print(f"{path}, split {split!r}:")
    console.print(table(cli.model.config.task, scores))
    cli.folder.mkdir(parents=True, exist_ok=True)
    name = path.stem
    if path.name in NAMES and not path.resolve().is_relative_to(cli.folder.resolve()):
        # Another run's scores do not take the place of this one's.
        folder = path.resolve().parent
        name = f"{(folder.parent if folder.name == 'checkpoints' else folder).name}_{name}"
    out = cli.folder / f"{name}_{split}.json"
    out.write_text(json.dumps({"checkpoint": str(path), "split": split, "scores": scores}, indent=2) + "\n")
    console.print(f"written to {out}")

"""The command ``stgcma-fast`` in processes of its own, and callbacks that look into them or end them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only


def start(arguments: Sequence[str], output: Path, **environment: str) -> BaseProcess:
    """Begin ``stgcma-fast arguments`` in a process that appends what it says to the file ``output``.

    It is forked from a process that has the imports already, and nothing of this one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stgcma_fast.cli", "stgcma_fast.tasks.training"])
    process = context.Process(target=_command, args=(arguments, output, environment))
    process.start()
    return process


def run(arguments: Sequence[str], output: Path, **environment: str) -> int:
    """The exit status of the command; negative, the signal that ended it."""
    process = start(arguments, output, **environment)
    process.join()
    return process.exitcode


def run_ranks(ranks: Sequence[Sequence[str]], output: Path, seconds: float = 900) -> list[int]:
    """The exit statuses of a command on several ranks of this machine, each with its arguments.

    Raises:
        TimeoutError: they wait for one another; they are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    processes = [start(arguments, output, LOCAL_RANK=str(rank), **common) for rank, arguments in enumerate(ranks)]
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    waiting = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in waiting:
        processes[rank].kill()
    if waiting:
        raise TimeoutError(f"after {seconds} s ranks {waiting} are still there: {output.read_text()}")
    return [process.exitcode for process in processes]


def _command(arguments: Sequence[str], output: Path, environment: dict[str, str]) -> None:
    from stgcma_fast.cli import main

    os.environ.update(environment)
    # What Lightning read of the environment when it was imported.
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    status = main(arguments)
    # Gloo's threads abort a process now and then that ends before them.
    assert status or not torch.distributed.is_initialized()
    sys.exit(status)


class Kill(L.Callback):
    """Ends its process at the ``number``-th time, counted from 1 and from the start of the process, that it comes to a place.

    Args:
        at: "batch", behind a step and before its checkpoint; "next batch", behind the checkpoint; "validation", before a batch
            of it; "save", before a checkpoint is written; "write", when half of it is.
        file: name of the checkpoint of the last two.
        number: of times.
        by: the signal.
    """

    def __init__(
        self,
        at: Literal["batch", "next batch", "validation", "save", "write"],
        number: int = 1,
        file: str = "last.ckpt",
        by: Literal["SIGKILL", "SIGINT", "SIGTERM"] = "SIGKILL",
    ) -> None:
        self.at, self.number, self.file, self.by = at, number, file, signal.Signals[by]

    def _come_to(self, place: str) -> bool:
        self.number -= place == self.at
        return place == self.at and self.number == 0

    def _die_at(self, place: str) -> None:
        if self._come_to(place):
            os.kill(os.getpid(), self.by)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.at not in ("save", "write"):
            return
        save = torch.save

        def dying_save(checkpoint: dict[str, Any], file: Any) -> None:
            ours = self.file in file.name
            if ours:
                self._die_at("save")
            save(checkpoint, file)
            if ours and self._come_to("write"):
                file.flush()
                os.truncate(file.name, os.stat(file.name).st_size // 2)
                os.kill(os.getpid(), self.by)

        torch.save = dying_save

    def on_train_batch_start(self, *_: Any) -> None:
        self._die_at("next batch")

    def on_train_batch_end(self, *_: Any) -> None:
        self._die_at("batch")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._die_at("validation")


class KeepWeights(L.Callback):
    """Writes the module's weights and buffers of each rank after training, as ``rank0.pt`` and so on."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.save(module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


class NoDropout(L.Callback):
    """Switches dropout off, whose draws are those of a rank."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0

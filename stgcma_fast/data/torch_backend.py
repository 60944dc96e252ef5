"""Batches from worker processes that decode with PyAV. Any machine; on a GPU they arrive by pinned memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from .errors import MediaError
from .pipeline import SKIPPED, Dataset, Items
from .read import FILES, read_sample
from .sample import Sample

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def in_order(
    work: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int | None, pin_memory: bool = False
) -> Iterator[_Result]:
    """``work(job)`` of each job, in their order, by processes that run ahead.

    Args:
        work: its tensors come by shared memory.
        workers: processes; 0: this one does the work; None: as many as there are cores for it.
        pin_memory: of the tensors.

    Raises:
        MediaError: as ``work`` raises it; of other errors the kind and the text, with the worker's traceback.
        RuntimeError: a worker was killed.
    """
    workers = min(_cores() if workers is None else workers, len(jobs))
    loader = DataLoader(
        _Work(work),
        batch_size=None,
        sampler=jobs,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        # Without one it draws from PyTorch's, and a run that is resumed gets another dropout than one that is not.
        generator=torch.Generator(),
        # Forked workers start in milliseconds, from scripts without a main guard too, so that none needs to live on between
        # epochs. They run no CUDA and no threads of PyTorch's.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    stream = iter(loader)
    try:
        for result in stream:
            if isinstance(result, MediaError):
                raise result
            yield result
    except (ConnectionError, EOFError) as error:
        # A batch's memory is asked of the worker that sent it, who may be dead before the system tells its parent so.
        if workers and wait([worker.sentinel for worker in stream._workers], timeout=1):
            raise RuntimeError(f"a worker exited unexpectedly; what it had read is lost ({error!r})") from error
        raise
    finally:
        # Not left to garbage collection: an error's traceback keeps alive what is here, workers and the error itself.
        if workers:
            stream._shutdown_workers()
        stream = result = None


class _Work:
    """A data set in DataLoader's sense, whose indices are jobs."""

    def __init__(self, work: Callable[[_Job], _Result]) -> None:
        self.work = work

    def __getitem__(self, job: _Job) -> _Result | MediaError:
        # Workers have one thread. So has the only process, because sums are rounded otherwise with more.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self.work(job)
        except MediaError as error:
            # Handed over, because DataLoader makes a text of an error that needs two arguments.
            return error
        finally:
            torch.set_num_threads(threads)


def _as_it_is(result: _Result) -> _Result:
    return result


class TorchBackend:
    """The backend "pyav", see `pipeline.Backend`. A worker reads a whole batch, collated into the memory that it shares."""

    def __init__(self, items: Items, *, batch_size: int, device: torch.device, workers: int | None = None) -> None:
        self._items, self._device, self._workers = items, device, workers

    def run(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[dict[str, Any]]:
        read = partial(_read_batch, self._items, epoch)
        stream = in_order(read, batches, self._workers, pin_memory=self._device.type == "cuda")
        try:
            for batch in stream:
                yield {key: self._send(value) for key, value in batch.items()}
        finally:
            stream.close()

    def _send(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value

    def close(self) -> None:
        """Nothing outlives a run."""


def _read_batch(items: Items, epoch: int, indices: Sequence[int]) -> dict[str, Any]:
    skipped: dict[str, str] = {}
    batch = [items.read(index, epoch, partial(_read_item, items.dataset), skipped) for index in indices]
    return {**default_collate(batch), SKIPPED: skipped}


def _read_item(dataset: Dataset, sample: Sample) -> dict[str, Any]:
    tensors = read_sample(sample, dataset.config, getattr(dataset, "media", FILES))
    return {**tensors, **sample.meta, "id": sample.id}


def _cores() -> int:
    """Cores for this process, when those it may run on are shared by the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

"""The way from a data set to a model's batches: their order, the place to resume at, and which backend makes them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch

from .config import MediaConfig
from .errors import MediaError
from .sample import Sample

BackendName = Literal["auto", "pyav", "dali"]
OnError = Literal["raise", "skip"]
# Under this key a backend's batch says what it left out, as {file: cause}; it goes no further than the pipeline.
SKIPPED = "skipped"

_T = TypeVar("_T")
_log = logging.getLogger("stgcma_fast.data")
_logged: set[str] = set()


class Dataset(Protocol):
    """A split of a data set. It is picklable."""

    config: MediaConfig
    root: Path
    split: str

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """What is to be read and done for an item; every draw comes from (seed, epoch, index)."""
        ...


class Items:
    """What a backend reads: a data set's items, and other ones in the place of the broken.

    Args:
        dataset: of the items.
        on_error: "raise" or "skip".
        seed: of the draw that replaces a broken item.
    """

    def __init__(self, dataset: Dataset, on_error: OnError = "raise", seed: int = 0) -> None:
        self.dataset, self.on_error, self.seed = dataset, on_error, seed

    def read(self, index: int, epoch: int, read: Callable[[Sample], _T], skipped: dict[str, str]) -> _T:
        """``read`` of the item's sample; under "skip", where that raises a MediaError, of another item's.

        The replacement is drawn from (seed, epoch, index, attempt) alone, so it is the same on every backend and worker.

        Args:
            skipped: gets a cause for each broken file.

        Raises:
            MediaError: the item is broken and on_error is "raise", or no item can be read.
        """
        try:
            return read(self.dataset.sample(index, epoch))
        except MediaError as error:
            if self.on_error == "raise":
                raise
            skipped[error.path] = error.cause
        # The attempts walk through a permutation, so they come to an end when everything is broken.
        for other in np.random.default_rng((self.seed, epoch, index)).permutation(len(self.dataset)).tolist():
            try:
                return read(self.dataset.sample(other, epoch))
            except MediaError as error:
                skipped[error.path] = error.cause
        path, cause = next(iter(skipped.items()))
        raise MediaError(self.dataset.root, f"no clip of split {self.dataset.split!r} can be read; {path}: {cause}")


class Backend(Protocol):
    """Makes batches. It is built as ``Backend(items, batch_size=, device=, workers=)``.

    ``items`` is an `Items`, ``batch_size`` the largest number of items of a batch, ``device`` a torch.device, ``workers`` the
    number of its processes or threads, None for its own choice.
    """

    def run(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[dict[str, Any]]:
        """A generator of one batch, on the device, for each list of indices, in their order.

        Batches are made ahead of being asked for. A batch belongs to the caller: later ones and ``close()`` leave it as it is.
        Every item goes through `Items.read`, whose ``skipped`` the batch carries under `SKIPPED`. There is one run at a time;
        closing the generator stops what was begun. MediaErrors come out as they are, other failures of a worker as
        RuntimeErrors that name it.
        """
        ...

    def close(self) -> None:
        """Give back what outlives a run. The backend may be run again."""
        ...


class AVPipeline:
    """Batches of a data set, epoch after epoch, the same ones for any number of workers and on any backend.

    Iterating yields the batches of one epoch and moves ``epoch`` on when the last of them is handed out; an iteration that is
    left early changes nothing but the place that `state_dict` tells, and the next one begins its epoch anew. There is one at a
    time; an older one that is asked for more raises RuntimeError. The order depends on (seed, epoch) alone. With ``shuffle``,
    as for training, every rank has the same number of batches, for which some items may come twice (or, with ``drop_last``, not
    at all); without, every item comes exactly once over all ranks.

    Lightning saves and restores `state_dict` by itself, in the middle of an epoch too, when a pipeline is the training loader.

    Args:
        dataset: an `AVEDataset`, `AVSDataset`, `AVQADataset` or `ShardDataset`.
        batch_size: items of a rank's batch.
        backend: "pyav", worker processes; "dali", decoding on the GPU; "auto", "dali" on a CUDA device that it can serve, else
            "pyav", and why is logged once.
        device: where batches are made or sent to.
        shuffle: draw an order for each epoch.
        drop_last: leave out an incomplete last batch.
        seed: of the order, and of the clips that replace broken ones. Draws inside an item have the data set's own.
        rank, world_size: this process and the number of those that share the data set; None: as `torch.distributed` has it
            when the pipeline is made, or one process alone.
        workers: processes (pyav; 0 reads in this process) or threads (dali); None: as many as this process has cores.
        on_error: "raise" a broken file's MediaError; "skip" it: log it, note it in ``skipped`` and take another clip instead.

    Attributes:
        epoch: the one that the next iteration goes through.
        skipped: cause of every broken file that was met so far.
        backend: name of the backend in use.

    Batches are dictionaries: "audio" float32 [B, T, frames, bins]; "video" float32 [B, 3, T, S, S] (ave) or [B, T, 3, S, S];
    "label" float32 [B, T, classes] (ave) or int64 [B] (avqa); "mask" float32 [B, 1 or T, 1, S, S] (avs); "negative" float32
    [B, T, 3, S, S] and "question" int64 [B, 14] (avqa); "id" and each word that goes with a sample, list[str].

    Raises:
        ValueError: arguments out of range, a data set without items or without a whole batch, or a backend that cannot serve,
            with every reason.
        MediaError: while iterating, a file is broken.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        backend: BackendName = "auto",
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        workers: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if shared else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if shared else 1
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} of world_size {world_size}, expected 0 to {world_size - 1}")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: got {workers}, expected 0 or more")
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error: got {on_error!r}, allowed are {', '.join(map(repr, get_args(OnError)))}")
        if not len(dataset):
            raise ValueError(f"{dataset.root}: split {dataset.split!r} has no items")
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        if not len(self) and shuffle:
            raise ValueError(
                f"{dataset.root}: split {dataset.split!r} of {len(dataset)} items has no whole batch of {batch_size} "
                f"for each of {world_size} processes"
            )
        self.device = torch.device(device)
        self.epoch = 0
        self.skipped: dict[str, str] = {}
        # Batches of the epoch that were handed out, and how many of them the next iteration leaves out.
        self._done = self._start = 0
        self._stream: Iterator[dict[str, Any]] | None = None
        self.backend = choose(backend, dataset, self.device)
        self._backend = _build(self.backend)(
            Items(dataset, on_error, seed), batch_size=batch_size, device=self.device, workers=workers
        )

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices of this rank's batches in an epoch."""
        count = len(self.dataset)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(count)
            # Cut, or begun again from its start, so that it divides by the number of ranks.
            order = np.resize(
                order, (count // self.world_size + (count % self.world_size > 0 and not self.drop_last)) * self.world_size
            )
        else:
            order = np.arange(count)
        own = order[self.rank :: self.world_size].tolist()
        batches = [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]
        if self.drop_last and batches and len(batches[-1]) < self.batch_size:
            batches.pop()
        return batches

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self.batches(0))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: nothing happens before the first batch is asked for, and Lightning makes iterators that it drops again.
        epoch, done, self._start = self.epoch, self._start, 0
        batches = self.batches(epoch)
        # A backend makes one stream at a time, and there is one place in the epoch: an older iteration is over.
        if self._stream is not None:
            self._stream.close()
        stream = self._stream = self._backend.run(batches[done:], epoch)
        try:
            for batch in stream:
                self._note(batch.pop(SKIPPED, {}))
                done += 1
                # The state is that after this batch before it is handed out, and workers are gone with the last one:
                # whoever counts to len() does not ask for another.
                self.epoch, self._done = (epoch, done) if done < len(batches) else (epoch + 1, 0)
                if done == len(batches):
                    stream.close()
                yield batch
            if not batches:  # more ranks than items
                self.epoch = epoch + 1
            if done < len(batches):
                raise RuntimeError("this iteration is over, because another one of the same pipeline was begun meanwhile")
        finally:
            stream.close()

    def _note(self, skipped: dict[str, str]) -> None:
        for path, cause in skipped.items():
            if path not in self.skipped:
                self.skipped[path] = cause
                _log.warning("%s: %s; other clips take the place of those that need it", path, cause)

    batch_sampler = None  # Lightning asks for it where there is a sampler.

    @property
    def sampler(self) -> AVPipeline:
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration go through this epoch, from its start unless it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._done, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch: what was handed out counts, what was made ahead does not. The same on every rank."""
        return {"epoch": self.epoch, "batch": self._done, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place: the next iteration yields the rest of its epoch, the same tensors to the bit.

        Raises:
            ValueError: it lies in the middle of an epoch whose order depends on other settings than this pipeline's.
        """
        differing = [
            f"{key} {state['order'].get(key)!r} (here {value!r})"
            for key, value in self._order().items()
            if state["order"].get(key) != value
        ]
        if state["batch"] and differing:
            raise ValueError(f"cannot go on in the middle of an epoch that was begun with {', '.join(differing)}")
        self.epoch = state["epoch"]
        self._done = self._start = state["batch"]

    def _order(self) -> dict[str, Any]:
        """Everything but the epoch that batches and their order depend on."""
        names = ("batch_size", "shuffle", "drop_last", "seed", "world_size")
        drawn = getattr(self.dataset, "dataset", self.dataset)  # by shards' own
        draws = {f"dataset.{name}": getattr(drawn, name, None) for name in ("train", "seed", "mixup", "mix_labels")}
        return {"items": len(self.dataset), **draws, **{name: getattr(self, name) for name in names}}

    def close(self) -> None:
        """Give back what the backend holds between epochs. The pipeline may be iterated again."""
        self._backend.close()


def choose(backend: BackendName, dataset: Dataset, device: torch.device) -> str:
    """The backend that serves: as asked, or for "auto" the fastest that can.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve; the text gives every reason.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(map(repr, get_args(BackendName)))}")
    chosen = backend
    if backend == "auto":
        chosen = "pyav"
        if device.type == "cuda":
            reasons = _refusals("dali", dataset, device)
            if not reasons:
                return "dali"
            _log_once(f"media are decoded by PyAV, not by DALI: {'; '.join(reasons)}")
    reasons = _refusals(chosen, dataset, device)
    if reasons:
        raise ValueError(f"backend={backend!r} was asked for, but {'; '.join(reasons)}")
    return chosen


def _refusals(backend: str, dataset: Dataset, device: torch.device) -> list[str]:
    """Every reason why a backend cannot serve."""
    if backend == "dali":
        from .dali import dali_refusals

        return dali_refusals(dataset, device)
    missing = [name for name in ("av", "torchvision") if importlib.util.find_spec(name) is None]
    return [f"{name} is not installed (pip install stgcma-fast[data])" for name in missing]


def _build(backend: str) -> Callable[..., Backend]:
    if backend == "dali":
        from .dali import DaliBackend

        return DaliBackend
    from .torch_backend import TorchBackend

    return TorchBackend


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        _log.warning(text)

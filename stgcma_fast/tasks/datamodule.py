"""The data of a training: a task's splits as pipelines of batches on the training's device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L

from ..data import AVPipeline, MediaConfig, ShardDataset, open_dataset
from ..data.pipeline import BackendName, Dataset, OnError
from ..data.shards import INDEX

# Of a list of files, in an error.
_SHOWN = 10


class AVDataModule(L.LightningDataModule):
    """Splits of AVE, AVSBench or MUSIC-AVQA, or of shards that `stgcma-fast data pack` made of them.

    Args:
        root: folder of the data set in its published layout, or of shards. `stgcma-fast data check` says what it lacks.
        batch_size: clips of a step, on each device.
        workers: processes or threads that decode, on each device; None: as many as there are cores.
        backend: what decodes: "dali", on the GPU; "pyav"; "auto", the fastest that can.
        selection: the split by which the best epoch is chosen. "test" is how the published results were selected: it makes
            test scores too good, and is for comparing with them.
        augment: of AVE: train on frames that are changed at random and on mixed sound, not on the clips as they are.
        mixup: of AVE: probability of mixing another clip's sound in.
        mix_labels: of AVE: mix the labels as the sound is; published training does not.
        subset: of AVS: "s4" or "ms3" where the root has both.
        on_error: "raise" where a file is broken, or "skip" it: log it, and take another clip.
        seed: of the order of clips and of all draws.

    Raises:
        FileNotFoundError, ValueError: no such folder, files that annotations name and that are not there, annotations that
            make no sense.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 1,
        workers: int | None = None,
        backend: BackendName = "auto",
        selection: Literal["val", "test"] = "val",
        augment: bool = True,
        mixup: float = 0.5,
        mix_labels: bool = False,
        subset: Literal["s4", "ms3"] | None = None,
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.selection, self.seed = Path(root), batch_size, selection, seed
        self._pipeline_options = {"backend": backend, "workers": workers, "on_error": on_error, "seed": seed}
        self.options: dict[str, dict[str, Any]] = {
            "ave": {"augment": augment, "mixup": mixup, "mix_labels": mix_labels},
            "avs": {"subset": subset},
            "avqa": {},
        }
        self._datasets: dict[str, Dataset] = {}
        self._train: AVPipeline | None = None
        self._place: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        media = self.trainer.lightning_module.media
        splits = {"fit": ("train", self.selection), "validate": (self.selection,), "test": ("test",)}[stage]
        for split in splits:
            # The split that is selected on may be of the same name, but never has training's draws.
            dataset = self._datasets[split] = self._open(split, media, split == "train")
            # A process without a clip ends at once, and the others would wait for it.
            if len(dataset) < (ranks := self.trainer.world_size):
                raise ValueError(
                    f"{self.root}: got split {split!r} of {len(dataset)} items, expected one or more for each of {ranks} "
                    "processes"
                )

    def _open(self, split: str, media: MediaConfig, train: bool) -> Dataset:
        options = {"seed": self.seed, **self.options[media.task]}
        options["train"] = options.pop("augment", True) and train
        if media.task == "avqa":
            # Evaluation does not look at them, nor does a loss without matches.
            options["negatives"] = train and self.trainer.lightning_module.loss_options["match_weight"] > 0
        if (self.root / split / INDEX).is_file():
            return ShardDataset(self.root, split, media, **options)
        dataset = open_dataset(media.task, self.root, split, media, **options)
        if self._pipeline_options["on_error"] == "raise":
            self._check_files(dataset, split)
        return dataset

    def _check_files(self, dataset: Any, split: str) -> None:
        """A file that is missing is told now and not hours later."""
        missing: dict[str, None] = {}
        for index in range(len(dataset)):
            for _, paths in dataset.files(index):
                missing |= {str(path): None for path in (paths if isinstance(paths, tuple) else (paths,)) if not path.exists()}
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise FileNotFoundError(
                f"{self.root}: {len(missing)} files of split {split!r} are missing: {', '.join(list(missing)[:_SHOWN])}{more}. "
                f"`stgcma-fast data check --task {dataset.task} --root {self.root}` tells all that is wrong; "
                "--data.on_error skip trains without them"
            )

    @property
    def train_clips(self) -> int:
        """How many there are, which the learning rates of a training depend on."""
        return len(self._datasets["train"])

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the numbers of classes or answers, and of a question's words, stand for; empty where a task has none."""
        dataset = next(iter(self._datasets.values()))
        dataset = getattr(dataset, "dataset", dataset)  # of shards
        return getattr(dataset, "classes", ()), getattr(dataset, "vocabulary", ())

    def train_dataloader(self) -> AVPipeline:
        self._train = self._pipeline("train", shuffle=True, drop_last=True)
        if self._place:
            self._train.load_state_dict(self._place)
        return self._train

    def val_dataloader(self) -> AVPipeline:
        return self._pipeline(self.selection)

    def test_dataloader(self) -> AVPipeline:
        return self._pipeline("test")

    # Lightning's own way to keep a loader's place forgets it where the optimizer has asked how many steps there will be.
    def state_dict(self) -> dict[str, Any]:
        """The place in the training split."""
        return self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training begins."""
        self._place = state_dict

    def _pipeline(self, split: str, **options: Any) -> AVPipeline:
        strategy = self.trainer.strategy
        return AVPipeline(
            self._datasets[split],
            self.batch_size,
            device=strategy.root_device,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            **self._pipeline_options,
            **options,
        )

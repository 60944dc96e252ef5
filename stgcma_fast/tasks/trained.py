"""Trained models on disk: a checkpoint says which model it is of, what its numbers mean, and where the frozen weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import named
from ..model import FastSTGCMA
from ..ops.dispatch import Impl
from ..pretrained import load_pretrained
from ..reference.model import is_trainable

# Of a checkpoint, beside what Lightning keeps there.
DESCRIPTION = "stgcma"
# Of a run's folder: the average of its epochs, the best of them, the newest. The first that is there speaks for the run.
NAMES = AVERAGE, BEST, LAST = ("average.ckpt", "best.ckpt", "last.ckpt")
# Of the model in Lightning's module, and so in its checkpoints.
PREFIX = "network."

Weights = Literal["adapters", "full"]


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about itself.

    Args:
        config: of the model, as `ModelConfig.to_dict` gives it.
        weights: "adapters", what is trained and nothing else; "full", the whole model.
        pretrained: the file that the frozen weights came from; None where there was none.
        classes: names of AVE's events or AVQA's answers, in the order of the model's numbers.
        words: of AVQA's questions, likewise; the first stands for no word.
        backbone: what `backbone_digest` said of the frozen weights, if they came from a file.
    """

    config: dict[str, Any]
    weights: Weights
    pretrained: str | None
    classes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    backbone: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"classes": list(self.classes), "words": list(self.words)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        return cls(**values | {"classes": tuple(values["classes"]), "words": tuple(values["words"])})


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint of a run's folder that predictions are made with, or the file itself.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"{path}: expected a checkpoint, or a folder that `stgcma-fast fit` wrote, with one of {NAMES} in it"
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What training wrote. Code in a file is never run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or training did not write it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise half a dozen different types, OSError among them
        raise ValueError(f"{path} is truncated or is no checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {DESCRIPTION, "state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path}: expected a checkpoint that `stgcma-fast fit` wrote, got {_kind(checkpoint)}")
    return checkpoint


def holds_backbone(path: Path) -> bool:
    """Whether a checkpoint is of a whole model, as published ones are, which `read_checkpoint` refuses."""
    try:
        return read_checkpoint(path)[DESCRIPTION]["weights"] == "full"
    except ValueError:
        return True


def _kind(checkpoint: Any) -> str:
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return "tensors alone; `stgcma_fast.load_checkpoint` reads published checkpoints"
    return f"a {type(checkpoint).__name__}"


def saved_state(model: FastSTGCMA, weights: Weights) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint holds."""
    return {key: value for key, value in model.state_dict().items() if weights == "full" or is_trainable(key)}


def backbone_digest(model: FastSTGCMA) -> str:
    """What tells frozen weights from others. The same in every precision down to bfloat16."""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not is_trainable(key):
            digest.update(key.encode())
            digest.update(value.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy())
    return digest.hexdigest()


def check_backbone(digest: str | None, source: str | Path | None, description: Description, path: str | Path) -> None:
    """Refuse adapters beside another backbone than the one they were trained on.

    Args:
        digest: of the frozen weights that are here; None: they are random.
        source: their file.
        description, path: of the checkpoint.

    Raises:
        ValueError: the weights are others.
    """
    if description.weights == "adapters" and digest != description.backbone:
        raise ValueError(
            f"{path} holds adapters alone, trained beside the weights of {description.pretrained}; here are others, "
            f"{'random ones' if source is None else f'of {source}'}"
        )


def check_state(model: FastSTGCMA, state: Mapping[str, Tensor], description: Description, path: str | Path) -> None:
    """Refuse a checkpoint of another model before anything is changed.

    Raises:
        ValueError: another configuration, or missing, unexpected or misshapen keys; all are named.
    """
    here, there = model.config.to_dict(), description.config
    differing = [f"{key} {there.get(key)!r} (here {value!r})" for key, value in here.items() if there.get(key) != value]
    if differing:
        raise ValueError(f"{path} is of another model: {'; '.join(differing)}")
    own = saved_state(model, description.weights)
    problems = [
        named(title, names)
        for title, names in (
            ("missing", sorted(own.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - own.keys())),
            ("misshapen", sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{path} does not fit this model; {'; '.join(problems)}")


def load_trained(
    path: str | Path, *, pretrained: str | Path | None = None, impl: Impl = "auto"
) -> tuple[FastSTGCMA, Description]:
    """The model of a run, in evaluation mode on the CPU, and what its numbers mean.

    Args:
        path: a run's folder, or a checkpoint of it.
        pretrained: the frozen backbone's file, for a checkpoint of adapters; None: where it was in training.
        impl: see `FastSTGCMA`.

    Raises:
        FileNotFoundError: no checkpoint, or no file of the backbone's weights.
        ValueError: a damaged checkpoint, one that does not fit its own description, or a backbone of another model.
    """
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    description = Description.from_dict(checkpoint[DESCRIPTION])
    model = FastSTGCMA(description.config, impl=impl)
    if description.weights == "adapters":
        source = pretrained or description.pretrained
        try:
            load_pretrained(model, source or "")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} holds adapters alone, and the backbone they were trained on is not at {source}; "
                "give its file as pretrained"
            ) from error
        check_backbone(backbone_digest(model), source, description, path)
    state = {key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items()}
    check_state(model, state, description, path)
    model.load_state_dict(state, strict=False)
    return model.eval(), description

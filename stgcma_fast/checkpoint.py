"""Checkpoints in and out: published keys, whole models, adapters alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .reference.model import is_trainable

# Files written from torch's DataParallel, as the published ones are.
_PREFIX = "module."


def read_state_dict(path: str | Path, nested: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a torch file, on the CPU. Code in a file is never run.

    Args:
        path: the file.
        nested: keys under which a torch file may hold its dictionary of tensors, beside other things.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or is no dictionary of tensors; it is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers fail on damaged files with half a dozen different types, OSError among them
        raise ValueError(f"{path} is truncated or is no checkpoint: {error}") from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in nested if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    return dict(state)


def named(title: str, names: Sequence[str]) -> str:
    """``title: a, b``, at most ten names."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{title}: {', '.join(names[:10])}{more}"


def checked_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` without a ``module.`` prefix, after checks that `torch.nn.Module.load_state_dict` does not make.

    Raises:
        ValueError: values that are no tensors, tensors that are not finite, a key given twice, or buffers of another geometry
            than the model's.
    """
    strange = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(named("expected tensors alone, got other values", strange))
    state = {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    if len(state) != len(state_dict):
        raise ValueError(f"got keys both with and without {_PREFIX!r}")
    sick = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if sick:
        raise ValueError(named("not finite", sick))
    buffers = dict(model.named_buffers())
    other = [
        key
        for key, buffer in buffers.items()
        if key in state
        and not is_trainable(key)
        and (state[key].shape != buffer.shape or not (buffer.is_meta or torch.equal(state[key].to(buffer), buffer)))
    ]
    if other:
        raise ValueError(named("buffers of another window, shift or number of frames than the model's", other))
    return state


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a whole published or own checkpoint, strictly.

    Args:
        model: a `FastSTGCMA`.
        path: a ``.pth`` or ``.safetensors`` file, keys with or without ``module.``.

    Raises:
        FileNotFoundError, ValueError: the file is missing, truncated, or holds weights that are not finite.
        RuntimeError: missing, unexpected or misshapen keys, all named.
    """
    model.load_state_dict(read_state_dict(path))


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write what the paper trains, and nothing else, to a ``.safetensors`` file that also names the configuration."""
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items() if is_trainable(key)}
    save_file(state, path, metadata={"config": json.dumps(model.config.to_dict())})


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Load what `save_adapters` wrote; the frozen backbone stays as it is.

    Raises:
        FileNotFoundError, ValueError: the file is missing, truncated, or holds weights that are not finite.
        RuntimeError: missing, unexpected or misshapen keys, all named; the model is unchanged.
    """
    state = read_state_dict(path)
    own: dict[str, Any] = {key: value for key, value in model.state_dict().items() if is_trainable(key)}
    misshapen = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = [
        named(title, names)
        for title, names in (
            ("missing", sorted(own.keys() - state.keys())),
            ("unexpected", sorted(state.keys() - own.keys())),
            ("misshapen", [f"{k} {list(state[k].shape)}, expected {list(own[k].shape)}" for k in misshapen]),
        )
        if names
    ]
    if problems:
        raise RuntimeError(f"{path} does not fit this model's adapters; {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)

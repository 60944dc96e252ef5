"""The one way to launch a kernel: the tensor's device, the pinned configuration, the stride rule."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
CONFIGS = Path(__file__).parent / "configs"

# Block sizes, num_warps and num_stages by name.
Config = Mapping[str, int]


class Launch(NamedTuple):
    """What `record` keeps of a launch: enough to compile it for any card, or to time it with another configuration."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config
    candidates: Sequence[Config]
    grid: tuple[int, ...]
    key: str


class _State:
    """What `record` and `override` change for the time being."""

    launches: list[Launch] | None = None
    capability: tuple[int, int] | None = None
    overrides: Mapping[str, Config] = {}


def run(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    *args: Any,
    candidates: Sequence[Config],
    **constants: Any,
) -> None:
    """Launch ``kernel`` on the device of its first tensor.

    The configuration is the one measured for this GPU and these constants (configs/<gpu>.json), else the first candidate:
    nothing is ever tried out in a user's run.

    Args:
        kernel: a function under `triton.jit`.
        grid: from the configuration to the number of programs.
        args: tensors and numbers, in the kernel's order.
        candidates: configurations for `make tune` to measure; the first is the default.
        constants: compile-time arguments that the operator decides, and so what selects a configuration.
    """
    first = next(x for x in args if isinstance(x, Tensor))
    key = config_key(kernel, first, constants)
    config = _State.overrides.get(key) or pinned(first.device).get(key) or candidates[0]
    if _State.launches is not None:
        blocks = grid({**constants, **config})
        _State.launches.append(Launch(kernel, args, constants, config, candidates, blocks, key))
        if _State.capability is not None:
            return
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid({**constants, **config})](*args, **constants, **config)


def config_key(kernel: Any, first: Tensor, constants: Mapping[str, Any]) -> str:
    """What a configuration is pinned to: the kernel, the dtype of its first tensor, the compile-time arguments."""
    named = " ".join(f"{name}={value}" for name, value in sorted(constants.items()))
    return f"{kernel.__name__} {str(first.dtype).removeprefix('torch.')} {named}"


def gpu_slug(name: str) -> str:
    """The name of a GPU as it stands in a file name: "NVIDIA H200" to "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def pinned(device: torch.device) -> Mapping[str, Config]:
    """The measured configurations of a device by key; empty where nobody measured any."""
    return _table(gpu_slug(torch.cuda.get_device_name(device))) if device.type == "cuda" else {}


@cache
def _table(slug: str) -> Mapping[str, Config]:
    path = CONFIGS / f"{slug}.json"
    return {row["key"]: row["config"] for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's device; Hopper's in the interpreter, which has no limits of its own."""
    if _State.capability is not None:
        return _State.capability
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


def precision(dtype: torch.dtype) -> str:
    """How `primitives.dot` multiplies: as PyTorch would. The interpreter's own bfloat16 product is wrong."""
    if dtype == torch.float32:
        matmul = torch.backends.cuda.matmul
        # The older switch raises once the newer one has been used; the newer one tells of both.
        allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
        return "tf32" if allowed and not INTERPRETED else "ieee"
    return "upcast" if INTERPRETED and dtype == torch.bfloat16 else "ieee"


def triton_dtype(dtype: torch.dtype) -> Any:
    """A PyTorch dtype as a kernel's constant."""
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def unit_stride(x: Tensor) -> Tensor:
    """The stride rule: channels side by side pass as they are, whatever the other strides; anything else is copied once.

    So are rows further apart than 2**18 elements, since kernels count in 32 bits within a block of rows or a frame.
    """
    far = x.ndim > 1 and x.stride(-2) >= 2**18
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and not far else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[rows, D]`` with channels side by side: a view wherever the rows are evenly spaced."""
    return unit_stride(x).reshape(-1, x.shape[-1])


def split_rank(rank: int) -> dict[str, int]:
    """The rank as the kernels' constants: tiles of RA + RB channels, RB 0 where one tile holds it all with less padding."""
    whole = max(16, triton.next_power_of_2(rank))
    rest = max(16, triton.next_power_of_2(rank - whole // 2))
    return {"R": rank, "RA": whole, "RB": 0} if whole // 2 + rest >= whole else {"R": rank, "RA": whole // 2, "RB": rest}


@contextmanager
def record(compute_capability: tuple[int, int] | None) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, as if for a GPU of this compute capability; with None, collect and run them."""
    _State.launches, _State.capability = [], compute_capability
    try:
        yield _State.launches
    finally:
        _State.launches = _State.capability = None


@contextmanager
def override(configs: Mapping[str, Config]) -> Iterator[None]:
    """Launch the kernels of these keys with these configurations, to measure them."""
    _State.overrides = configs
    try:
        yield
    finally:
        _State.overrides = {}

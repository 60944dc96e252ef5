"""Which implementation serves an operator, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]

try:
    HAS_TRITON = importlib.util.find_spec("triton") is not None
except ImportError:
    HAS_TRITON = False


def _triton_version() -> tuple[int, ...]:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
        except importlib.metadata.PackageNotFoundError:
            pass
    return (0, 0)


TRITON_VERSION = _triton_version()
# Triton reads this variable when it is imported; afterwards kernels run on the CPU, in numpy, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The oldest release the kernels were tested with.
OLDEST_TRITON = (3, 6)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = (8, 0)

_log = logging.getLogger("stgcma_fast")
_logged: set[tuple[str, str]] = set()


def _no_limits(*args: Any, **kwargs: Any) -> Iterable[str]:
    return ()


class Implementation(NamedTuple):
    """A function that can serve an operator, and what it cannot do."""

    function: Callable
    # Takes the operator's arguments and yields every reason not to serve them.
    limits: Callable[..., Iterable[str]] = _no_limits


# Operator -> implementation -> what serves it. Filled by the operators' modules when they are imported.
REGISTRY: dict[str, dict[str, Implementation]] = {}


def register(op: str, **implementations: Callable | Implementation) -> None:
    """Name the functions that can serve ``op``."""
    REGISTRY[op] = {name: i if isinstance(i, Implementation) else Implementation(i) for name, i in implementations.items()}


def refusals(op: str, impl: str, *args: Any, **kwargs: Any) -> list[str]:
    """Every reason why ``impl`` cannot serve ``op``; with the operator's arguments, those that lie in them too."""
    reasons = _installation_refusals() if impl == "triton" else []
    if args:
        if impl == "triton":
            reasons.extend(_triton_refusals(args[0]))
        reasons.extend(REGISTRY[op][impl].limits(*args, **kwargs))
    return reasons


def _installation_refusals() -> list[str]:
    if not HAS_TRITON:
        return ["triton is not installed"]
    if TRITON_VERSION < OLDEST_TRITON:
        return [f"its kernels need triton {_dotted(OLDEST_TRITON)}, got {_dotted(TRITON_VERSION)}"]
    return []


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _triton_refusals(x: Tensor) -> Iterator[str]:
    if x.dtype not in TRITON_DTYPES:
        yield f"its kernels take float32, bfloat16 and float16, got {x.dtype}"
    if x.is_cuda:
        gpu = torch.cuda.get_device_properties(x.device)
        if (gpu.major, gpu.minor) < OLDEST_GPU:
            yield f"its kernels need compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, got {gpu.major}.{gpu.minor}"
    elif not INTERPRETED:
        yield f"its kernels need a CUDA device, got {x.device.type} (for tests: TRITON_INTERPRET=1 in the environment)"


def _check_name(impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl: got {impl!r}, allowed are {', '.join(map(repr, get_args(Impl)))}")


def check_impl(impl: str) -> None:
    """Raise ValueError for an unknown name, NotImplementedError for one that no operator can have on this machine."""
    _check_name(impl)
    reasons = _installation_refusals() if impl == "triton" else []
    if reasons:
        raise NotImplementedError(f"impl='triton' was asked for, but {'; '.join(reasons)}")


def select(op: str, impl: Impl, *args: Any, **kwargs: Any) -> Callable:
    """The function that serves a call of ``op``; its first argument is a tensor on the device that does the work.

    "auto" takes "triton" on CUDA wherever it can serve, else "torch"; any other choice runs as asked or not at all.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the implementation asked for cannot serve this call; the text gives every reason.
    """
    _check_name(impl)
    chosen = impl
    if impl == "auto":
        chosen = "torch"
        if args[0].is_cuda:
            reasons = refusals(op, "triton", *args, **kwargs)
            if not reasons:
                chosen = "triton"
            elif not torch.compiler.is_compiling():
                _log_once(op, "; ".join(reasons))
    else:
        reasons = refusals(op, impl, *args, **kwargs)
        if reasons:
            raise NotImplementedError(f"{op}: impl={impl!r} was asked for, but {'; '.join(reasons)}")
    return REGISTRY[op][chosen].function


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` runs: its own, or that of autocast, which leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _log_once(op: str, reasons: str) -> None:
    if (op, reasons) not in _logged:
        _logged.add((op, reasons))
        _log.info("%s is served by PyTorch: %s", op, reasons)

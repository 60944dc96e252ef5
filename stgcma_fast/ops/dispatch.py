"""Which implementation serves an operator, and why the others do not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

Impl = Literal["auto", "triton", "torch", "reference"]

# Operator -> implementation -> function. Filled by the operators' modules when they are imported.
REGISTRY: dict[str, dict[str, Callable]] = {}


def register(op: str, **implementations: Callable) -> None:
    """Name the functions that can serve ``op``."""
    REGISTRY[op] = implementations


def refusals(op: str, impl: str) -> list[str]:
    """Every reason why ``impl`` cannot serve ``op`` on this machine; empty if it can."""
    if impl in REGISTRY[op]:
        return []
    reasons = [f"this version has no {impl} implementation of {op}"]
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    return reasons


def select(op: str, impl: Impl) -> Callable:
    """The function that serves ``op``. "auto" takes "torch"; any other choice runs as asked or not at all.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the implementation asked for cannot serve the operator; the text gives every reason.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl: got {impl!r}, allowed are {', '.join(map(repr, get_args(Impl)))}")
    chosen = "torch" if impl == "auto" else impl
    reasons = refusals(op, chosen)
    if reasons:
        raise NotImplementedError(f"impl={impl!r} was asked for, but {'; '.join(reasons)}")
    return REGISTRY[op][chosen]

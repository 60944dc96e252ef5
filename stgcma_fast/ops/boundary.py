"""Where PyTorch ends and Triton begins: operators registered with a schema and a fake, both importable without Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("stgcma_fast", "DEF")


def define(module: str, schema: str, fake: Callable) -> Callable:
    """Register a launcher of ``stgcma_fast.kernels`` as an operator that PyTorch can trace.

    Args:
        module: the file in kernels/. It is imported, and Triton with it, when the operator first runs.
        schema: the operator in PyTorch's schema language; its name is the launcher's.
        fake: allocates the outputs and does nothing else.

    Returns:
        The operator, which takes the schema's arguments by position.
    """
    name = schema.split("(")[0]

    def launcher(*args: Any) -> Any:
        return getattr(importlib.import_module(f"stgcma_fast.kernels.{module}"), name)(*args)

    _LIBRARY.define(schema)
    # On the CPU a kernel runs under Triton's interpreter; `dispatch` refuses it without.
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launcher, key)
    torch.library.register_fake(f"stgcma_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.stgcma_fast, name).default

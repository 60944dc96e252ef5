"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Kernels run on the CPU in Triton's interpreter; `make test-gpu` sets this to 0. Triton reads it when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Whatever a test draws without a generator of its own, it draws the same in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

"""Fixtures of the operators' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The problems are tiny: threads that wait for each other on a busy machine make them five times slower."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture
def all_threads(_one_thread: None) -> None:
    """As many threads as users have, where they might change the result."""
    torch.set_num_threads(_THREADS)

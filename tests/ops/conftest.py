"""Fixtures of the operators' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.inputs import Device

_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The problems are tiny: threads that wait for each other on a busy machine make them five times slower."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture
def all_threads(_one_thread: None) -> None:
    """As many threads as users have, two at least, where they might change the result."""
    torch.set_num_threads(max(2, os.cpu_count() or 1))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[str]:
    """Triton kernels: in the interpreter, and by `make test-gpu` on a GPU. What they leave unwritten is NaN."""
    if request.param == "cpu" and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    Device.name = request.param
    yield request.param
    Device.name = "cpu"

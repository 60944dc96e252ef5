"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Kernels run on the CPU in Triton's interpreter; `make test-gpu` sets this to 0. Triton reads it when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# pytest-xdist runs a process per core: each has one thread, and so has what it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if os.environ["TRITON_INTERPRET"] == "1":
    from tests.support.interpreter import patch_language_once

    patch_language_once()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After every test for a device has run, leave word for the benchmarks whether all passed, and at which commit."""
    option = session.config.option
    whole = not (option.keyword or getattr(option, "lf", False) or option.ignore or option.deselect or option.collectonly)
    whole = whole and session.config.args == session.config.getini("testpaths")
    device = {"not gpu and not slow": "cpu", "gpu": "cuda"}.get(option.markexpr)
    if not whole or device is None or hasattr(session.config, "workerinput"):
        return
    from benchmarks.harness import commit, green_file

    green_file(device).parent.mkdir(exist_ok=True)
    green_file(device).write_text(f"{commit()} {'passed' if exitstatus == pytest.ExitCode.OK else 'failed'}\n")


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

"""The scripts of benchmarks/ import one another as scripts do: from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the scripts is where Python looks first, and what is imported from it is forgotten afterwards."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    for path in folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)

"""What the benchmarks share."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def harness(scripts):
    return importlib.import_module("harness")


def test_memory_peak_is_seen(harness):
    """A buffer that lives only during the call is in the peak and not in what stays."""
    meter = harness.Meter("cpu")
    if not meter.known:
        pytest.skip("this system does not tell")
    before = meter.used()
    meter.reset()
    torch.ones(50_000_000)
    assert meter.peak() - before == pytest.approx(200e6, rel=0.1)
    assert meter.used() - before < 20e6


def test_rows_are_replaced_by_key_and_parts_are_kept(harness, tmp_path):
    file = tmp_path / "rows.json"
    harness.save(file, "one", [{"a": 1, "ms": 1.0}, {"a": 2, "ms": 2.0}], ("a",), "cpu")
    harness.save(file, "two", [{"b": 1}], ("b",), "cpu")
    harness.save(file, "one", [{"a": 2, "ms": 3.0}], ("a",), "cpu")
    results = json.loads(file.read_text())
    assert results["one"] == [{"a": 1, "ms": 1.0}, {"a": 2, "ms": 3.0}]
    assert results["two"] == [{"b": 1}]
    assert results["origin"]["commit"] == harness.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_results_of_another_commit_are_not_mixed_in(harness, tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    harness.save(file, "one", [], (), "cpu")
    before = file.read_text()
    monkeypatch.setattr(harness, "commit", lambda: "0123456")
    with pytest.raises(ValueError, match=r"was measured with commit .*, this is 0123456"):
        harness.save(file, "one", [], (), "cpu")
    assert file.read_text() == before


def test_green_only_at_the_same_clean_commit(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "green_file", lambda device: tmp_path / device)
    monkeypatch.setattr(harness, "commit", lambda: "0123456")
    assert harness.tests_green("cpu") is None
    (tmp_path / "cpu").write_text("0123456 passed\n")
    assert harness.tests_green("cpu") is True
    (tmp_path / "cpu").write_text("0123456 failed\n")
    assert harness.tests_green("cpu") is False
    monkeypatch.setattr(harness, "commit", lambda: "0123456-dirty")
    (tmp_path / "cpu").write_text("0123456-dirty passed\n")
    assert harness.tests_green("cpu") is None


def test_standard_profile_module_is_not_hidden():
    """torch.compile imports cProfile, and that `profile`, of which benchmarks/ has one of its own."""
    code = "import harness, cProfile, profile; print(profile.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).parent != FOLDER

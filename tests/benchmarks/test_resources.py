"""What the kernels take of a GPU, compiled ahead of time: no spills, shared memory within the card, tensor cores."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from stgcma_fast import kernels

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "resources.py"
KEYS = {
    *("kernel", "op", "direction", "shape", "dtype", "arch", "registers", "spills", "shared_bytes", "mma", "matrix"),
    *("num_warps", "num_stages", "blocks_per_sm", "warps_per_sm", "occupancy", "source", "key", "config"),
}


def run(*command: str) -> subprocess.CompletedProcess:
    """Python where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=environment | {"COLUMNS": "200"}, capture_output=True, text=True, check=False
    )


def compiled(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    file = folder / "rows.json"
    done = run(str(SCRIPT), "--json", str(file), *options)
    assert file.exists(), done.stderr
    return done, json.loads(file.read_text())


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory):
    """The stage with most blocks, and windows that take several blocks of queries: every kernel once at least."""
    folder = tmp_path_factory.mktemp("resources")
    return compiled(folder, "--arch", "sm_80", "sm_90", "--shape", "swin_l stage 3", "window 12")


@pytest.fixture
def resources(scripts):
    return importlib.import_module("resources")


def every_kernel() -> set[str]:
    """Names of the functions under kernels/ that are launched."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = {(name, f) for module in modules for name, f in vars(module).items() if name.endswith("_kernel")}
    return {name for name, f in found if name.startswith("_") and isinstance(f, triton.JITFunction | InterpretedFunction)}


def check(done: subprocess.CompletedProcess, table: dict, archs: set[str], limits: dict) -> None:
    rows = table["rows"]
    assert table["failures"] == []
    assert done.returncode == 0, done.stdout
    for row in rows:
        assert row.keys() == KEYS
        assert row["spills"] == 0, row
        assert row["shared_bytes"] <= limits[row["arch"]].block_shared, row
        assert row["mma"] is not None or not row["matrix"], row
        assert 0 < row["registers"] <= 255
        assert row["blocks_per_sm"] >= 1, row
    for arch in archs:
        # Older GPUs than sm_89 do not round to float8, and that has no backward.
        has_float8 = int(arch.removeprefix("sm_")) >= 89
        assert {row["kernel"] for row in rows if row["arch"] == arch} == every_kernel() - (
            set() if has_float8 else {"_quantize_fwd_kernel"}
        )
        for op in {row["op"] for row in rows if row["arch"] == arch}:
            directions = {row["direction"] for row in rows if (row["op"], row["arch"]) == (op, arch)}
            assert directions == ({"fwd"} if op == "quantize" else {"fwd", "bwd"})


def test_kernels(one_stage, resources):
    """The limits are those of facts.md: 163 KB on sm_80, 227 KB on sm_90."""
    limits = [(arch, resources.LIMITS[arch].block_shared // 1024) for arch in resources.ARCHS]
    assert limits == [("sm_80", 163), ("sm_86", 99), ("sm_90", 227), ("sm_100", 227)]
    check(*one_stage, {"sm_80", "sm_90"}, resources.LIMITS)


@pytest.mark.slow
def test_kernels_at_every_shape(tmp_path, resources):
    """Many minutes on two cores where nothing is in Triton's cache."""
    check(*compiled(tmp_path), {"sm_80", "sm_86", "sm_90", "sm_100"}, resources.LIMITS)


def test_where_the_rows_come_from(one_stage):
    done, table = one_stage
    assert table["versions"]["torch"] == torch.__version__
    assert table["versions"]["triton"] == triton.__version__
    assert {"commit", "date"} <= table.keys()
    assert {row["source"] for row in table["rows"]} == {"default"}
    assert "compile" in done.stdout  # the progress bar
    assert "_layer_norm_fwd_kernel" in done.stdout


def test_instructions(one_stage):
    """Tensor cores of each generation, and none where nothing is multiplied."""
    _, table = one_stage
    assert {row["mma"] for row in table["rows"] if row["matrix"] and row["arch"] == "sm_80"} == {"HMMA"}
    assert any("HGMMA" in (row["mma"] or "") for row in table["rows"] if row["arch"] == "sm_90")
    assert {row["mma"] for row in table["rows"] if row["op"] == "layer_norm"} == {None}


# Workers import the script again, so only the part behind the guard is the test's.
LAUNCHED = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import resources
from stgcma_fast.kernels import launch
from shapes import CASES
if __name__ == "__main__":
    options = ["--arch", "sm_90", "--op", "layer_norm", "--shape", "swin_l stage 4"]
    case = next(c for c in CASES if (c.op, c.label) == ("layer_norm", "swin_l stage 4"))
    (_, forward), _ = resources.launches(case, resources.DTYPES["bfloat16"], "sm_90")
"""


def test_a_spill_fails(tmp_path):
    """Eight rows of 1536 channels are more than one warp has registers for."""
    script = tmp_path / "override.py"
    script.write_text(
        f"""{LAUNCHED}
    with launch.override({{forward.key: dict(forward.config, BLOCK_N=8, num_warps=1)}}):
        sys.exit(resources.main(options))
"""
    )
    done = run(str(script))
    assert done.returncode == 1, done.stderr
    assert "_layer_norm_fwd_kernel on sm_90 (layer_norm, swin_l stage 4" in done.stdout
    assert "spilled registers" in done.stdout
    assert "_layer_norm_bwd_kernel on sm_90" not in done.stdout


def test_pinned_configurations_are_compiled_too(tmp_path):
    """For the GPU they were measured on, beside the default; a key that nobody launches is told."""
    script = tmp_path / "pinned.py"
    script.write_text(
        f"""{LAUNCHED}
    launch.CONFIGS = Path({str(tmp_path)!r})
    rows = [{{"key": forward.key, "config": dict(forward.config, num_warps=8)}}, {{"key": "old", "config": {{}}}}]
    (launch.CONFIGS / "gpu.json").write_text(json.dumps({{"gpu": "GPU", "capability": [9, 0], "rows": rows}}))
    sys.exit(resources.main([*options, "--json", str(launch.CONFIGS / "out" / "rows.json")]))
"""
    )
    (tmp_path / "out").mkdir()
    done = run(str(script))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    both = {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"}
    assert {row["num_warps"] for row in rows if row["source"] == "GPU"} == {8}
    assert {row["kernel"] for row in rows if row["source"] == "GPU"} == {"_layer_norm_fwd_kernel"}
    assert {row["kernel"] for row in rows if row["source"] == "default"} == both
    assert "launched by no case: old" in done.stdout


ROW = {
    "kernel": "_some_kernel",
    "op": "some",
    "direction": "fwd",
    "shape": "stage",
    "dtype": "bfloat16",
    "arch": "sm_86",
    "registers": 255,
    "spills": 0,
    "shared_bytes": 99 * 1024,
    "mma": "HMMA",
    "matrix": True,
    "config": {},
}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"spills": 2}, "2 loads and stores of spilled registers"),
        ({"shared_bytes": 99 * 1024 + 1}, "101377 bytes of shared memory, the card has 101376"),
        ({"mma": None}, "without tensor cores"),
        ({"error": "PTXASError: no"}, "does not compile: PTXASError: no"),
    ],
)
def test_a_wrong_row_is_named(resources, wrong, reason):
    (text,) = resources.failures([ROW, ROW | wrong])
    assert text.startswith("_some_kernel on sm_86 (some, stage")
    assert reason in text


def test_what_is_no_failure(resources):
    assert resources.failures([ROW, ROW | {"matrix": False, "mma": None}, ROW | {"dtype": "float32", "mma": None}]) == []


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        (("sm_80", 128, 0, 4), 4),  # registers
        (("sm_90", 32, 0, 4), 16),  # warps
        (("sm_90", 32, 0, 1), 32),  # blocks
        (("sm_86", 32, 49 * 1024, 4), 2),  # shared memory
        (("sm_86", 32, 99 * 1024, 4), 1),
        (("sm_100", 64, 0, 4, 256), 2),  # tensor memory
        (("sm_80", 33, 0, 4), 12),  # 40 registers a thread are given out
    ],
)
def test_occupancy(resources, arguments, blocks):
    got = resources.occupancy(*arguments)
    assert (got["blocks_per_sm"], got["warps_per_sm"]) == (blocks, blocks * arguments[3])


def test_the_interpreter_is_refused():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr

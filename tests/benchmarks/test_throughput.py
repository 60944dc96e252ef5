"""The end-to-end benchmark, on a model small enough for a test. Times are never asserted."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stgcma_fast as sf

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "throughput.py"
TINY = sf.ModelConfig(
    backbone=sf.SwinConfig(image_size=28, embed_dim=16, depths=(2,), num_heads=(2,), window=7), adapter_ratio=0.25, num_frames=2
)
KEYS = {
    *(
        "impl",
        "phase",
        "arch",
        "adapters",
        "task",
        "batch_size",
        "dtype",
        "device",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "clips_per_s",
    ),
    *("rounds", "peak_mb", "speedup", "speedup_over", "max_abs_err", "peak_share"),
}


@pytest.fixture
def throughput(scripts, monkeypatch):
    """The script as a module, with one tiny model behind every name and no search for the machine's peak."""
    module = importlib.import_module("throughput")
    monkeypatch.setattr(module, "preset", lambda *args, **switches: TINY)
    monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: 1e12)
    # A second thread only waits in products this small.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def wrong(throughput, monkeypatch):
    """One trained weight of the fast model is off by a little; gets the name to spoil."""

    class Wrong(sf.FastSTGCMA):
        spoilt = "mlp_head.0.bias"

        def load_state_dict(self, state_dict, *args, **kwargs):
            return super().load_state_dict(state_dict | {self.spoilt: state_dict[self.spoilt] + 0.01}, *args, **kwargs)

    def build(config):
        model = Wrong(config)
        return model, model

    monkeypatch.setitem(throughput.IMPLEMENTATIONS, "fast", build)
    return Wrong


def test_rows_and_table(throughput, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert throughput.main(["--arch", "swin_l", "--device", "cpu", "--steps", "2", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    rows = results["throughput"]
    assert results["origin"]["versions"]["torch"] == torch.__version__
    assert all(row.keys() == KEYS for row in rows)
    assert [(row["phase"], row["impl"]) for row in rows] == [
        (phase, impl) for phase in ("infer", "train") for impl in ("reference", "fast")
    ]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["speedup"] > 0
        assert row["clips_per_s"] == pytest.approx(1e3 / row["p50_ms"])
        assert (row["dtype"], row["device"], row["arch"]) == ("float32", "cpu", "swin_l")
    assert [row["max_abs_err"] for row in rows if row["impl"] == "reference"] == [0, 0]
    out = capsys.readouterr().out
    assert "compiled is left out" in " ".join(out.split())
    assert "clips" in out
    assert "check" in out  # the progress bar


def test_low_precision_and_batches(throughput, tmp_path):
    file = tmp_path / "rows.json"
    args = ["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--json", str(file)]
    assert throughput.main([*args, "--dtype", "bfloat16", "--batch-size", "2"]) == 0
    rows = json.loads(file.read_text())["throughput"]
    assert [row["dtype"] for row in rows] == 4 * ["bfloat16"]
    assert all(row["batch_size"] == 2 and row["max_abs_err"] > 0 for row in rows)


@pytest.mark.parametrize("switches", [{"task": "avs", "num_classes": 1}, {"task": "avqa"}], ids=["avs", "avqa"])
def test_other_tasks(throughput, switches, monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "preset", lambda *args, task: dataclasses.replace(TINY, **switches))
    file = tmp_path / "rows.json"
    args = ["--arch", "swin_l", "--task", switches["task"], "--device", "cpu", "--steps", "1", "--json", str(file)]
    assert throughput.main(args) == 0
    rows = json.loads(file.read_text())["throughput"]
    assert [(row["task"], row["impl"]) for row in rows] == 2 * [(switches["task"], name) for name in ("reference", "fast")]


def test_a_task_that_the_backbone_lacks(throughput, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "preset", sf.preset)
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--arch", "clip_b16", "--task", "avs", "--device", "cpu"])
    assert stop.value.code == 2
    assert "got 'avs' with a CLIP backbone" in capsys.readouterr().err


def test_two_dtypes_share_a_baseline(throughput, tmp_path):
    file = tmp_path / "rows.json"
    args = ["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--json", str(file), "--phase", "infer"]
    assert throughput.main([*args, "--dtype", "float32", "bfloat16"]) == 0
    rows = json.loads(file.read_text())["throughput"]
    names = [("reference", "float32"), ("fast", "float32"), ("reference", "bfloat16"), ("fast", "bfloat16")]
    assert [(row["impl"], row["dtype"]) for row in rows] == names
    for row in rows:
        assert row["speedup_over"] == "reference float32"
        assert row["speedup"] == pytest.approx(rows[0]["p50_ms"] / row["p50_ms"])
    assert rows[0]["max_abs_err"] == 0 < rows[2]["max_abs_err"]


def test_a_graph_needs_cuda(throughput, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--arch", "swin_l", "--device", "cpu", "--impl", "fast_graph"])
    assert stop.value.code == 2
    assert "needs --device cuda" in capsys.readouterr().err


def test_float8_says_all_that_it_needs(throughput, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--arch", "swin_l", "--device", "cpu", "--impl", "fast_fp8", "--dtype", "float32", "bfloat16"])
    assert stop.value.code == 2
    assert "it needs a CUDA device, got cpu; it needs --dtype bfloat16, got float32" in capsys.readouterr().err


@pytest.mark.parametrize("gradient", [False, True])
def test_float8_may_err_sixteen_times_as_much(throughput, gradient):
    hi = torch.ones(4)
    low, far = hi + 1e-3, hi + 3e-2
    throughput.verify("it", far, hi, low, torch.bfloat16, gradient, float8=True)
    with pytest.raises(throughput.DisagreementError):
        throughput.verify("it", far, hi, low, torch.bfloat16, gradient)
    with pytest.raises(throughput.DisagreementError):
        throughput.verify("it", hi + 6e-2, hi, low, torch.bfloat16, gradient, float8=True)


def test_fast_alone_is_still_checked(throughput, wrong, tmp_path, capsys):
    args = ["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--impl", "fast", "--phase", "infer"]
    assert throughput.main(args) == 1
    assert "speed" in capsys.readouterr().out


def test_without_the_reference_there_is_no_speedup(throughput, tmp_path):
    file = tmp_path / "rows.json"
    args = ["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--impl", "fast", "--phase", "infer", "--json", str(file)]
    assert throughput.main(args) == 0
    (row,) = json.loads(file.read_text())["throughput"]
    assert row["speedup"] is None


def test_disagreement_prints_no_speed(throughput, wrong, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert throughput.main(["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--json", str(file)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "fast float32, infer, logits: error" in out
    assert "allowed" in out
    assert "clips" not in out
    assert not file.exists()


def test_disagreeing_gradient_is_named(throughput, monkeypatch, capsys):
    """Equal logits are not enough."""

    class Wrong(sf.FastSTGCMA):
        def forward(self, audio, video):
            logits = super().forward(audio, video)
            gate = self.layers[0].blocks[0].gate_v
            return logits + (gate - gate.detach()) * torch.arange(logits.shape[1])

    def build(config):
        model = Wrong(config)
        return model, model

    monkeypatch.setitem(throughput.IMPLEMENTATIONS, "fast", build)
    assert throughput.main(["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--phase", "train"]) == 1
    assert "fast float32, gradient of layers.0.blocks.0.gate_v: error" in " ".join(capsys.readouterr().out.split())


def test_nan_disagrees(throughput):
    with pytest.raises(throughput.DisagreementError, match="error nan"):
        throughput.verify("it", torch.tensor([float("nan"), 1]), torch.ones(2), None, torch.float32, False)


def test_missing_folder_is_told_before_the_run(throughput, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "Race", None)
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--arch", "swin_l", "--json", str(tmp_path / "missing" / "rows.json")])
    assert stop.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_device(throughput, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--arch", "swin_l", "--device", "cuda"])
    assert stop.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [["--arch", "vgg"], ["--arch", "swin_l", "--batch-size", "0"], ["--arch", "swin_l", "--steps", "-1"], []]
)
def test_bad_values_exit_2(throughput, bad):
    with pytest.raises(SystemExit) as stop:
        throughput.main(bad)
    assert stop.value.code == 2


def test_help_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for option in ("arch", "adapters", "task", "batch-size", "phase", "impl", "dtype", "device", "steps", "json"):
        assert f"--{option}" in done.stdout

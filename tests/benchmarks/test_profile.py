"""The profiler of a whole step: what is counted where, on a model small enough for a test. Times are never asserted."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

import stgcma_fast as sf

ROOT = Path(__file__).resolve().parents[2]
TINY = sf.ModelConfig(
    backbone=sf.SwinConfig(image_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window=7),
    adapter_ratio=0.25,
    num_frames=2,
)
ARGS = ["--arch", "swin_l", "--device", "cpu"]


@pytest.fixture
def script(scripts, monkeypatch):
    """The script as a module, by its path, since its name is the standard library's; one tiny model behind every name."""
    spec = importlib.util.spec_from_file_location("benchmarks_profile", ROOT / "benchmarks" / "profile.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmarks_profile", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "preset", lambda *args: TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def measured(script, impl: str, phase: str, tmp_path: Path):
    race = script.Race(TINY, [impl], [phase], 1, [torch.float32], "cpu", 1, None)
    contender = race.build(impl, torch.float32, None)
    return script.measure(race, contender, phase, tmp_path / "trace.json.gz", lambda: None)


def event(name, start, end, parent=None, kernels=(), cuda=False, annotation=False, **fields) -> FunctionEvent:
    """An event as the profiler leaves it; times in us, kernels as names and us."""
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    fields = {"id": start, "thread": 1, "fwd_thread": 0, "input_shapes": [], **fields}
    made = FunctionEvent(name=name, start_us=start, end_us=end, device_type=kind, is_user_annotation=annotation, **fields)
    made.cpu_parent = parent
    for kernel, duration in kernels:
        made.append_kernel(kernel, 0, duration)
    return made


def test_rows_tables_and_files(script, tmp_path, capsys):
    out, file = tmp_path / "new" / "folder", tmp_path / "rows.json"
    assert script.main([*ARGS, "--phase", "infer", "train", "--out", str(out), "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["profile"]
    assert [(row["phase"], row["impl"]) for row in rows] == [(p, i) for p in ("infer", "train") for i in ("reference", "fast")]
    for row in rows:
        assert (row["arch"], row["adapters"], row["batch_size"]) == ("swin_l", "base", 1)
        assert (row["dtype"], row["device"], row["idle_ms"]) == ("float32", "cpu", None)
        for parts in (row["by_class"], row["by_step"]):
            for key in ("ms", "calls", "gflop", "read_gb"):
                assert sum(part[key] for part in parts) == pytest.approx(row[key])
                assert row[key] > 0
        trained = {"backward", "optimizer"} if row["phase"] == "train" else set()
        assert {part["direction"] for part in row["by_class"]} == {"forward"} | trained
        assert not row["other"], "names that belong into CLASSES"
    for phase in ("infer", "train"):
        name = f"swin_l_base_1_{phase}_float32_cpu"
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        text = (out / f"{name}.md").read_text()
        for title in ("Totals", "Time by class", "Work by class", "Time by stage and step", "Largest differences of fast"):
            assert f"## {title}" in text
        for impl in ("reference", "fast"):
            trace = json.loads(gzip.decompress((out / f"{name}_{impl}.json.gz").read_bytes()))
            assert "stage 1/block 1/temporal" in {entry["name"] for entry in trace["traceEvents"]}
    assert "cross-modal exchange" in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["infer", "train"])
def test_reference_flop_are_pytorchs(script, tmp_path, phase):
    counted = measured(script, "reference", phase, tmp_path).total.gflop
    assert counted == pytest.approx(sys.modules["throughput"].count_flops(TINY, 1)[phase] / 1e9, rel=1e-4)


@pytest.mark.parametrize(
    ("impl", "pieces"), [("reference", False), ("fast", False), ("fast", True)], ids=["reference", "fast", "fast in pieces"]
)
def test_backward_belongs_to_the_step_of_its_forward(script, tmp_path, monkeypatch, impl, pieces):
    if pieces:
        monkeypatch.setattr("stgcma_fast.ops.stream.PIECE_BYTES", 2**14)
    profile = measured(script, impl, "train", tmp_path)
    sums = profile.by(lambda cell: (cell.stage, cell.step, cell.direction))
    for stage in ("stage 1", "stage 2"):
        for step in ("temporal", "temporal attention", "temporal adapter", "spatial", "spatial attention", "spatial adapter"):
            if (stage, step) != ("stage 1", "temporal"):  # nothing before it is trained
                assert sums[stage, step, "backward"].gflop > 0, (stage, step)
        assert sums[stage, "global", "backward"].gflop > 0
        assert sums[stage, "global adapter", "backward"].gflop > 0
    assert sums["stage 1", "merge", "backward"].gflop > 0
    assert sums["unattributed", "", "backward"].gflop == 0
    exchange = {cell.stage for cell, s in profile.cells.items() if cell.kind == script.EXCHANGE and s.gflop}
    assert exchange == {"stage 1", "stage 2"}
    if impl == "reference":
        exchange = profile.by(lambda cell: (cell.kind, cell.direction))
        # Two factors, both with a gradient.
        assert exchange[script.EXCHANGE, "backward"].gflop == pytest.approx(2 * exchange[script.EXCHANGE, "forward"].gflop)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x.t() + x.t() @ grad


def test_autograd_functions_and_plain_operators(script):
    x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        with record_function("stage 1/block 1/spatial/adapter"):
            y = x @ w
        # Makes no node of its own, and so shows the number of the one below.
        with record_function("stage 1/block 2/temporal"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        with record_function("stage 2/block 1/global"):
            z = _Square.apply(y)
        with record_function("not of the model"):
            loss = z.sum()
        loss.backward()
    profile = script.Profile("it", 1.0)
    script.analyse(profile, profiler.events(), {}, "cpu")
    product = 2 * 8**3 / 1e9
    gflop = {cell: sums.gflop for cell, sums in profile.cells.items() if sums.gflop}
    assert gflop == pytest.approx(
        {
            ("stage 1", "spatial adapter", "forward", script.ADAPTERS): product,
            ("stage 1", "spatial adapter", "backward", script.ADAPTERS): 2 * product,
            ("stage 1", "temporal", "forward", script.FROZEN): product,
            ("stage 2", "global", "forward", script.FROZEN): product,
            ("stage 2", "global", "backward", script.FROZEN): 2 * product,
        }
    )
    calls = {cell: sums.calls for cell, sums in profile.cells.items() if sums.calls and cell.kind == "pointwise and sums"}
    assert calls[("no range", "", "forward", "pointwise and sums")] == 1


def test_kernels_of_a_gpu(script):
    """Events as they come from CUDA: kernels hang on the operators that launched them."""
    step = event("stage 1/block 1/spatial", 0, 100, annotation=True, kernels=[("stage 1/block 1/spatial", 500)])
    mm = event(
        "aten::mm", 1, 9, step, [("sm90_gemm", 300), ("Memset (Device)", 2)], sequence_nr=7, input_shapes=[[2, 3], [3, 4]]
    )
    fused = event("stgcma_fast::av_adapter_fwd", 10, 30, step, [("_av_adapter_fwd_down_kernel", 40)])
    fused.append_kernel("_av_adapter_fwd_kernel", 0, 50)
    node = event("autograd::engine::evaluate_function: MmBackward0", 200, 300, thread=2, fwd_thread=1, sequence_nr=7)
    back = event("aten::mm", 210, 220, node, [("sm90_gemm", 100)], thread=2, input_shapes=[[2, 4], [4, 3]])
    grad = event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 301, 310, thread=2)
    copy = event("aten::copy_", 302, 305, grad, [("Memcpy DtoD", 8)], thread=2)
    adam = event("Optimizer.step#Adam.step", 320, 400, annotation=True)
    update = event("aten::_fused_adam_", 321, 330, adam, [("multi_tensor_apply", 20)])
    launched = {"sm90_gemm": (20, 320), "Memset (Device)": (320, 322), "_av_adapter_fwd_down_kernel": (330, 370)}
    launched |= {"_av_adapter_fwd_kernel": (370, 420), "Memcpy DtoD": (600, 608), "multi_tensor_apply": (620, 640)}
    device = [event(name, *span, cuda=True) for name, span in launched.items()]
    device += [event("sm90_gemm", 450, 550, cuda=True), event("lonely", 630, 660, cuda=True)]
    device += [event("stage 1/block 1/spatial", 20, 660, cuda=True, annotation=True)]
    profile = script.Profile("it", 1.0)
    script.analyse(profile, [step, mm, fused, node, back, grad, copy, adam, update, *device], {1: ["float", "float"]}, "cuda")
    cells = {tuple(cell): (round(s.ms * 1e3), s.calls) for cell, s in profile.cells.items() if s.calls}
    assert cells == {
        ("stage 1", "spatial", "forward", script.FROZEN): (300, 1),
        ("stage 1", "spatial", "forward", "copies and casts"): (2, 1),
        ("stage 1", "spatial", "forward", script.ADAPTERS): (40, 1),
        ("stage 1", "spatial", "forward", script.EXCHANGE): (50, 1),
        ("stage 1", "spatial", "backward", script.FROZEN): (100, 1),
        ("unattributed", "", "backward", "copies and casts"): (8, 1),
        ("optimizer", "", "optimizer", "optimizer"): (20, 1),
        ("unattributed", "", "unattributed", script.OTHER): (30, 1),
    }
    assert profile.total.gflop == pytest.approx(2 * 2 * 2 * 3 * 4 / 1e9)
    # Of the first product alone; dtypes of the second are not given.
    assert profile.total.read_gb == pytest.approx(4 * (6 + 12) / 1e9)
    assert profile.other == pytest.approx({"lonely": 0.03})
    assert profile.gaps == pytest.approx([0.008, 0.03, 0.05, 0.012])
    row = profile.row()
    assert row["idle_ms"] == pytest.approx(0.1)
    assert "lonely" in script.sheets([profile])[-1].markdown()


def test_no_gap_under_another_kernel(script):
    spans = [(0, 100), (10, 20), (50, 120), (130, 140)]
    assert script.idle([event("k", *span, cuda=True) for span in reversed(spans)]) == pytest.approx([0.01])
    assert script.idle([]) == []


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("aten::addmm", "stage 1/block 1/global", "frozen products"),
        ("aten::addmm", "stage 1/block 1/global/adapter", "adapters"),
        ("aten::addmm_", "stage 1/block 1/global/adapter/cross-modal", "cross-modal exchange"),
        ("aten::bmm", "stage 1/block 1/temporal/attention", "attention"),
        ("aten::addmm", "head", "other products"),
        ("aten::mkldnn_convolution", "embed", "frozen products"),
        ("aten::_scaled_dot_product_flash_attention_backward", "stage 1/block 1/spatial/attention", "attention"),
        ("aten::_scaled_dot_product_efficient_attention", "stage 1/block 1/global/adapter/cross-modal", "cross-modal exchange"),
        ("flash_attn::_flash_attn_forward", "stage 1/block 1/spatial/attention", "attention"),
        ("aten::native_layer_norm_backward", "", "layer norm"),
        ("aten::add_", "", "pointwise and sums"),
        ("aten::_efficientzerotensor", "", "views and host"),
        ("stage 1/block 1", "stage 1/block 1", "views and host"),
        ("autograd::engine::evaluate_function: MmBackward0", "", "views and host"),
        ("torch::autograd::AccumulateGrad", "", "views and host"),
        ("aten::never_heard_of", "", "other"),
    ],
)
def test_classes(script, name, place, expected):
    assert script.kind(name, place) == expected


def test_every_kernel_of_the_project_has_a_class(script):
    names = [n for file in (ROOT / "kernels").glob("*.py") for n in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)]
    assert len(names) > 15
    for name in names:
        found = script.kernel_kind(name, "stgcma_fast::some_operator", "stage 1/block 1/spatial")
        assert found not in (script.OTHER, script.HOST), f"{name} belongs into CLASSES"


def test_compiled_models_have_no_range(script, tmp_path, monkeypatch):
    def build(config):
        model = sf.FastSTGCMA(config)
        return model, torch.compile(model, backend="eager")

    monkeypatch.setitem(script.IMPLEMENTATIONS, "fast_compiled", build)
    profile = measured(script, "fast_compiled", "infer", tmp_path)
    assert {cell.stage for cell in profile.cells} == {"no range"}
    assert profile.total.gflop > 0


def test_the_standard_library_keeps_its_profile():
    """Beside a file of this name torch.compile failed, which imports cProfile, which imports profile."""
    code = "import throughput, torch; torch.compile(torch.sin, backend='eager')(torch.ones(1)); throughput.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True)
    assert "--arch" in done.stdout


def test_bad_values_are_told_before_the_run(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "Race", None)
    (tmp_path / "file").touch()
    for args, message in {
        ("--out", str(tmp_path / "file")): "--out",
        ("--json", str(tmp_path / "missing" / "rows.json")): "there is no folder",
        ("--impl", "fast_graph"): "needs --device cuda",
        ("--impl", "other"): "impl",
        ("--batch-size", "0"): "batch_size",
    }.items():
        with pytest.raises(SystemExit) as stop:
            script.main([*ARGS, *args])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(script, tmp_path):
    file = tmp_path / "rows.json"
    args = ["--arch", "swin_l", "--device", "cuda", "--dtype", "bfloat16", "--out", str(tmp_path), "--json", str(file)]
    assert script.main([*args, "--impl", "reference", "fast", "fast_graph"]) == 0
    for row in json.loads(file.read_text())["profile"]:
        sums = {(part["stage"], part["direction"]): part["ms"] for part in row["by_step"]}
        assert row["calls"] > 0
        assert row["idle_ms"] >= 0
        if row["impl"] != "fast_graph":
            assert {("stage 1", "forward"), ("stage 2", "backward"), ("optimizer", "optimizer")} <= {
                k for k, ms in sums.items() if ms
            }
            assert sums.get(("unattributed", "unattributed"), 0) < 0.1 * row["ms"]

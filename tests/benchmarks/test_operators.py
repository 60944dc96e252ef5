"""The operators' benchmark on a CPU: small operators, times made up."""

from __future__ import annotations

import importlib
import json
import re
import time
from unittest import mock

import pytest
import torch

from stgcma_fast import ops
from stgcma_fast.kernels import launch

TIMINGS = {"host_ms", "gpu_cold_ms", "graph_ms", "peak_extra_mb", "flops", "bytes", "gbps", "tflops"}
TIMINGS |= {"copy_share", "matmul_share", "floor_share"}
# Milliseconds of the providers, in the order in which they are timed.
MS = {"reference": 8.0, "compiled": 4.0, "fast": 2.0}


def layer_norm(make):
    return (make(6, 24), make(24, grad=False), make(24, grad=False), 1e-5), {}


def av_adapter(make):
    params = [ops.AdapterParams(make(4, 8, std=0.3), make(4), make(8, 4, std=0.5), make(8)) for _ in range(2)]
    options = {"residual_visual": make(2, 9, 8), "residual_audio": make(2, 5, 8), "window": None}
    return (make(2, 9, 8), make(2, 5, 8), *params, make(1), make(1)), options


class Instruments:
    """Times by the order of calls: each of the providers in both modes."""

    def __init__(self):
        self.timed = 0
        self.capturable = True

    def ms(self, scale):
        p50 = scale * [*MS.values()][self.timed % len(MS)]
        return [0.9 * p50, p50, 1.1 * p50]

    def host(self, step):
        step()
        return self.ms(0.5)

    def cold(self, step):
        step()
        return self.ms(2.0)

    def graph(self, step):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.ms(1.0)

    def memory(self, step):
        self.timed += 1
        return 3_000_000


@pytest.fixture
def bench(scripts, tmp_path, monkeypatch):
    """The script; `bench(op, function, arguments)` measures one operator on the CPU and returns status and rows."""
    operators = importlib.import_module("operators")
    # On the CPU a compilation takes longer than all these tests, and "auto" would not take the kernels.
    monkeypatch.setitem(operators.PROVIDERS, "compiled", operators.PROVIDERS["reference"])
    monkeypatch.setitem(operators.PROVIDERS, "fast", lambda function: operators._with(function, "triton"))
    monkeypatch.setattr(operators, "DRAWS", 2)

    class Bench:
        module = operators
        file = tmp_path / "rows.json"
        instruments = Instruments()
        dtype = torch.float32

        def __call__(self, op="layer_norm", function=ops.layer_norm, arguments=layer_norm):
            case = operators.Case(op, "small", function, arguments)
            machine = operators.Machine(bytes_per_s=1e9, flops=1e12)
            status = operators.run([case], self.dtype, "cpu", machine, self.instruments, str(self.file))
            return status, self.saved()["rows"]

        def saved(self):
            return json.loads(self.file.read_text())

    return Bench()


def test_rows(bench, capsys):
    status, rows = bench()
    assert status == 0
    assert [(row["mode"], row["provider"]) for row in rows] == [(mode, name) for mode in ("fwd", "fwdbwd") for name in MS]
    for row in rows:
        assert row.keys() >= TIMINGS
        assert (row["op"], row["shape"], row["dtype"]) == ("layer_norm", "small", "float32")
        assert 0 < row["error"] <= 2 * row["error_reference"]
        p50 = MS[row["provider"]]
        assert [row["host_ms"][1], row["gpu_cold_ms"][1], row["graph_ms"][1]] == [0.5 * p50, 2 * p50, p50]
        assert row["speedup_over_reference"] == 8 / p50
        assert row["speedup_over_compiled"] == (None if row["provider"] == "reference" else 4 / p50)
        assert row["peak_extra_mb"] == 3
    forward = (2 * 6 * 24 + 2 * 24) * 4
    assert rows[2]["bytes"] == forward
    # The upstream gradient, the weights and the input are read, its gradient is written.
    assert rows[5]["bytes"] == forward + (3 * 6 * 24 + 2 * 24) * 4
    assert rows[2]["gbps"] == pytest.approx(forward / 2e-3 / 1e9)
    assert rows[2]["floor_share"] == rows[2]["copy_share"] == pytest.approx(rows[2]["gbps"])
    saved = bench.saved()
    assert saved.keys() >= {"versions", "commit", "date", "driver", "copy_gbps", "matmul_tflops"}
    assert re.search(r"fast +1 +4 +2 +4\.00 +2\.00 +3 ", capsys.readouterr().out)


def test_the_kernels_that_ran(bench):
    _, rows = bench()
    kernels = {row["mode"]: row["kernels"] for row in rows if row["provider"] == "fast"}
    assert kernels["fwd"].keys() == {"_layer_norm_fwd_kernel"}
    assert kernels["fwdbwd"].keys() == {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"}
    assert "BLOCK_N=" in kernels["fwd"]["_layer_norm_fwd_kernel"]


def test_gates_weights_and_residuals(bench):
    bench.dtype = torch.float16
    status, rows = bench("av_adapter", ops.av_adapter, av_adapter)
    assert status == 0, rows
    assert all(row["flops"] > 0 for row in rows)


def wrong(**changes):
    """layer_norm whose kernels' output or gradient is changed."""

    def function(*args, impl):
        y = ops.layer_norm(*args, impl=impl)
        if impl == "triton" and "forward" in changes:
            y = changes["forward"](y)
        if impl == "triton" and "backward" in changes and y.requires_grad:
            y.register_hook(changes["backward"])
        return y

    return function


@pytest.mark.parametrize("change", [lambda x: 1.001 * x, lambda x: x * float("nan")], ids=["off", "nan"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_wrong_provider_is_not_timed(bench, where, change, capsys):
    status, rows = bench(function=wrong(**{where: change}))
    assert status == 1
    failed = [(row["mode"], row["provider"]) for row in rows if "failed" in row]
    assert failed == [("fwd", "fast")] * (where == "forward") + [("fwdbwd", "fast")]
    assert all(("failed" in row) != (row.keys() >= TIMINGS) for row in rows)
    assert not rows[-1].keys() & TIMINGS
    assert ("output" if where == "forward" else "gradient of") in rows[-1]["failed"]
    assert bench.instruments.timed == 6 - len(failed)
    assert "failed" in capsys.readouterr().out


def test_a_provider_that_does_not_run(bench):
    def function(*args, impl):
        if impl == "triton":
            raise ValueError("not today")
        return ops.layer_norm(*args, impl=impl)

    status, rows = bench(function=function)
    assert status == 1
    assert [row.get("failed") for row in rows] == [None, None, "ValueError: not today"] * 2


def test_what_cannot_be_captured(bench):
    bench.instruments.capturable = False
    status, rows = bench()
    assert status == 0
    for row in rows:
        assert row["graph_ms"] is None
        assert "capturing" in row["graph_error"]
        assert row["speedup_over_reference"] == 8 / MS[row["provider"]]
        assert row["gbps"] == pytest.approx(row["bytes"] / (2 * MS[row["provider"]] * 1e-3) / 1e9)


def test_an_interrupted_run_keeps_its_rows(bench, monkeypatch, capsys):
    def host(step):
        if bench.instruments.timed == 4:
            raise KeyboardInterrupt
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(bench.instruments, "host", host)
    with pytest.raises(KeyboardInterrupt):
        bench()
    assert len(bench.saved()["rows"]) == 4
    assert "layer_norm, small" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "fails"), [(0.19, False), (0.21, True), (float("nan"), True)], ids=str)
def test_twice_the_references_error_is_the_limit(bench, error, fails):
    exact = {"output 0": torch.ones(8).double(), "gradient of [0][0]": torch.ones(8).double()}
    reference, fast = bench.module.Errors(), bench.module.Errors()
    reference.add({name: x + 0.1 for name, x in exact.items()}, exact)
    fast.add({name: x + (error if name == "output 0" else 0) for name, x in exact.items()}, exact)
    row = fast.against(reference)
    assert row["tensor"] == "output 0"
    assert row["error_reference"] == pytest.approx(0.1)
    assert ("failed" in row) is fails


def test_an_exact_reference_allows_no_error(bench):
    exact = {"output 0": torch.ones(8).double()}
    results = {}
    for name, error in (("low", 0), ("same", 0), ("off", 1e-9)):
        results[name] = bench.module.Errors()
        results[name].add({"output 0": exact["output 0"] + error}, exact)
    assert "failed" not in results["same"].against(results["low"])
    assert "failed" in results["off"].against(results["low"])


def test_one_number_may_be_right_by_luck(bench):
    """A gate's gradient is judged with those of other gates and draws, not alone."""
    errors = [bench.module.Errors() for _ in range(2)]
    for exact, low, fast in ((1.0, 1.0, 1.01), (1.0, 1.02, 1.01)):
        for each, x in zip(errors, (low, fast), strict=True):
            each.add({"gate": torch.tensor([x])}, {"gate": torch.tensor([exact]).double()})
    row = errors[1].against(errors[0])
    assert row["tensor"] == "gradients of one number"
    assert "failed" not in row


def test_the_cases_that_count(bench):
    chosen = bench.module.chosen
    assert [(case.op, case.label) for case in chosen(None, None)] == [*bench.module.DEFAULT]
    assert chosen(None, None)[0].op == "av_adapter"
    assert {case.op for case in chosen(["gelu"], None)} == {"gelu"}
    assert len(chosen(["gelu"], None)) == 10
    assert {case.op for case in chosen(None, ["swin_l stage 1"])} > {"gelu", "av_adapter"}
    assert [case.label for case in chosen(["adapter"], ["clip_l14 audio"])] == ["clip_l14 audio", "clip_l14 audio no residual"]


@pytest.mark.parametrize(
    ("op", "shape", "forward_gflop", "both_gflop", "forward_mib"),
    [
        ("av_adapter", "swin_l stage 1", 80.1, 4.62 * 3 + 75.5 * 22 / 8, 68.9),
        ("av_adapter", "swin_l stage 1 windows shift 3", 5.8, 4.62 * 3 + 1.18 * 22 / 8, 68.9),
        ("temporal_attention", "swin_l stage 1", 0.24, 0.72, 45.9),
        ("window_attention", "swin_l stage 1 shift 3", 1.18, 1.18 * 3.5, 45.9),
        ("spatial_attention", "clip_l14 visual", 2.71, 2.71 * 3.5, 20.1),
        ("adapter", "swin_l stage 1", 2.31, 6.94, 34.5),
        ("cross_modal_attention", "swin_l stage 1", 75.5, 75.5 * 22 / 8, 23.0),
        ("layer_norm", "swin_l stage 1", 0, 0, 23.0),
    ],
    ids=lambda x: str(x).replace(" ", "_") if isinstance(x, str) else "",
)
def test_work_is_that_of_the_cards(bench, op, shape, forward_gflop, both_gflop, forward_mib):
    (case,) = (case for case in bench.module.CASES if (case.op, case.label) == (op, shape))
    args, kwargs = case.build(torch.bfloat16, "meta")
    outputs = [*bench.module.tensors(case.function(*args, **kwargs, impl="reference"))]
    forward, both = (bench.module.work(case, mode, args, kwargs, outputs) for mode in ("fwd", "fwdbwd"))
    assert forward.flops / 1e9 == pytest.approx(forward_gflop, rel=0.01)
    assert both.flops / 1e9 == pytest.approx(both_gflop, rel=0.01)
    # The cards leave the weights out.
    assert forward.bytes / 2**20 == pytest.approx(forward_mib, rel=0.01)


def test_residuals_cost_the_backward_nothing(bench):
    cases = {case.label: case for case in bench.module.CASES if case.op == "adapter"}
    backward = {}
    for label in ("swin_l stage 1", "swin_l stage 1 no residual"):
        args, kwargs = cases[label].build(torch.bfloat16, "meta")
        outputs = [torch.empty_like(args[0])]
        forward, both = (bench.module.work(cases[label], mode, args, kwargs, outputs).bytes for mode in ("fwd", "fwdbwd"))
        backward[label] = both - forward
    assert len(set(backward.values())) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.module.main(["--json", str(bench.file)])
    assert stop.value.code == 2
    assert "no CUDA device" in " ".join(capsys.readouterr().err.split())
    assert not bench.file.exists()


def test_with_the_interpreter(bench, monkeypatch, capsys):
    if not launch.INTERPRETED:
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        bench.module.main([])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_instruments_without_a_gpu(scripts, monkeypatch):
    """Order and units of what they do, on a device that is made up."""
    operators = importlib.import_module("operators")
    cuda = mock.MagicMock()
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 350
    replaced = "synchronize", "Stream", "current_stream", "stream", "CUDAGraph", "graph"
    for name in (*replaced, "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def do_bench(step, quantiles):
        step()
        return tuple(quantiles)

    monkeypatch.setattr(operators.triton.testing, "do_bench", do_bench)
    instruments = operators.Instruments()
    p20, p50, p80 = instruments.host(lambda: time.sleep(1e-3))
    assert 1 <= p20 <= p50 <= p80
    assert cuda.synchronize.call_count == operators.HOST_CALLS + 1
    assert instruments.cold(cuda.step) == [0.2, 0.5, 0.8]
    assert instruments.memory(cuda.step) == 250

    cuda.reset_mock()
    assert instruments.graph(cuda.step) == [0.2, 0.5, 0.8]
    order = ["stream().__enter__", *["step"] * operators.GRAPH_WARMUP, "stream().__exit__"]
    order += ["graph().__enter__", "step", "graph().__exit__", "CUDAGraph().replay"]
    assert [name for name, *_ in cuda.mock_calls if name in order] == order
    cuda.graph.side_effect = RuntimeError("cannot be captured")
    with pytest.raises(RuntimeError, match="cannot be captured"):
        instruments.graph(cuda.step)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "arguments"), [("layer_norm", layer_norm), ("av_adapter", av_adapter)], ids=lambda x: str(x)[:10]
)
def test_on_a_gpu(scripts, tmp_path, op, arguments):
    """The real instruments and a real compilation."""
    operators = importlib.import_module("operators")
    file = tmp_path / "rows.json"
    case = operators.Case(op, "small", getattr(ops, op), arguments)
    machine = operators.Machine(operators.copy_peak("cuda"), 1e15)
    assert operators.run([case], torch.bfloat16, "cuda", machine, operators.Instruments(), str(file)) == 0
    for row in json.loads(file.read_text())["rows"]:
        assert all(ms > 0 for kind in ("host_ms", "gpu_cold_ms", "graph_ms") for ms in row[kind]), row
        assert row["peak_extra_mb"] > 0

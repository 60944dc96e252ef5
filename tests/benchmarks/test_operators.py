"""The operators' benchmark on a CPU: small operators, times on a device made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import harness, shapes
from benchmarks.ops import gate, instruments, problem, providers
from stgcma_fast import ops
from stgcma_fast.kernels import launch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "ops"
TIMINGS = {"host_ms", "gpu_cold_ms", "graph_ms", "peak_extra_mb", "flops", "bytes", "gbps", "tflops", "roof_pct"}
# Milliseconds of the providers, in the order in which they are timed.
MS = {"reference": 8.0, "compiled": 4.0, "fast": 2.0}


def layer_norm(make):
    return (make(6, 24), make(24, grad=False), make(24, grad=False), 1e-5), {}


def av_adapter(make):
    params = [ops.AdapterParams(make(4, 8, std=0.3), make(4), make(8, 4, std=0.5), make(8)) for _ in range(2)]
    options = {"residual_visual": make(2, 9, 8), "residual_audio": make(2, 5, 8), "window": None}
    return (make(2, 9, 8), make(2, 5, 8), *params, make(1), make(1)), options


def spatial_attention(make):
    return (make(2, 5, 3, 2, 8),), {"scale": 0.35}


def cross_modal_attention(make):
    return (make(2, 9, 4), make(2, 5, 4), make(1), make(1)), {}


def temporal_attention(make):
    return (make(2, 3, 4, 3, 2, 8), make(2, 3, 3)), {"scale": 0.35}


def window_attention(make):
    return (make(2, 4, 4, 3, 2, 8), make(2, 4, 4, grad=False)), {"window": 2, "shift": 1, "scale": 0.35}


class Instruments:
    """Times by the order of calls."""

    def __init__(self):
        self.timed = 0
        self.cuda = self.capturable = True

    def ms(self, scale):
        p50 = scale * [*MS.values()][self.timed % len(MS)]
        return [0.9 * p50, p50, 1.1 * p50]

    def cold(self, step):
        step()
        return self.ms(2.0)

    def graph(self, build):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        build()()
        return self.ms(1.0)

    def memory(self, step):
        step()
        self.timed += 1
        return 3_000_000


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`bench(op, function, arguments)` runs the benchmark of one operator on the CPU and returns status and rows."""
    # On the CPU a compilation takes longer than all these tests, and "auto" would not take the kernels.
    monkeypatch.setitem(providers.PROVIDERS, "compiled", providers.PROVIDERS["reference"])
    monkeypatch.setitem(providers.PROVIDERS, "fast", lambda case: providers.with_impl(case, "triton"))
    monkeypatch.setattr(gate, "DRAWS", 2)
    monkeypatch.setattr(instruments, "ROUNDS", 2)
    monkeypatch.setattr(harness, "copy_peak", lambda device: 1e9)
    monkeypatch.setattr(harness, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(harness, "commit", lambda: "0123456")
    monkeypatch.setattr(shapes, "STRESS", [])
    # pytest-benchmark would take the run inside the test for one of pytest-xdist's and measure nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    class Bench:
        file = tmp_path / "rows.json"
        instruments = Instruments()

        def __call__(self, op="layer_norm", function=ops.layer_norm, arguments=layer_norm, names=MS, options=()):
            monkeypatch.setattr(shapes, "CASES", [shapes.Case(op, "small", function, arguments)])
            monkeypatch.setattr(instruments, "Instruments", lambda device: self.instruments)
            args = [str(FOLDER), "--device", "cpu", "--all", "--json", str(self.file), "--capture=no", "-p", "no:cacheprovider"]
            args += [f"--provider={name}" for name in names]
            status = pytest.main([*args, *options])
            return status, json.loads(self.file.read_text())["operators"]

    # A second thread only waits in calls this small.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench()
    torch.set_num_threads(threads)


def test_rows(bench, capsys):
    status, rows = bench()
    assert status == pytest.ExitCode.OK
    assert [(row["mode"], row["provider"]) for row in rows] == [(mode, name) for mode in problem.MODES for name in MS]
    for row in rows:
        assert row.keys() >= TIMINGS
        assert (row["op"], row["shape"], row["dtype"]) == ("layer_norm", "small", "float32")
        assert row["sizes"] == [[6, 24], [24], [24]]
        assert row["frozen"]
        assert row["error"] > 0
        p50 = MS[row["provider"]]
        assert [row["gpu_cold_ms"][1], row["graph_ms"][1]] == [2 * p50, p50]
        assert row["host_ms"] == sorted(row["host_ms"])
        assert row["host_ms"][0] > 0
        assert row["peak_extra_mb"] == 3
    fwd, both, bwd = (next(r["bytes"] for r in rows if (r["mode"], r["provider"]) == (m, "fast")) for m in problem.MODES)
    assert fwd == (2 * 6 * 24 + 2 * 24) * 4
    # The upstream gradient, the weights and the input are read, its gradient is written.
    assert bwd == (3 * 6 * 24 + 2 * 24) * 4
    assert both == fwd + bwd
    fast = rows[2]
    assert fast["gbps"] == pytest.approx(fwd / 2e-3 / 1e9)
    assert fast["roof_pct"] == pytest.approx(100 * fast["gbps"])
    out = capsys.readouterr().out
    assert re.search(r"fast +\S+ +4 +2 +4\.00 +2\.00 +3 ", out)


def test_the_cpu_has_the_hosts_time_alone(bench):
    bench.instruments.cuda = False
    status, rows = bench(names=("reference",), options=("--mode=fwd",))
    assert status == pytest.ExitCode.OK
    (row,) = rows
    assert (row["gpu_cold_ms"], row["graph_ms"]) == (None, None)
    assert row["gbps"] == pytest.approx(row["bytes"] / row["host_ms"][1] / 1e6)


def test_the_kernels_that_ran(bench):
    _, rows = bench(names=("fast",))
    kernels = {row["mode"]: row["kernels"] for row in rows}
    assert kernels["fwd"].keys() == {"_layer_norm_fwd_kernel"}
    assert kernels["bwd"].keys() == {"_layer_norm_bwd_kernel"}
    assert kernels["fwdbwd"].keys() == {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"}
    assert kernels["fwd"]["_layer_norm_fwd_kernel"]["BLOCK_N"] > 0


def test_gates_weights_and_residuals(bench):
    status, rows = bench("av_adapter", ops.av_adapter, av_adapter, ("fast",), ("--dtype=float16", "--mode=fwdbwd"))
    assert status == pytest.ExitCode.OK, rows
    assert all(row["flops"] > 0 and row["dtype"] == "float16" for row in rows)
    assert not rows[0]["frozen"]


@pytest.mark.parametrize(
    ("arguments", "refusing"),
    [
        (spatial_attention, {"flash_attn", "xformers", "sdpa_cudnn", "sdpa_efficient"}),
        (cross_modal_attention, {"flash_attn", "xformers", "sdpa_cudnn", "sdpa_efficient"}),
        (temporal_attention, {"flash_attn", "xformers", "sdpa_cudnn", "sdpa_efficient", "sdpa_flash"}),
        (window_attention, {"flash_attn", "xformers", "sdpa_cudnn", "sdpa_efficient", "sdpa_flash"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_libraries_mean_the_operator_or_are_skipped(bench, capsys, arguments, refusing):
    """What serves on a CPU passes the comparison."""
    name = arguments.__name__
    status, rows = bench(name, getattr(ops, name), arguments, providers.BACKENDS, ("-rs", "--mode=fwdbwd"))
    assert status == pytest.ExitCode.OK, rows
    assert {row["provider"] for row in rows} == {*providers.BACKENDS} - refusing
    assert len(re.findall("SKIPPED.* needs a CUDA device", capsys.readouterr().out)) >= 1


def test_why_a_library_cannot_serve():
    def refusals(provider, arguments):
        case = shapes.Case(arguments.__name__, "small", getattr(ops, arguments.__name__), arguments)
        return " ".join(providers.refusals(provider, case, case.fill(torch.float32, "cpu")))

    assert "adds no bias" in refusals("sdpa_flash", temporal_attention)
    assert "adds no bias" in refusals("flash_attn", window_attention)
    assert "multiples of 8" in refusals("xformers", window_attention)
    assert "needs a CUDA device" in refusals("sdpa_cudnn", cross_modal_attention)
    assert refusals("sdpa_math", temporal_attention) == refusals("fast", temporal_attention) == ""


def test_a_refusal_of_pytorchs_own_is_a_refusal(monkeypatch):
    monkeypatch.setattr(providers, "backend_refusals", lambda name, x: [])
    case = shapes.Case("temporal_attention", "small", ops.temporal_attention, temporal_attention)
    found = providers.refusals("sdpa_efficient", case, case.fill(torch.float32, "cpu"))
    assert re.match("No (available kernel|viable backend)", found[0])


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
    assert status == pytest.ExitCode.TESTS_FAILED
    failed = [(row["mode"], row["provider"]) for row in rows if "failed" in row]
    assert failed == [("fwd", "fast")] * (where == "forward") + [("fwdbwd", "fast"), ("bwd", "fast")]
    assert all(("failed" in row) != (row.keys() >= TIMINGS) for row in rows)
    assert not rows[-1].keys() & TIMINGS
    assert ("output" if where == "forward" else "gradient of") in rows[-1]["failed"]
    assert bench.instruments.timed == 9 - len(failed)
    assert "failed" in capsys.readouterr().out


def test_a_provider_that_does_not_run(bench):
    def function(*args, impl):
        if impl == "triton":
            raise NotImplementedError("not today")
        return ops.layer_norm(*args, impl=impl)

    status, rows = bench(function=function)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert [row.get("failed") for row in rows] == [None, None, "NotImplementedError: not today"] * 3


def test_what_cannot_be_captured(bench):
    bench.instruments.capturable = False
    status, rows = bench()
    assert status == pytest.ExitCode.OK
    for row in rows:
        assert row["graph_ms"] is None
        assert "capturing" in row["graph_error"]
        assert row["gbps"] == pytest.approx(row["bytes"] / (2 * MS[row["provider"]] * 1e-3) / 1e9)


def test_what_does_not_fit_into_memory(bench, monkeypatch):
    def cold(step):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(bench.instruments, "cold", cold)
    status, rows = bench(names=("reference",), options=("--mode=fwd",))
    assert status == pytest.ExitCode.TESTS_FAILED
    assert rows[0]["failed"] == "out of memory: tried to allocate"


def test_an_interrupted_run_keeps_its_rows(bench, monkeypatch, capsys):
    def cold(step):
        if bench.instruments.timed == 4:
            raise KeyboardInterrupt
        return [1.0, 1.0, 1.0]

    monkeypatch.setattr(bench.instruments, "cold", cold)
    status, rows = bench()
    assert status == pytest.ExitCode.INTERRUPTED
    assert len(rows) == 4
    assert "layer_norm, small" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "fails"), [(0.19, False), (0.21, True), (float("nan"), True)], ids=str)
def test_twice_the_references_error_is_the_limit(error, fails):
    exact = {"output 0": torch.ones(8).double(), "gradient of [0][0]": torch.ones(8).double()}
    reference, fast = gate.Errors(), gate.Errors()
    reference.add({name: x + 0.1 for name, x in exact.items()}, exact)
    fast.add({name: x + (error if name == "output 0" else 0) for name, x in exact.items()}, exact)
    row = fast.against(reference)
    assert row["tensor"] == "output 0"
    assert row["error_reference"] == pytest.approx(0.1)
    assert ("failed" in row) is fails


@pytest.mark.parametrize(("error", "fails"), [(0, False), (0.9e-6, False), (1.1e-6, True)], ids=str)
def test_an_exact_reference_allows_rounding_alone(error, fails):
    exact = {"output 0": torch.ones(8).double()}
    low, fast = gate.Errors(), gate.Errors()
    low.add(exact, exact)
    fast.add({"output 0": exact["output 0"] + error}, exact)
    assert ("failed" in fast.against(low, 1e-6)) is fails
    assert ("failed" in fast.against(low)) is (error > 0)


def test_one_number_may_be_right_by_luck():
    """A gate's gradient is judged with those of other gates and draws, not alone."""
    errors = [gate.Errors() for _ in range(2)]
    for exact, low, fast in ((1.0, 1.0, 1.01), (1.0, 1.02, 1.01)):
        for each, x in zip(errors, (low, fast), strict=True):
            each.add({"gate": torch.tensor([x])}, {"gate": torch.tensor([exact]).double()})
    row = errors[1].against(errors[0])
    assert row["tensor"] == "gradients of one number"
    assert "failed" not in row


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
def test_work_is_that_of_the_cards(op, shape, forward_gflop, both_gflop, forward_mib):
    (case,) = (case for case in shapes.CASES if (case.op, case.label) == (op, shape))
    args, kwargs = arguments = case.build(torch.bfloat16, "meta")
    outputs = [*shapes.tensors(case.function(*args, **kwargs, impl="reference"))]
    forward, both = (problem.work(case, mode, arguments, outputs) for mode in ("fwd", "fwdbwd"))
    assert forward.flops / 1e9 == pytest.approx(forward_gflop, rel=0.01)
    assert both.flops / 1e9 == pytest.approx(both_gflop, rel=0.01)
    # The cards leave the weights out.
    assert forward.bytes / 2**20 == pytest.approx(forward_mib, rel=0.01)


def test_residuals_cost_the_backward_nothing():
    (case,) = (c for c in shapes.CASES if (c.op, c.label) == ("adapter", "swin_l stage 1"))
    (x, params, residual, scale), kwargs = case.build(torch.bfloat16, "meta")
    outputs = [torch.empty_like(x)]
    backward = {problem.work(case, "bwd", ((x, params, r, scale), kwargs), outputs).bytes for r in (residual, None)}
    assert len(backward) == 1


def test_what_is_passed_through_is_not_written():
    """The streams that a norm hands on for the residual are its inputs; their upstream gradients are read."""
    (case,) = (c for c in shapes.CASES if (c.op, c.label) == ("layer_norm", "swin_l stage 1 both streams"))
    args, kwargs = arguments = case.build(torch.bfloat16, "meta")
    outputs = [*shapes.tensors(case.function(*args, **kwargs, impl="reference"))]
    tokens, weights = sum(x.nbytes for x in args[0]), sum(x.nbytes for x in args[1:3])
    assert problem.work(case, "fwd", arguments, outputs).bytes == 2 * tokens + weights
    assert problem.work(case, "bwd", arguments, outputs).bytes == 4 * tokens + weights


def test_the_backward_alone_runs_again():
    case = shapes.Case("av_adapter", "small", ops.av_adapter, av_adapter)
    one = problem.Problem(case, torch.float32, "cpu")
    call = mock.Mock(side_effect=providers.with_impl(case, "reference"))
    step = one.step(call, "bwd")
    first, again = step(), step()
    call.assert_called_once()
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.fixture(scope="module")
def collected():
    """The output of a collection of the default cases, in a process of its own."""
    command = [sys.executable, "-m", "pytest", str(FOLDER), "--device=cpu", "--collect-only", "--dtype=float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_ids_name_stage_sizes_and_provider(collected):
    ids = [line.partition("::")[2] for line in collected if "::" in line]
    assert ids[0] == "test_operator[av_adapter-swin_l stage 3-10x196x768-float32-reference-fwd]"
    assert len(ids) == len(set(ids))
    assert sum("compiled" in name for name in ids) == 0
    assert sum("sdpa_math" in name for name in ids) == 4 * len(problem.MODES)


def chosen(monkeypatch, *options):
    """The selected cases' operators and shapes."""
    seen = []

    class Plugin:
        def pytest_collection_finish(self, session):
            seen.extend(dict.fromkeys((i.callspec.params["case"].op, i.callspec.params["case"].label) for i in session.items))

    with monkeypatch.context() as patch:
        # The whole list for CUDA, without a device.
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(launch, "INTERPRETED", False)
        args = [str(FOLDER), "--device=cuda", "--collect-only", "--capture=no", "-p", "no:cacheprovider", "--mode=fwd"]
        assert pytest.main([*args, *options], plugins=[Plugin()]) == pytest.ExitCode.OK
    return seen


def test_the_cases_that_count(monkeypatch, capsys):
    default = chosen(monkeypatch)
    assert default[0] == ("av_adapter", "swin_l stage 1")
    assert {op for op, _ in default} == {case.op for case in shapes.CASES}
    assert len(chosen(monkeypatch, "--all")) == len(shapes.CASES) + len(shapes.STRESS)
    assert {op for op, _ in chosen(monkeypatch, "--op=gelu")} == {"gelu"}
    assert {op for op, _ in chosen(monkeypatch, "--shape=swin_l stage 1")} > {"gelu", "av_adapter"}
    both = chosen(monkeypatch, "--op=adapter", "--shape=clip_l14 audio")
    assert both == [("adapter", "clip_l14 audio"), ("adapter", "clip_l14 audio stochastic depth")]
    assert {label.startswith("swin_l") for _, label in chosen(monkeypatch, "-k", "swin_l")} == {True}
    assert "bfloat16-compiled" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu(capsys):
    assert pytest.main([str(FOLDER), "--device=cuda"]) == pytest.ExitCode.USAGE_ERROR
    assert "no CUDA device" in capsys.readouterr().err


def test_with_the_interpreter(monkeypatch, capsys):
    if not launch.INTERPRETED:
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pytest.main([str(FOLDER), "--device=cuda"]) == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_rows_that_could_not_be_kept_are_not_measured(bench, tmp_path, capsys):
    assert pytest.main([str(FOLDER), "--device=cpu", f"--json={tmp_path}/missing/rows.json"]) == pytest.ExitCode.USAGE_ERROR
    assert "there is no folder" in capsys.readouterr().err
    bench.file.write_text(json.dumps({"origin": harness.origin("cpu") | {"commit": "fedcba9"}}))
    assert pytest.main([str(FOLDER), "--device=cpu", f"--json={bench.file}"]) == pytest.ExitCode.USAGE_ERROR
    assert "was measured with commit fedcba9" in capsys.readouterr().err


def test_the_device_is_idle_when_the_host_is_timed(monkeypatch):
    monkeypatch.setattr(instruments, "timed", lambda step, device: (1.0, step()))
    idle, stub, step = mock.Mock(), mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", idle)
    stub.stats.stats.data = [1e-3, 2e-3, 3e-3]
    row = instruments.times(lambda: step, "cuda", Instruments(), stub)
    stub.pedantic.assert_called_once_with(step, setup=idle, rounds=instruments.ROUNDS, warmup_rounds=1)
    assert row["host_ms"] == pytest.approx([1.4, 2.0, 2.6])


def test_instruments_without_a_gpu(monkeypatch):
    """Order and units of what they do, on a device that is made up."""
    cuda = mock.MagicMock()
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 100, 350
    replaced = "Stream", "current_stream", "stream", "CUDAGraph", "graph"
    for name in (*replaced, "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def do_bench(step, quantiles):
        step()
        return tuple(quantiles)

    monkeypatch.setattr(instruments.triton.testing, "do_bench", do_bench)
    device = instruments.Instruments("cuda")
    assert device.cold(cuda.step) == [0.2, 0.5, 0.8]
    assert device.memory(cuda.step) == 250

    cuda.reset_mock()
    cuda.build.return_value = cuda.step
    assert device.graph(cuda.build) == [0.2, 0.5, 0.8]
    # The forward of a backward that is captured runs on the stream of the capture.
    order = ["stream().__enter__", "build", *["step"] * instruments.GRAPH_WARMUP, "stream().__exit__"]
    order += ["graph().__enter__", "step", "graph().__exit__", "CUDAGraph().replay"]
    assert [name for name, *_ in cuda.mock_calls if name in order] == order
    assert cuda.graph.call_args == mock.call(cuda.CUDAGraph(), stream=cuda.Stream())
    cuda.graph.side_effect = RuntimeError("cannot be captured")
    with pytest.raises(RuntimeError, match="cannot be captured"):
        device.graph(cuda.build)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "arguments", [layer_norm, av_adapter, spatial_attention, cross_modal_attention], ids=lambda x: x.__name__
)
def test_on_a_gpu(tmp_path, monkeypatch, arguments):
    """The real instruments, a real compilation, and the libraries that are there."""
    name, file = arguments.__name__, tmp_path / "rows.json"
    monkeypatch.setattr(shapes, "CASES", [shapes.Case(name, "small", getattr(ops, name), arguments)])
    monkeypatch.setattr(shapes, "STRESS", [])
    monkeypatch.setattr(harness, "matmul_peak", lambda device, dtype: 1e15)
    monkeypatch.setattr(harness, "commit", partial(str, "0123456"))
    assert pytest.main([str(FOLDER), "--device=cuda", "--all", "--json", str(file), "-p", "no:cacheprovider"]) == 0
    rows = json.loads(file.read_text())["operators"]
    assert {row["provider"] for row in rows} >= {"reference", "compiled", "fast"}
    for row in rows:
        assert all(ms > 0 for kind in ("host_ms", "gpu_cold_ms", "graph_ms") for ms in row[kind]), row
        assert row["peak_extra_mb"] > 0

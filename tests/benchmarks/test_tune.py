"""The tuning command on a CPU: kernels in the interpreter, times made up."""

from __future__ import annotations

import importlib
import io
import json

import pytest
import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources

from stgcma_fast import ops
from stgcma_fast.kernels import launch

HEADER = {
    "gpu": "NVIDIA Some GPU",
    "capability": [9, 0],
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "commit": "abc",
    "date": "today",
}


def arguments(make):
    return (make(2, 3, 24), make(24, grad=False), make(24, grad=False), 1e-5), {}


@pytest.fixture
def bench(scripts, tmp_path, monkeypatch):
    """The script, one small operator, a table in an empty folder; `bench(timer)` tunes and returns what `tune` does."""
    monkeypatch.setattr(launch, "CONFIGS", tmp_path / "configs")
    launch._table.cache_clear()
    tune = importlib.import_module("tune")
    repeats = tune.REPEATS
    monkeypatch.setattr(tune, "REPEATS", 3)

    class Bench:
        module = tune
        full_repeats = repeats
        path = tmp_path / "configs" / f"{launch.gpu_slug(HEADER['gpu'])}.json"
        function = staticmethod(ops.layer_norm)
        header = HEADER

        def __call__(self, timer, fresh=False):
            case = tune.Case("layer_norm", "small", self.function, arguments)
            console = Console(file=io.StringIO())
            with tune.progress_bar(console) as progress:
                return tune.tune([case], torch.float32, "cpu", tune.Tuned(self.path, self.header, fresh), timer, progress)

        def table(self):
            return json.loads(self.path.read_text())

    yield Bench()
    launch._table.cache_clear()


class Timer:
    """Milliseconds in the order of calls, each step run once."""

    def __init__(self, *ms):
        self.ms, self.calls = ms, 0

    def __call__(self, step):
        step()
        self.calls += 1
        return self.ms[(self.calls - 1) % len(self.ms)]


def test_table(bench, monkeypatch):
    """What is written is what `launch` reads: the fastest candidate of each kernel."""
    runs = []
    monkeypatch.setattr(bench.module, "REPEATS", bench.full_repeats)
    monkeypatch.setattr(bench.module.Call, "run", lambda self, run=bench.module.Call.run: runs.append(1) or run(self))
    timer = Timer(3.0, 1.0, 2.0)
    measured, failed = bench(timer)
    assert (len(measured), failed, timer.calls) == (2, [], 6)
    # One to see what is launched, one a candidate to time it, a hundred to compare bits.
    assert len(runs) == 1 + 2 * (3 + 100)
    table = bench.table()
    assert {name: table[name] for name in HEADER} == HEADER
    assert {row["key"].split()[0] for row in table["rows"]} == {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"}
    with launch.record(None) as recorded:
        ops.layer_norm(torch.randn(6, 24), torch.ones(24), torch.ones(24), impl="triton")
    (one,) = recorded
    pinned = launch._table(launch.gpu_slug(HEADER["gpu"]))
    assert pinned[one.key] == one.candidates[1] != one.config
    row = next(row for row in table["rows"] if row["key"] == one.key)
    assert row["ms"][bench.module.label(one.candidates[1])] == {"small": 1.0}
    assert len(row["ms"]) == len(one.candidates) == 3
    assert (row["commit"], row["date"]) == ("abc", "today")


def test_what_was_measured_is_kept(bench):
    bench(Timer(3.0, 1.0, 2.0))
    before = bench.table()
    later = Timer(1.0)
    assert bench(later) == ([], [])
    assert later.calls == 0
    assert bench.table() == before
    measured, _ = bench(later, fresh=True)
    assert (len(measured), later.calls) == (2, 6)


def test_an_interrupted_run_goes_on(bench):
    class Interrupted(Timer):
        def __call__(self, step):
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().__call__(step)

    with pytest.raises(KeyboardInterrupt):
        bench(Interrupted(1.0))
    assert len(bench.table()["rows"]) == 1
    later = Timer(1.0)
    measured, _ = bench(later)
    assert (len(measured), later.calls) == (1, 3)
    assert len(bench.table()["rows"]) == 2


@pytest.mark.parametrize("what", ["torch", "triton", "driver"])
def test_other_versions_are_measured_anew(bench, what):
    bench(Timer(1.0))
    bench.header = {**HEADER, what: "other"}
    later = Timer(1.0)
    bench(later)
    assert later.calls == 6
    assert bench.table()[what] == "other"


def test_other_candidates_are_measured_anew(bench):
    bench(Timer(1.0))
    table = bench.table()
    del next(iter(table["rows"]))["ms"][bench.module.label(table["rows"][0]["config"])]
    bench.path.write_text(json.dumps(table))
    later = Timer(1.0)
    bench(later)
    assert later.calls == 3


def overridden(number):
    """Whether the candidate of this number is being tried."""
    return any(config["BLOCK_N"] == number for config in launch._State.overrides.values())


def test_changing_bits_are_not_pinned(bench):
    """The fastest configuration gives other results each time, the second does not."""

    def noisy(*args, impl):
        y = ops.layer_norm(*args, impl=impl)
        return y + torch.rand(()) if overridden(64) else y

    bench.function = noisy
    _, failed = bench(Timer(3.0, 1.0, 2.0))
    assert failed == []
    assert {row["config"]["BLOCK_N"] for row in bench.table()["rows"]} == {256}


def test_nothing_but_changing_bits(bench):
    bench.function = lambda *args, impl: ops.layer_norm(*args, impl=impl) + torch.rand(())
    measured, failed = bench(Timer(1.0))
    assert measured == failed
    assert not bench.path.exists()


def test_a_configuration_too_large_for_the_gpu(bench):
    def limited(*args, impl):
        if overridden(64):
            raise OutOfResources(300000, 232448, "shared memory")
        return ops.layer_norm(*args, impl=impl)

    bench.function = limited
    bench(Timer(2.0, 3.0))
    for row in bench.table()["rows"]:
        assert row["config"]["BLOCK_N"] == 128
        assert [list(ms.values()) for ms in row["ms"].values()] == [[2.0], [None], [3.0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.module.main([])
    assert stop.value.code == 2
    assert "no CUDA device" in " ".join(capsys.readouterr().err.split())
    assert not bench.path.parent.exists()


def test_no_shape_begins_so(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Some GPU")
    monkeypatch.setattr(bench.module, "header", lambda: bench.header)
    with pytest.raises(SystemExit) as stop:
        bench.module.main(["--op", "adapter", "--shape", "swin_x"])
    assert stop.value.code == 2
    assert "--shape swin_x: no shape of adapter begins so" in " ".join(capsys.readouterr().err.split())


def test_with_the_interpreter(bench, monkeypatch, capsys):
    if not launch.INTERPRETED:
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        bench.module.main([])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(bench):
    """The real timer, a launch at a time."""
    tune = bench.module
    with tune.progress_bar(Console(file=io.StringIO())) as progress:
        case = tune.Case("layer_norm", "small", ops.layer_norm, arguments)
        table = tune.Tuned(bench.path, tune.header(), False)
        measured, failed = tune.tune([case], torch.bfloat16, "cuda", table, tune._do_bench, progress)
    assert (len(measured), failed) == (2, [])
    assert all(ms > 0 for row in bench.table()["rows"] for shapes in row["ms"].values() for ms in shapes.values())

"""Cost as the work grows: the points, the fits where an axis ends; on models small enough for a test. No time is asserted."""

from __future__ import annotations

import gc
import importlib
import json
import math

import pytest
import torch

import stgcma_fast as sf

TINY = sf.ModelConfig(
    backbone=sf.SwinConfig(image_size=28, embed_dim=16, depths=(1,), num_heads=(2,), window=7), adapter_ratio=0.25, num_frames=2
)
AXES = {"frames": (1, 2, 4, 8), "image": (28, 42, 56), "batch": (1, 2, 4)}
# Tokens of the tiny model at a point: clips x frames x two streams of 7 x 7.
MIDDLE = 2 * 2 * 7 * 7


@pytest.fixture
def scaling(scripts, monkeypatch):
    """The script as a module, with one tiny model behind every name."""
    module = importlib.import_module("scaling")
    monkeypatch.setattr(module, "preset", lambda *args: TINY)
    monkeypatch.setattr(module, "AXES", AXES)
    # Nothing stops anybody from committing while tests run.
    monkeypatch.setattr(importlib.import_module("harness"), "commit", lambda: "0123456")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread only waits in products this small
    gc.freeze()  # memory is measured after a collection, which is most of a test's time where all that is imported takes part
    yield module
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def run(scaling, tmp_path):
    """Run the command on the CPU; returns its status and what it kept."""
    file = tmp_path / "rows.json"

    def command(*args):
        status = scaling.main(["--arch", "swin_l", "--device", "cpu", "--steps", "1", "--json", str(file), *args])
        return status, json.loads(file.read_text())

    command.file = file
    return command


@pytest.fixture
def made_up(scaling, monkeypatch):
    """Measurements by law: the memory of the reference grows with the square of a clip's tokens, all else with the tokens."""

    def measure(self, point, impl, phases):
        seconds = 1e-3 * point.tokens
        work = 1e3 * point.tokens * (point.tokens / point.batch_size if impl == "reference" else 1)
        return {phase: scaling.numbers(point, [seconds], int(1e6 + work), int(1e6)) for phase in phases}

    monkeypatch.setattr(scaling.Scaling, "check", lambda self, point: None)
    monkeypatch.setattr(scaling.Scaling, "measure", measure)


def values(rows, **chosen):
    """Values on the axis of the rows chosen, measured ones and those at which the axis ended."""
    rows = [row for row in rows if all(row[key] == value for key, value in chosen.items())]
    return [[row["value"] for row in rows if (row["stopped"] is not None) is ended] for ended in (False, True)]


def test_rows_exponents_and_figures(scaling, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "AXES", {"frames": (1, 2), "image": (28, 56), "batch": (1, 2)})
    status, saved = run("--plots", str(tmp_path / "figures"))
    assert status == 0
    rows = saved["scaling"]
    assert len({tuple(row[key] for key in scaling.KEYS) for row in rows}) == len(rows) == 3 * 2 * 2 * 2
    for row in rows:
        assert row["stopped"] is None
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["work_mb"] < row["peak_mb"]
    common = [row for row in rows if (row["axis"], row["value"]) in (("frames", 2), ("image", 28), ("batch", 1))]
    assert {row["tokens"] for row in common} == {MIDDLE}
    assert len({row["p50_ms"] for row in common}) == 4  # measured once, for all axes
    assert len(saved["scaling_exponents"]) == 3 * 2 * 2
    assert all(math.isfinite(fit["time_exponent"]) for fit in saved["scaling_exponents"])
    figures = sorted((tmp_path / "figures").iterdir())
    assert [figure.name for figure in figures] == ["scaling_batch.png", "scaling_frames.png", "scaling_image.png"]
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    assert "measure" in capsys.readouterr().out  # the progress bar


def test_laws_are_found(run, made_up):
    _, saved = run()
    assert len(saved["scaling_exponents"]) == 3 * 2 * 2
    for fit in saved["scaling_exponents"]:
        assert fit["time_exponent"] == pytest.approx(1)
        assert fit["memory_exponent"] == pytest.approx(
            2 if fit["impl"] == "reference" and fit["axis"] != "batch" else 1, abs=0.01
        )
        assert fit["values"] == [value for value in AXES[fit["axis"]] if value != 42]  # no multiple of the windows


def test_per_clip(run, made_up):
    _, saved = run()
    rows = [row for row in saved["scaling"] if (row["axis"], row["impl"], row["phase"]) == ("batch", "fast", "train")]
    assert [row["tokens"] for row in rows] == [MIDDLE, 2 * MIDDLE, 4 * MIDDLE]
    assert [row["ms_per_clip"] for row in rows] == pytest.approx(3 * [MIDDLE])
    assert [row["work_mb_per_clip"] for row in rows] == pytest.approx(3 * [MIDDLE * 1e-3])


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("swin_l", [224, 448]),
        ("clip_b16", [112, 224, 336, 448]),
        ("clip_l14", [112, 168, 224, 280, 336, 392, 448]),
    ],
)
def test_points_of_the_presets(scripts, arch, sizes):
    module = importlib.import_module("scaling")
    points = module.points(sf.config.preset(arch))
    assert [point.tokens for point in points] == sorted(point.tokens for point in points)
    found = {axis: [point.values[axis] for point in points if axis in point.axes] for axis in module.AXES}
    assert found == {"frames": [5, 10, 20, 40], "image": sizes, "batch": [1, 2, 4, 8, 16, 32]}
    (middle,) = (point for point in points if len(point.axes) > 1)
    assert (middle.axes, middle.config) == (("frames", "image", "batch"), sf.config.preset(arch))


def test_tokens_are_those_of_the_model(scaling):
    """Audio of CLIP stays as it is when the image grows, that of Swin grows with it."""
    sizes = {"patch_size": 16, "embed_dim": 32, "layers": 1, "heads": 2}
    for config, tokens in (
        (sf.ClipConfig(image_size=32, **sizes), 4 + 1 + 6 * 8 + 1),
        (sf.ClipConfig(image_size=64, **sizes), 16 + 1 + 6 * 8 + 1),
        (sf.SwinConfig(image_size=56, embed_dim=16, depths=(1,), num_heads=(2,)), 2 * 14 * 14),
    ):
        model = sf.ModelConfig(backbone=config, adapter_ratio=0.25, num_frames=3)
        assert scaling.Point(model, 2, ("batch",)).tokens == 2 * 3 * tokens


def test_slope_and_extrapolation(scaling):
    assert scaling.slope([(1, 3.0), (2, 3.0 * 2**1.5), (4, 3.0 * 4**1.5)]) == pytest.approx(1.5)
    assert scaling.slope([(2, 3.0), (2, 4.0)]) is None
    assert scaling.slope([(1, 0.0), (2, 4.0)]) is None
    assert scaling.extrapolated([(2, 3.0)], 4, 2) == pytest.approx(12)
    assert scaling.extrapolated([(1, 9.0), (2, 3.0), (4, 3.0 * 2**1.5)], 8, 2) == pytest.approx(24)
    # What one part does not grow with hides what the rest does, and a leap is no law.
    assert scaling.extrapolated([(2, 3.0), (4, 3.1)], 8, 2) == pytest.approx(6.2)
    assert scaling.extrapolated([(2, 3.0), (4, 300.0)], 8, 2) == pytest.approx(1200)


def test_an_allocation_that_fails_ends_one_axis(scaling, run, monkeypatch):
    """Of the reference, train steps and not forwards; the other implementation and the other axes go on."""

    def build(config):
        model = sf.reference.ReferenceSTGCMA(config)

        def call(audio, video):
            if config.num_frames >= 4 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand more")
            return model(audio, video)

        return model, call

    monkeypatch.setattr(scaling, "AXES", {"frames": (2, 4, 6), "image": (28,), "batch": (1, 2)})
    monkeypatch.setitem(scaling.IMPLEMENTATIONS, "reference", build)
    status, saved = run()
    assert status == 0
    rows = saved["scaling"]
    assert values(rows, axis="frames", impl="reference", phase="train") == [[2], [4]]
    assert values(rows, axis="frames", impl="reference", phase="infer") == [[2, 4, 6], []]
    assert values(rows, axis="frames", impl="fast", phase="train") == [[2, 4, 6], []]
    assert values(rows, axis="batch", impl="reference", phase="train") == [[1, 2], []]
    (ended,) = (row for row in rows if row["stopped"])
    assert ended["stopped"] == "memory: CUDA out of memory. Tried to allocate 9 GiB."
    assert ended["p50_ms"] is None
    assert ended["peak_mb"] is None


def test_other_errors_are_not_hidden(scaling, run, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(scaling.Scaling, "check", lambda self, point: None)
    monkeypatch.setattr(scaling.Race, "measured", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run()


def test_time_that_does_not_suffice(run, made_up, capsys):
    """After the first point there is something to tell from."""
    _, saved = run("--seconds", "1e-6")
    for impl in ("reference", "fast"):
        assert values(saved["scaling"], axis="frames", impl=impl, phase="infer") == [[1], [2]]
        assert values(saved["scaling"], axis="image", impl=impl, phase="train") == [[], [28]]
        assert values(saved["scaling"], axis="batch", impl=impl, phase="train") == [[], [1]]
    assert all(row["stopped"].startswith("time: about") for row in saved["scaling"] if row["stopped"])
    assert "stopped, time: about" in " ".join(capsys.readouterr().out.split())


def test_memory_that_does_not_suffice(scaling, run, made_up, monkeypatch):
    """Before it is asked for: two clips of the reference need 1 MB and twice what one clip does."""
    monkeypatch.setattr(scaling, "AXES", AXES | {"frames": (2,), "image": (28,)})
    needed = 1e6 + 2 * 1e3 * MIDDLE**2
    for free, measured in ((needed / 0.79, [1, 2]), (needed / 0.81, [1])):
        monkeypatch.setattr(scaling, "free_memory", lambda free=free: free)
        run.file.unlink(missing_ok=True)
        _, saved = run()
        ended = AXES["batch"][len(measured)]
        assert values(saved["scaling"], axis="batch", impl="reference", phase="infer") == [measured, [ended]]
        assert values(saved["scaling"], axis="batch", impl="fast", phase="infer") == [[1, 2, 4], []]
        assert all(row["stopped"].startswith("memory: about") for row in saved["scaling"] if row["stopped"])


def test_an_interrupted_run_keeps_its_rows(scaling, run, made_up, monkeypatch):
    measure, left = scaling.Scaling.measure, [1, 1]

    def interrupted(self, *args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return measure(self, *args)

    monkeypatch.setattr(scaling.Scaling, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    rows = json.loads(run.file.read_text())["scaling"]
    assert [(row["value"], row["impl"]) for row in rows] == 2 * [(1, "reference")] + 2 * [(1, "fast")]


def test_disagreement_measures_nothing(scaling, run, monkeypatch, capsys):
    class Wrong(sf.FastSTGCMA):
        def forward(self, audio, video):
            return super().forward(audio, video) + 0.01

    monkeypatch.setitem(scaling.IMPLEMENTATIONS, "fast", lambda config: (model := Wrong(config), model))
    status, saved = run()
    assert (status, saved["scaling"]) == (1, [])
    assert "disagrees with the reference: fast float32, infer, logits" in " ".join(capsys.readouterr().out.split())


def test_refused_before_work(scaling, run, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "Scaling", None)
    run.file.write_text(json.dumps({"origin": {"device": "another", "versions": {}, "commit": None}}))
    for args, text in (((), "was measured with device another"), (("--impl", "fast_graph"), "needs --device cuda")):
        with pytest.raises(SystemExit) as stop:
            run(*args)
        assert stop.value.code == 2
        assert text in " ".join(capsys.readouterr().err.split())

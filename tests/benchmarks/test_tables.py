"""Tables and picture: in the documents what the results say, of the results the newest."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import tables

DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def results(day=1, device="AMD EPYC", green=True, commit=None, **parts):
    """A results file; ``day`` is its age and, unless told, its commit."""
    origin = {
        "device": device,
        "threads": None if "," in device else 2,
        "versions": {"torch": "2.11.0"},
        "commit": commit or f"{day:07}",
        "tests_green": green,
        "date": f"2026-01-{day:02}T00:00:00+00:00",
    }
    return {"origin": origin, **parts}


def row(impl, p50, arch="swin_l", phase="infer", dtype="float32", device="cpu", speedup=1.0, batch=1, **rest):
    names = {"arch": arch, "adapters": "base", "task": "ave", "batch_size": batch, "phase": phase, "dtype": dtype, "impl": impl}
    numbers = {"p50_ms": p50, "clips_per_s": 1e3 / p50, "peak_mb": p50 * 2, "speedup": speedup, "peak_share": 0.5}
    return {**names, **numbers, "speedup_over": "reference float32", "device": device, **rest}


def pair(reference, fast, **same):
    return [row("reference", reference, **same), row("fast", fast, speedup=reference / fast, **same)]


def cells(text, *beginnings):
    """The cells of the one line of a table that begins so."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (line,) = [line for line in found if line[: len(beginnings)] == list(beginnings)]
    return line


@pytest.mark.parametrize("name", [name for name in tables.DOCUMENTS if (tables.ROOT / name).exists()])
def test_documents_say_what_the_results_say(name):
    text = (tables.ROOT / name).read_text()
    assert tables.MARK.search(text)
    assert tables.fill(text, tables.load(tables.RESULTS), name) == text, "run `make tables`"


def test_picture_shows_what_the_results_say():
    shown = ElementTree.parse(tables.PICTURE).find(f".//{DESCRIPTION}").text
    assert shown == tables.described(tables.load(tables.RESULTS)), "run `make tables`"


def test_newest_first_and_only_from_clean_commits(tmp_path):
    for name, day in (("a", 2), ("b", 3), ("c", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results(day)))
    assert [found["origin"]["commit"] for found in tables.load(tmp_path)] == ["0000003", "0000002", "0000001"]
    dirty = results(commit="abcdef0-dirty")
    (tmp_path / "d.json").write_text(json.dumps(dirty))
    with pytest.raises(ValueError, match=r"d\.json was measured at commit abcdef0-dirty"):
        tables.load(tmp_path)
    dirty["origin"]["commit"] = None
    (tmp_path / "d.json").write_text(json.dumps(dirty))
    with pytest.raises(ValueError, match="at commit None"):
        tables.load(tmp_path)


def test_each_line_is_of_the_newest_file_that_has_it():
    old = results(1, throughput=[*pair(8, 4), *pair(6, 3, phase="train"), row("fast", 1, dtype="bfloat16")])
    text = tables.throughput([results(2, throughput=pair(10, 4)), old])
    assert cells(text, "swin_l base, ave", "1", "infer", "float32")[4:6] == ["10", "4"]
    assert cells(text, "swin_l base, ave", "1", "train", "float32")[4:6] == ["6", "3"]
    # What was measured beside the replaced float32 goes with it: numbers of one line and phase belong together.
    assert text.count("| bfloat16 |") == len(tables.PROMISED)
    assert "AMD EPYC, 2 threads, PyTorch 2.11.0, commit 0000002 (swin_l), 0000001 (swin_l)." in text


def test_numbers_of_a_line():
    text = tables.throughput([results(throughput=[*pair(2000, 500), *pair(1000.0, 32.04, arch="clip_b16", phase="train")])])
    want = ["2000", "500", "2", "4.00x float32", "1000 of 4000, 25%", "50%"]
    assert cells(text, "swin_l base, ave", "1", "infer", "float32")[4:] == want
    assert cells(text, "clip_b16 base, ave", "1", "train", "float32")[4:8] == ["1000", "32", "31.2", "31.21x float32"]
    assert tables.UNTESTED not in text


def test_promised_rows_stand_there_unmeasured():
    text = tables.throughput([results(throughput=pair(2, 1))])
    gpu = text[text.index("**NVIDIA H200**") :]
    for arch in tables.MODELS:
        for batch in ("1", "8"):
            for phase in tables.PHASES:
                line = cells(gpu, f"{arch} base, ave", batch, phase, "bfloat16")
                assert line[4:] == 4 * ["not measured yet"] + 4 * ["-"]
    assert "NVIDIA H200: not measured yet." in gpu


def test_gpu_row_is_that_of_the_faster_form():
    same = {"device": "cuda", "dtype": "bfloat16", "speedup_over": "reference bfloat16"}
    rows = [*pair(9.0, 6.0, **same), row("fast_graph", 3.0, speedup=3.0, peak_mb=7.0, **same)]
    text = tables.throughput([results(device="NVIDIA H200, driver 580.1", throughput=rows)])
    want = ["9", "not measured yet", "6", "3", "333", "3.00x bfloat16", "12 of 18, 67%", "50%"]
    assert cells(text, "swin_l base, ave", "1", "infer")[4:] == want
    assert "NVIDIA H200, driver 580.1, PyTorch 2.11.0, commit 0000001." in text


@pytest.mark.parametrize("green", [None, False])
def test_rows_without_passed_tests_are_marked(green):
    found = [results(2, green=green, throughput=pair(2, 1, phase="train")), results(1, throughput=pair(2, 1))]
    text = tables.throughput(found)
    assert cells(text, "swin_l base, ave †")[2] == "train"  # and no other
    assert cells(text, "swin_l base, ave", "1", "infer", "float32")
    assert text.count("† No passed run of all tests is on record") == 1


def test_what_could_not_be_measured_is_a_dash():
    rows = [row("reference", 4, peak_mb=None, speedup=None), row("fast", 2, peak_mb=None, speedup=None)]
    assert cells(tables.throughput([results(throughput=rows)]), "swin_l base, ave", "1", "infer", "float32")[7:9] == ["-", "-"]


def test_operators():
    case = {"op": "gelu", "mode": "fwd", "shape": "stage 1", "dtype": "float32", "gpu_cold_ms": None, "graph_ms": None}
    rows = [
        case | {"provider": "reference", "host_ms": [1, 2.5, 3], "roof_pct": 20.0},
        case | {"provider": "fast", "host_ms": [1, 1.25, 3], "gpu_cold_ms": [1, 0.5, 3], "roof_pct": 81.6},
        {"op": "gelu", "mode": "bwd", "shape": "stage 1", "dtype": "float32", "provider": "fast", "failed": "wrong"},
    ]
    text = tables.operators([results(operators=rows)])
    assert cells(text, "gelu", "stage 1", "fwd", "float32")[4:] == ["2.5", "0.5", "82%"]
    assert cells(text, "gelu", "stage 1", "bwd", "float32")[4:] == ["-", "failed", "-"]
    assert cells(text, "op")[4:] == ["reference", "fast", "fast of roof"]


def test_scaling():
    key = {"arch": "swin_l", "adapters": "base", "axis": "frames", "dtype": "float32", "phase": "train"}
    rows = [
        key | {"impl": "reference", "time_exponent": 1.5, "memory_exponent": 2.0},
        key | {"impl": "fast", "time_exponent": 1.0, "memory_exponent": None},
    ]
    text = tables.scaling([results(scaling_exponents=rows)])
    assert cells(text, "swin_l base", "frames")[2:] == ["train", "float32", "1.50", "1.00", "2.00", "-"]


def test_profile_adds_the_directions_of_a_class():
    key = {"arch": "swin_l", "adapters": "base", "batch_size": 1, "dtype": "float32", "phase": "train", "idle_ms": None}
    parts = [{"class": "attention", "direction": d, "ms": ms} for d, ms in (("forward", 1.0), ("backward", 2.5))]
    rows = [
        key | {"impl": "reference", "step_ms": 900, "by_class": parts},
        key | {"impl": "fast", "step_ms": 200, "by_class": [{"class": "other", "direction": "forward", "ms": 7.0}]},
    ]
    text = tables.profile([results(profile=rows)])
    names = "swin_l base", "1", "train", "float32"
    assert cells(text, *names, "attention")[5:] == ["3.5", "-"]
    assert cells(text, *names, "other")[5:] == ["-", "7"]
    assert cells(text, *names, "idle")[5:] == ["-", "-"]
    assert cells(text, *names, "a step without the profiler")[5:] == ["900", "200"]


def test_fit():
    key = {"arch": "swin_l", "adapters": "base", "task": "ave", "batch_size": 8, "dtype": "bfloat16", "device": "cuda"}
    rest = {"backend": "dali", "waiting": 0.014, "gpu_busy": None, "peak_mb": 20123.4}
    rows = [
        key | {"impl": "fit", "p50_ms": 101.4, "clips_per_s": 78.9} | rest,
        key | {"impl": "fast_graph", "p50_ms": 80.0, "clips_per_s": 100.0},
    ]
    text = tables.fit([results(fit=rows)])
    assert cells(text, "swin_l base, ave", "8")[2:] == ["bfloat16", "dali", "101", "78.9", "-", "79%", "1%", "-", "20123"]


@pytest.mark.parametrize("part", ["operators", "scaling", "profile", "data", "fit"])
def test_a_part_that_nobody_measured(part):
    assert tables.GENERATORS[part]([results(throughput=pair(2, 1))]) == "Not measured yet."


def test_only_what_is_between_marks_changes():
    before = "a\n<!-- scaling -->\nold\n<!-- /scaling -->\nb <!-- two words -->\n<!-- profile --><!-- /profile -->\n"
    after = tables.fill(before, [], "it.md")
    assert after == before.replace("old", "Not measured yet.").replace("profile --><", "profile -->\nNot measured yet.\n<")
    assert tables.fill(after, [], "it.md") == after


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- prices --><!-- /prices -->", "it.md: nothing is made for the mark <!-- prices -->"),
        ("<!-- scaling -->", "it.md: <!-- scaling --> is not closed"),
        ("<!-- scaling --><!-- profile --><!-- /profile -->", "it.md: <!-- scaling --> is not closed"),
        ("<!-- /scaling -->", "it.md: nothing is made for the mark <!-- /scaling -->"),
    ],
)
def test_wrong_marks(text, error):
    with pytest.raises(ValueError, match=error):
        tables.fill(text, [], "it.md")


def test_command_writes_all_or_nothing(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "README.md").write_text("<!-- throughput --><!-- /throughput -->")
    (folder / "a.json").write_text(json.dumps(results(commit="abcdef0-dirty", throughput=pair(2, 1))))
    for name, value in (("ROOT", tmp_path), ("RESULTS", folder), ("PICTURE", folder / "a.svg")):
        monkeypatch.setattr(tables, name, value)
    assert tables.main() == 1
    assert "abcdef0-dirty" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "<!-- throughput --><!-- /throughput -->"
    (folder / "a.json").write_text(json.dumps(results(throughput=pair(2, 1))))
    assert tables.main() == 0
    assert "2.00x" in (tmp_path / "README.md").read_text()
    assert (folder / "a.svg").exists()


def test_picture(tmp_path):
    """The same bytes each time, without a date; a bar for each implementation of a line, none for other batches."""
    found = [results(throughput=[*pair(8, 2), *pair(6, 3, batch=8)])]
    for name in ("a.svg", "b.svg"):
        tables.draw(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    picture = ElementTree.parse(tmp_path / "a.svg")
    description = "AMD EPYC, swin_l base, ave, infer, float32: reference 8 ms, fast 2 ms"
    assert picture.find(f".//{DESCRIPTION}").text == description
    assert tables.bars(found) == {"AMD EPYC": {"swin_l base, ave\ninfer, float32": {"reference": (8, 1), "fast": (2, 0.25)}}}
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()

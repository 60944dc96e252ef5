"""The comparison of results: the noise rule, files, and commits of a repository made for the test, with a benchmark that only
writes down numbers."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import textwrap

import pytest

ORIGIN = {"device": "a machine", "threads": 2, "commit": "0123456", "versions": {"torch": "2.11.0"}}


@pytest.fixture
def compare(scripts):
    return importlib.import_module("compare")


def throughput(impl="fast", ms=(99.0, 100.0, 101.0), peak=1000.0, **more):
    times = dict(zip(("p20_ms", "p50_ms", "p80_ms"), ms, strict=True))
    labels = {"arch": "swin_l", "adapters": "base", "task": "ave", "batch_size": 1, "dtype": "float32", "phase": "infer"}
    return labels | {"impl": impl, "rounds": 5, "peak_mb": peak} | times | more


def operator(graph_ms=(0.99, 1.0, 1.01), peak=10.0, **more):
    labels = {"op": "gelu", "provider": "fast", "mode": "fwd", "shape": "small", "dtype": "float32"}
    return labels | {"host_ms": None, "gpu_cold_ms": [1.9, 2.0, 2.1], "graph_ms": graph_ms, "peak_extra_mb": peak} | more


@pytest.fixture
def run(compare, tmp_path, monkeypatch, capsys):
    """`run(old, new)`: compare two files with these parts; returns the status and what is said, without line breaks."""

    monkeypatch.setenv("COLUMNS", "200")

    def command(old, new, **origin):
        for name, parts, changes in (("old", old, {}), ("new", new, origin)):
            (tmp_path / f"{name}.json").write_text(json.dumps({"origin": ORIGIN | changes, **parts}))
        return said(lambda: compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]))

    def said(call):
        try:
            status = call()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, " ".join((captured.out + captured.err).split())

    command.said = said
    return command


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((100, 0), (103, 0), "same"),
        ((100, 0), (103.1, 0), "worse"),
        ((100, 0), (97, 0), "same"),
        ((100, 0), (96.9, 0), "better"),
        ((100, 5), (110, 1), "same"),  # twice the larger spread, of either side
        ((100, 1), (110, 5), "same"),
        ((100, 5), (110.1, 5), "worse"),
        ((100, 5), (89.9, 5), "better"),
        ((100, 1), (102.5, 1), "same"),  # beyond the spread, but not beyond 3 %
        ((0, 0), (0.1, 0), "worse"),
        ((100, None), (300, 0), "one round"),
        ((100, 0), (300, None), "one round"),
    ],
)
def test_noise_rule(compare, old, new, verdict):
    assert compare.judge(compare.Measurement(*old), compare.Measurement(*new)) == verdict


def test_a_change_must_show_in_both_runs(compare):
    def verdict(*news):
        pairs = [(compare.Measurement(100, 1), compare.Measurement(new, 1)) for new in news]
        return compare.Change(("", "", ""), pairs).verdict

    assert [verdict(110, 110), verdict(110, 100), verdict(110, 90), verdict(90, 90)] == ["worse", "same", "same", "better"]


def test_equal_files(run):
    parts = {"throughput": [throughput()], "operators": [operator()]}
    status, text = run(parts, parts)
    assert status == 0
    assert "0 worse, 0 better, 5 same, 0 one round" in text
    assert "throughput swin_l base ave 1 float32 infer fast p50_ms 100 100 1.000 same" in text


@pytest.mark.parametrize(
    ("part", "old", "new", "field"),
    [
        ("throughput", throughput(), throughput(ms=(103, 104.1, 105)), "p50_ms"),
        ("throughput", throughput(), throughput(peak=1031), "peak_mb"),
        ("operators", operator(), operator(graph_ms=(1.04, 1.05, 1.06)), "graph_ms"),
        ("operators", operator(), operator(gpu_cold_ms=[2.4, 2.5, 2.6]), "gpu_cold_ms"),
        ("operators", operator(peak=0), operator(), "peak_extra_mb"),
        ("scaling", throughput(axis="batch", value=4), throughput(axis="batch", value=4, peak=1031), "peak_mb"),
    ],
)
def test_what_became_worse_fails(run, part, old, new, field):
    status, text = run({part: [old]}, {part: [new]})
    assert status == 1
    assert "1 worse, 0 better" in text
    assert re.search(rf" {field} \S+ \S+ \S+ worse", text)
    assert run({part: [new]}, {part: [old]})[0] == 0


def test_one_worse_shape_is_enough(run):
    old = [throughput(batch_size=size) for size in range(1, 6)]
    new = [throughput(batch_size=size, ms=(49, 50, 51)) for size in range(1, 5)]
    status, text = run({"throughput": old}, {"throughput": [*new, throughput(batch_size=5, ms=(119, 120, 121))]})
    assert status == 1
    assert "1 worse, 4 better" in text


def test_one_round_tells_nothing_of_time(run):
    status, text = run({"throughput": [throughput()]}, {"throughput": [throughput(ms=(200, 200, 200), rounds=1)]})
    assert status == 0
    assert "2.000 one round" in text


def test_what_one_side_lacks_is_listed(run):
    gone, added = throughput("reference"), throughput("compiled")
    stopped = throughput("fast_graph", ms=(None, None, None), peak=None, rounds=0, stopped="memory: no more")
    old = {"throughput": [throughput(), gone, throughput("fast_graph")], "operators": [operator()]}
    status, text = run(old, {"throughput": [throughput(), added, stopped], "operators": [operator(graph_ms=None)]})
    assert status == 0
    name = "throughput swin_l base ave 1 float32 infer"
    assert f"only in old: {name} reference p50_ms" in text
    assert f"only in new: {name} compiled p50_ms" in text
    assert f"only in old: {name} fast_graph peak_mb" in text
    assert "only in old: operators gelu fast fwd small float32 graph_ms" in text
    assert text.count("only in") == 7


def test_refusals(run, compare, tmp_path):
    parts = {"throughput": [throughput()]}
    refused = [
        (run(parts, {"throughput": [throughput("compiled")]}), "without a row in common"),
        (run(parts, parts, device="another"), "different machines: a machine, threads: 2; another, threads: 2"),
        (run(parts, parts, threads=1), "different machines"),
    ]
    good, bad = tmp_path / "old.json", tmp_path / "bad.json"
    for text, said in ((b"[]", "got a list"), (b"{", "cannot be read"), (b"\xff", "cannot be read")):
        bad.write_bytes(text)
        refused.append((run.said(lambda: compare.main([str(good), str(bad)])), said))
    refused.append((run.said(lambda: compare.main([str(good), str(tmp_path / "no.json")])), "cannot be read"))
    refused.append((run.said(lambda: compare.main([str(good), str(good), "--", "--steps", "1"])), "got a benchmark to run"))
    for (status, text), said in refused:
        assert status == 2, text
        assert said in text


def test_a_new_driver_is_no_other_machine(run):
    parts = {"throughput": [throughput()]}
    assert run(parts, parts, device="a machine, driver 570.1")[0] == 0


BENCHMARK = """
    import json, os, sys, stgcma_fast

    with open({log!r}, "a") as log:
        print(os.getcwd(), *sys.argv[1:-2], file=log)
    assert sys.argv[-2] == "--json"
    if stgcma_fast.MS is None:
        sys.exit("the benchmark broke down")
    ms = stgcma_fast.MS[sum(1 for line in open({log!r}) if line.split()[0] == os.getcwd()) - 1]
    row = {row!r} | dict(p20_ms=ms - 1, p50_ms=ms, p80_ms=ms + 1)
    json.dump(dict(origin={origin!r}, throughput=[row]), open(sys.argv[-1], "w"))
"""


class Repository:
    """A repository whose commits hold a package with numbers, and a benchmark that takes them for times."""

    def __init__(self, folder):
        self.folder, self.log = folder / "repository", folder / "log"
        (self.folder / "benchmarks").mkdir(parents=True)
        (self.folder / "stgcma_fast").mkdir()
        benchmark = textwrap.dedent(BENCHMARK).format(log=str(self.log), row=throughput(), origin=ORIGIN)
        (self.folder / "benchmarks" / "throughput.py").write_text(benchmark)
        self.git("init", "--quiet")

    def git(self, *args):
        author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        git = ("git", "-C", self.folder, *author, *args)
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout

    def commit(self, name, ms):
        """A commit at which the two runs of the benchmark take so long."""
        (self.folder / "stgcma_fast" / "__init__.py").write_text(f"MS = {ms}\n")
        self.git("add", ".")
        self.git("commit", "--quiet", "--no-verify", "-m", name)
        self.git("tag", name)

    def worktrees(self):
        return self.git("worktree", "list", "--porcelain").count("worktree ")


@pytest.fixture
def repository(compare, tmp_path, monkeypatch):
    made = Repository(tmp_path)
    monkeypatch.setattr(compare, "ROOT", made.folder)
    made.commit("before", (100, 101))
    return made


@pytest.mark.parametrize(
    ("ms", "status", "verdict"),
    [((120, 121), 1, "worse"), ((120, 101), 0, "same"), ((80, 81), 0, "better")],
    ids=["worse", "once", "better"],
)
def test_two_commits(run, compare, repository, ms, status, verdict):
    """Each is measured with its own package, old, new, new, old; then nothing of it is left."""
    repository.commit("after", ms)
    found, text = run.said(lambda: compare.main(["before", "after", "--", "benchmarks/throughput.py", "--arch", "swin_b"]))
    assert found == status, text
    assert f"p50_ms 100 {ms[0]} {ms[0] / 100:.3f} {verdict} 101 {ms[1]} {ms[1] / 101:.3f}" in text
    ran = [line.split(maxsplit=1) for line in repository.log.read_text().splitlines()]
    assert [(folder.rsplit("/", 1)[1], args) for folder, args in ran] == [
        (name, "--arch swin_b") for name in ("old", "new", "new", "old")
    ]
    assert repository.worktrees() == 1


def test_options_alone_are_those_of_throughput(run, compare, repository):
    for command, args in ((["--", "--steps", "3"], "--steps 3"), ([], "--arch swin_l")):
        repository.log.unlink(missing_ok=True)
        assert run.said(lambda command=command: compare.main(["before", "before", *command]))[0] == 0
        assert [line.split(maxsplit=1)[1] for line in repository.log.read_text().splitlines()] == 4 * [args]


def test_a_benchmark_that_fails_leaves_no_worktree(run, compare, repository):
    repository.commit("broken", None)
    status, text = run.said(lambda: compare.main(["before", "broken"]))
    assert status == 2
    assert "ended with status 1 at new: the benchmark broke down" in text
    assert repository.worktrees() == 1


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interruption_leaves_no_worktree(compare, repository, monkeypatch, number, error):
    def interrupted(*args):
        assert repository.worktrees() == 3
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(compare, "measure", interrupted)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores it
    try:
        with pytest.raises(error):
            compare.main(["before", "before"])
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert repository.worktrees() == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unknown_commit(run, compare, repository):
    status, text = run.said(lambda: compare.main(["before", "nowhere"]))
    assert status == 2
    assert "rev-parse --verify nowhere^{commit}" in text


def test_another_package_is_not_measured(run, compare, repository):
    """The one that is installed must not stand in for that of a commit."""
    repository.git("rm", "-r", "--quiet", "stgcma_fast")
    repository.git("commit", "--quiet", "--no-verify", "-m", "gone")
    status, text = run.said(lambda: compare.main(["before", "HEAD"]))
    assert status == 2
    assert "stgcma_fast would be imported from" in text
    assert repository.worktrees() == 1

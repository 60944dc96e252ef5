"""Has anything become slower or larger? Compares two result files, or two commits, each with its own benchmark.

Two files: rows of the same part and keys are matched; the parts are throughput, operators and scaling. Two commits, tags or
branches: both are checked out beside each other, a benchmark is run in each, in the order old, new, new, old, and only what
shows in both halves counts. What follows `--` is what Python runs, a script or a module; options alone are throughput.py's:

    compare.py HEAD~3 main -- --arch swin_b --steps 5
    compare.py HEAD~3 main -- benchmarks/scaling.py --arch clip_b16
    compare.py HEAD~3 main -- -m pytest benchmarks/ops

A change counts when it exceeds both 3 % and twice the spread from p20 to p80, the larger of the two sides'. Exits 1 if a time
or a peak of memory has become worse, 2 where nothing can be compared.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from harness import ROOT, progress_bar
from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table
from scaling import KEYS as SCALING_KEYS

# What identifies a row of each part.
KEYS = {
    "throughput": ("arch", "adapters", "task", "batch_size", "dtype", "phase", "impl"),
    "operators": ("op", "provider", "mode", "shape", "dtype"),
    "scaling": SCALING_KEYS,
}
TIMES = ("host_ms", "gpu_cold_ms", "graph_ms")  # each [p20, p50, p80]
PEAKS = ("peak_mb", "peak_extra_mb")
THROUGHPUT = "benchmarks/throughput.py"
LEAST_CHANGE = 0.03


class Measurement(NamedTuple):
    """A median, and the distance from p20 to p80; None where that is not known, after a single round."""

    value: float
    spread: float | None


class Change(NamedTuple):
    """One measurement in both: a (old, new) pair for every time it was taken."""

    name: tuple[str, str, str]  # part, row, what was measured
    pairs: list[tuple[Measurement, Measurement]]

    @property
    def verdict(self) -> str:
        """What all pairs agree on."""
        verdicts = {judge(old, new) for old, new in self.pairs}
        return verdicts.pop() if len(verdicts) == 1 else "same"


def judge(old: Measurement, new: Measurement) -> str:
    """ "worse" or "better" where the change exceeds the noise, "same" elsewhere, "one round" where the noise is not known."""
    if old.spread is None or new.spread is None:
        return "one round"
    change = new.value - old.value
    if abs(change) <= max(LEAST_CHANGE * old.value, 2 * max(old.spread, new.spread)):
        return "same"
    return "worse" if change > 0 else "better"


def measurements(results: Mapping[str, Any]) -> dict[tuple[str, str, str], Measurement]:
    """Times and peaks of all rows, by part, row and field. What was not measured is left out."""
    found = {}
    for part, keys in KEYS.items():
        for row in results.get(part, []):
            name = part, " ".join(str(row.get(key)) for key in keys)
            times = {field: row.get(field) for field in TIMES}
            if row.get("p50_ms") is not None:
                times["p50_ms"] = [row["p20_ms"], row["p50_ms"], row["p80_ms"]]
            for field, quantiles in times.items():
                if quantiles is not None:
                    low, middle, high = quantiles
                    found[(*name, field)] = Measurement(middle, None if row.get("rounds") == 1 else high - low)
            found |= {(*name, field): Measurement(row[field], 0.0) for field in PEAKS if row.get(field) is not None}
    return found


def load(file: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    try:
        results = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(results, dict) or "origin" not in results:
        raise ValueError(f"{file}: got a {type(results).__name__}, expected an object with an origin and rows by part")
    return results


def compare(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[list[Change], list[str]]:
    """Match the measurements of old and new results.

    Args:
        pairs: old and new results, a pair for every time both were measured.

    Returns:
        What is in all of them, in the order of the first; and lines that name what is not.

    Raises:
        ValueError: the results come from different machines, or have nothing in common.
    """
    origins = [results["origin"] for pair in pairs for results in pair]
    # Behind the name of a GPU stands its driver, which may be what is compared.
    machines = [f"{origin['device'].split(', driver')[0]}, threads: {origin.get('threads')}" for origin in origins]
    for machine in machines[1:]:
        if machine != machines[0]:
            raise ValueError(f"got results of different machines: {machines[0]}; {machine}")
    taken = [tuple(map(measurements, pair)) for pair in pairs]
    common = [name for name in taken[0][0] if all(name in side for pair in taken for side in pair)]
    if not common:
        raise ValueError(f"got results without a row in common, of the parts {', '.join(KEYS)}")
    changes = [Change(name, [(old[name], new[name]) for old, new in taken]) for name in common]
    olds, news = (dict.fromkeys(name for pair in taken for name in pair[side]) for side in (0, 1))
    missing = [f"only in old: {' '.join(name)}" for name in olds if name not in news]
    missing += [f"only in new: {' '.join(name)}" for name in news if name not in olds]
    return changes, missing


def git(*args: str | Path) -> str:
    """What a git command in this repository says.

    Raises:
        ValueError: it failed.
    """
    run = subprocess.run(("git", "-C", ROOT, *args), capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"git {' '.join(map(str, args))}: {run.stderr.strip()}")
    return run.stdout.strip()


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[None]:
    """A commit, checked out into a new folder, for as long as the context lasts."""
    git("worktree", "add", "--detach", folder, commit)
    try:
        yield
    finally:
        git("worktree", "remove", "--force", folder)


def measure(tree: Path, command: Sequence[str], file: Path) -> dict[str, Any]:
    """Run a benchmark in a worktree, with the package of that worktree.

    Args:
        tree: the worktree.
        command: what Python runs there: a script or a module, and options.
        file: where its results go.

    Raises:
        ValueError: another package would be imported, or the benchmark fails or leaves no results.
    """
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path}
    find = "import importlib.util; print(importlib.util.find_spec('stgcma_fast').origin)"
    # From outside of the worktree: what counts is not the folder in which Python starts.
    found = subprocess.run([sys.executable, "-c", find], env=env, cwd=tree.parent, capture_output=True, text=True)
    package = found.stdout.strip()
    if Path(package).parent != tree / "stgcma_fast":
        raise ValueError(f"stgcma_fast would be imported from {package or found.stderr.strip()}, expected {tree}/stgcma_fast")
    run = subprocess.run(
        [sys.executable, *command, "--json", str(file)],
        env=env,
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        tail = "\n".join(run.stdout.splitlines()[-20:])
        raise ValueError(f"{' '.join(command)} ended with status {run.returncode} at {tree.name}:\n{tail}")
    return load(file)


def measure_both(old: str, new: str, command: Sequence[str], console: Console) -> list[tuple[dict, dict]]:
    """Run a benchmark at two commits, in the order old, new, new, old.

    Returns:
        The results, (old, new) of each half.

    Raises:
        ValueError: git refuses, as where there is no such commit; or what `measure` raises.
    """
    commits = [git("rev-parse", "--verify", f"{ref}^{{commit}}") for ref in (old, new)]
    with ExitStack() as stack:
        # Who ends this command by a signal, as `timeout` does, must not find the worktrees either.
        ended = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, ended)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-"))).resolve()
        trees = folder / "old", folder / "new"
        for commit, tree in zip(commits, trees, strict=True):
            stack.enter_context(worktree(commit, tree))
        progress = stack.enter_context(progress_bar(console))
        task = progress.add_task("", total=4)
        results: dict[Path, list[dict]] = {tree: [] for tree in trees}
        for number, tree in enumerate((*trees, *trees[::-1])):
            progress.update(task, description=f"{tree.name} {len(results[tree]) + 1}")
            results[tree].append(measure(tree, command, folder / f"{number}.json"))
            progress.advance(task)
    return list(zip(*results.values(), strict=True))


def print_table(changes: Sequence[Change], console: Console) -> None:
    """All that was compared, for people; of two runs, both."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("row", overflow="fold")
    for name in ("measured", "old", "new", "new/old", "verdict"):
        table.add_column(name, justify="left" if name in ("measured", "verdict") else "right", no_wrap=True)
    colours = {"worse": "red", "better": "green"}
    for change in changes:
        part, row, field = change.name
        olds, news = ("\n".join(f"{pair[side].value:.5g}" for pair in change.pairs) for side in (0, 1))
        ratios = "\n".join(f"{new.value / old.value:.3f}" if old.value else "-" for old, new in change.pairs)
        verdict = change.verdict
        table.add_row(f"{part} {row}", field, olds, news, ratios, verdict, style=colours.get(verdict))
    console.print(table)


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="compare.py", usage="%(prog)s [-h] old new [-- COMMAND ...]", description=__doc__)
    p.add_argument("old", help="a results file, or a commit of this repository")
    p.add_argument("new", help="what is held against it, of the same kind")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    argv, command = argv[:at], argv[at + 1 :]
    p = parser()
    args = p.parse_args(argv)
    console = Console()
    files = [Path(name) for name in (args.old, args.new)]
    try:
        if any(file.is_file() or file.suffix == ".json" for file in files):
            if command:
                p.error(f"two files are compared as they are; got a benchmark to run: {' '.join(command)}")
            pairs = [tuple(map(load, files))]
        else:
            if not command:
                command = ["--arch", "swin_l"]
            if command[0].startswith("--"):
                command = [THROUGHPUT, *command]
            pairs = measure_both(args.old, args.new, command, console)
        changes, missing = compare(pairs)
    except ValueError as error:
        p.error(str(error))
    for name, results in zip(("old", "new"), pairs[0], strict=True):
        origin = results["origin"]
        console.print(f"{name}: commit {origin['commit']}, torch {origin['versions']['torch']}, {origin['device']}")
    print_table(changes, console)
    for line in missing:
        console.print(line)
    verdicts = [change.verdict for change in changes]
    console.print(", ".join(f"{verdicts.count(name)} {name}" for name in ("worse", "better", "same", "one round")))
    return 1 if "worse" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write what benchmarks/results/*.json hold into the tables of README.md and docs/performance.md, and into a picture.

The results are the only source: of each device and measurement the newest file counts. A table stands between two marks, as
`<!-- operators -->` and `<!-- /operators -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = RESULTS / "throughput.svg"
DOCUMENTS = ("README.md", "docs/performance.md", "docs/data.md")
MARK = re.compile(r"<!-- (/?[a-z]+) -->")

MODELS = ("swin_l", "clip_l14", "swin_b", "clip_b16")
PHASES = ("infer", "train")
DTYPES = ("float32", "bfloat16", "float16")
# Implementation -> heading and colour.
IMPLEMENTATIONS = {
    "reference": ("reference", "#9aa0a6"),
    "compiled": ("compiled", "#e0a458"),
    "fast": ("fast", "#1f77b4"),
    "fast_graph": ("fast, one graph", "#0b3d66"),
    "fast_compiled": ("fast, compiled", "#7fb2d9"),
}
COLUMNS = {"cpu": ("reference", "fast"), "cuda": ("reference", "compiled", "fast", "fast_graph")}
# What the README promises, measured or not.
PROMISED_GPU = "NVIDIA H200"
PROMISED = [(arch, "base", "ave", batch, phase, "bfloat16") for arch in MODELS for batch in (1, 8) for phase in PHASES]
UNMEASURED = "not measured yet"
UNTESTED = "†"

Row = dict[str, Any]
Line = dict[str, Row]  # by implementation or provider
Results = list[dict[str, Any]]


def load(folder: Path) -> Results:
    """All results files of a folder, the newest first.

    Raises:
        ValueError: one was measured at no commit, or with files that differ from it.
    """
    results = []
    for file in folder.glob("*.json"):
        found = json.loads(file.read_text())
        commit = found["origin"]["commit"]
        if commit is None or commit.endswith("-dirty"):
            raise ValueError(f"{file} was measured at commit {commit}; tables are made of clean commits' results alone")
        results.append(found)
    return sorted(results, key=lambda found: found["origin"]["date"], reverse=True)


def newest(results: Results, part: str, group: Sequence[str], line: Sequence[str], column: str) -> dict[str, dict[tuple, Line]]:
    """The rows of a part by device, then by their values under ``group`` and ``line``, then under ``column``.

    Rows that are equal under ``group`` come from one file, so that what is compared was measured together.
    """
    devices: dict[str, dict[tuple, dict[tuple, Line]]] = {}
    for found in results:
        groups: dict[tuple, dict[tuple, Line]] = {}
        for row in found.get(part, []):
            own, key = (tuple(row[name] for name in names) for names in (group, line))
            groups.setdefault(own, {}).setdefault((*own, *key), {})[row[column]] = row | {"origin": found["origin"]}
        if groups:
            device = found["origin"]["device"].split(",")[0]
            devices[device] = groups | devices.get(device, {})
    return {device: {key: ln for lines in groups.values() for key, ln in lines.items()} for device, groups in devices.items()}


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]], names: int) -> str:
    """A table; all columns but the first ``names`` hold numbers."""
    rule = ["---"] * names + ["--:"] * (len(headings) - names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def untested(line: Line) -> bool:
    """Whether tests are not known to have passed where a line was measured."""
    return any(row["origin"]["tests_green"] is not True for row in line.values())


def marked(name: str, line: Line) -> str:
    return f"{name} {UNTESTED}" if untested(line) else name


def origins(lines: Mapping[tuple, Line]) -> str:
    """Where a device's lines, each of which begins with what it is about, come from."""
    machines: dict[str, dict[str, dict[str, None]]] = {}
    for (subject, *_), line in lines.items():
        for row in line.values():
            origin = row["origin"]
            threads = f", {origin['threads']} threads" if origin["threads"] else ""
            machine = f"{origin['device']}{threads}, PyTorch {origin['versions']['torch']}"
            machines.setdefault(machine, {}).setdefault(origin["commit"], {})[subject] = None
    texts = []
    for machine, commits in machines.items():
        several = len(commits) > 1
        at = [commit + (f" ({', '.join(subjects)})" if several else "") for commit, subjects in commits.items()]
        texts.append(f"{machine}, commit {', '.join(at)}.")
    if any(map(untested, lines.values())):
        texts.append(f"{UNTESTED} No passed run of all tests is on record for the commit.")
    return " ".join(texts)


def milliseconds(x: float | None) -> str:
    return "-" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.3g}"


# Throughput


def throughput_lines(results: Results) -> dict[str, dict[tuple, Line]]:
    """Lines (model, adapters, task, clips, phase, dtype) by device, processors first, with what is promised even if empty."""
    found = newest(results, "throughput", ("arch", "adapters", "task", "batch_size", "phase"), ("dtype",), "impl")
    found[PROMISED_GPU] = {key: {} for key in PROMISED} | found.get(PROMISED_GPU, {})

    def order(key: tuple) -> tuple:
        arch, adapters, task, batch, phase, dtype = key
        return MODELS.index(arch), adapters, task, batch, PHASES.index(phase), DTYPES.index(dtype)

    devices = sorted(found, key=lambda device: (not on_cpu(found[device]), device))
    return {device: {key: found[device][key] for key in sorted(found[device], key=order)} for device in devices}


def on_cpu(lines: Mapping[tuple, Line]) -> bool:
    return any(row["device"] == "cpu" for line in lines.values() for row in line.values())


def faster(line: Line) -> Row | None:
    """The fast model, in the faster of the forms that have a column."""
    return min((line[name] for name in ("fast", "fast_graph") if name in line), key=lambda row: row["p50_ms"], default=None)


def throughput(results: Results) -> str:
    """A table for each device: medians of all implementations, and what the fast model gains."""
    text = [
        "Times are medians of a step of the whole batch, `infer` a forward, `train` a forward, loss, backward and optimizer "
        "step; clips/s, speedup (over the reference in the dtype beside it) and share of the matmul peak (FLOP/s of the "
        "reference's products over those of the fastest product measured) are of fast, on a GPU of the faster of its forms; "
        "peak MB is the most memory held, weights included, by fast and by the reference."
    ]
    for device, lines in throughput_lines(results).items():
        impls = COLUMNS["cpu" if on_cpu(lines) else "cuda"]
        headings = ["model", "batch", "phase", "dtype", *(f"{IMPLEMENTATIONS[name][0]} ms" for name in impls)]
        headings += ["clips/s", "speedup", "peak MB", "of matmul peak"]
        table = markdown(headings, (throughput_cells(key, line, impls) for key, line in lines.items()), 4)
        measured = {key: line for key, line in lines.items() if line}
        text += [f"**{device}**", table, origins(measured) if measured else f"{device}: {UNMEASURED}."]
    return "\n\n".join(text)


def throughput_cells(key: tuple, line: Line, impls: Sequence[str]) -> list[str]:
    arch, adapters, task, batch, phase, dtype = key
    cells = [marked(f"{arch} {adapters}, {task}", line), str(batch), phase, dtype]
    cells += [milliseconds(line[name]["p50_ms"]) if name in line else UNMEASURED for name in impls]
    best = faster(line)
    if best is None:
        return [*cells, *["-"] * 4]
    gain = f"{best['speedup']:.2f}x {best['speedup_over'].removeprefix('reference ')}" if best["speedup"] else "-"
    peaks = [line[name]["peak_mb"] if name in line else None for name in ("fast", "reference")]
    memory = "-" if None in peaks else "{:.0f} of {:.0f}, {:.0%}".format(*peaks, peaks[0] / peaks[1])
    return [*cells, f"{best['clips_per_s']:.3g}", gain, memory, f"{best['peak_share']:.0%}"]


def bars(results: Results) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """What the picture shows, steps of one clip: by device, line and implementation milliseconds, and over the reference's."""
    shown: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for device, lines in throughput_lines(results).items():
        for (arch, adapters, task, batch, phase, dtype), line in lines.items():
            if batch != 1 or faster(line) is None or "reference" not in line or not line["reference"]["speedup"]:
                continue
            base = line["reference"]["p50_ms"] * line["reference"]["speedup"]  # of the dtype that speedups are over
            title = f"{marked(f'{arch} {adapters}, {task}', line)}\n{phase}, {dtype}"
            times = {name: line[name]["p50_ms"] for name in IMPLEMENTATIONS if name in line}
            shown.setdefault(device, {})[title] = {name: (ms, ms / base) for name, ms in times.items()}
    return shown


def described(results: Results) -> str:
    """What the picture shows, as text that it carries: pictures of one content may differ between versions of matplotlib."""
    return "; ".join(
        f"{device}, {title.replace(chr(10), ', ')}: "
        + ", ".join(f"{IMPLEMENTATIONS[name][0]} {milliseconds(ms)} ms" for name, (ms, _) in shares.items())
        for device, lines in bars(results).items()
        for title, shares in lines.items()
    )


def draw(results: Results, file: Path) -> None:
    """The picture: a panel for each device, a group of bars for each line."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    devices = bars(results)
    heights = [sum(len(shares) + 1 for shares in lines.values()) for lines in devices.values()]
    with matplotlib.rc_context({"svg.hashsalt": "throughput", "font.size": 9}):
        figure = Figure(figsize=(8, 0.8 + 0.5 * len(heights) + 0.22 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        for panel, (device, lines) in zip(panels, devices.items(), strict=True):
            ticks, y = {}, 0
            for title, shares in lines.items():
                ticks[title] = y + (len(shares) - 1) / 2
                for name, (ms, share) in shares.items():
                    panel.barh(y, share, color=IMPLEMENTATIONS[name][1])
                    gain = "" if name == "reference" else f", {1 / share:.2f}x"
                    panel.annotate(
                        f"{milliseconds(ms)} ms{gain}", (share, y), (3, 0), textcoords="offset points", va="center", fontsize=8
                    )
                    y += 1
                y += 1
            panel.set_yticks([*ticks.values()], [*ticks])
            panel.invert_yaxis()
            panel.set_title(f"{device}, one clip", loc="left", fontweight="bold")
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.15)
        panels[-1].set_xlabel("time of a step, as a share of the reference's: shorter is faster")
        used = [name for name in IMPLEMENTATIONS if any(name in shares for ln in devices.values() for shares in ln.values())]
        handles = [Patch(color=IMPLEMENTATIONS[name][1], label=IMPLEMENTATIONS[name][0]) for name in used]
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
        figure.savefig(file, metadata={"Date": None, "Description": described(results)})


# The other parts


def section(intro: str, devices: Mapping[str, dict[tuple, Line]], table: Callable[[dict[tuple, Line], list[str]], str]) -> str:
    """For each device a table, made of its lines and the names of their columns, and where it comes from."""
    text = [intro]
    for device, lines in devices.items():
        columns = [*dict.fromkeys(name for line in lines.values() for name in line)]
        text += [f"**{device}**", table(lines, columns), origins(lines)]
    return "\n\n".join(text if devices else [f"{UNMEASURED.capitalize()}."])


def operators(results: Results) -> str:
    """The median of every provider."""

    def table(lines: dict[tuple, Line], providers: list[str]) -> str:
        cells = []
        for (op, mode, shape, dtype), line in lines.items():
            times = {name: row.get("graph_ms") or row.get("gpu_cold_ms") or row.get("host_ms") for name, row in line.items()}
            texts = {name: "failed" if ms is None else milliseconds(ms[1]) for name, ms in times.items()}
            roof = line.get("fast", {}).get("roof_pct")
            cells.append([marked(op, line), shape, mode, dtype, *(texts.get(name, "-") for name in providers)])
            cells[-1].append("-" if roof is None else f"{roof:.0f}%")
        return markdown(["op", "shape", "mode", "dtype", *providers, "fast of roof"], cells, 4)

    return section(
        "Medians in milliseconds, on a GPU with a cold cache and where possible as a CUDA graph; of roof: the time that the "
        "least bytes take at the machine's copy rate, or the products at its matmul rate if that is longer, over fast's.",
        newest(results, "operators", ("op", "mode", "shape", "dtype"), (), "provider"),
        table,
    )


def scaling(results: Results) -> str:
    """The exponents of time and memory."""
    exponents = {"time_exponent": "time", "memory_exponent": "memory"}

    def table(lines: dict[tuple, Line], impls: list[str]) -> str:
        cells = []
        for (arch, adapters, axis, dtype, phase), line in lines.items():
            found = [line[name][field] if name in line else None for field in exponents for name in impls]
            cells.append([marked(f"{arch} {adapters}", line), axis, phase, dtype])
            cells[-1] += ["-" if exponent is None else f"{exponent:.2f}" for exponent in found]
        headings = [f"{what}, {IMPLEMENTATIONS[name][0]}" for what in exponents.values() for name in impls]
        return markdown(["model", "what grows", "phase", "dtype", *headings], cells, 4)

    return section(
        "Exponents of a step's time, and of its memory beyond weights and optimizer state, over the number of tokens.",
        newest(results, "scaling_exponents", ("arch", "adapters", "axis", "dtype", "phase"), (), "impl"),
        table,
    )


def profile(results: Results) -> str:
    """Where a step's time goes, by class of operator."""

    def table(lines: dict[tuple, Line], impls: list[str]) -> str:
        cells = []
        for (arch, adapters, batch, dtype, phase), line in lines.items():
            names = [marked(f"{arch} {adapters}", line), str(batch), phase, dtype]
            times: dict[str, dict[str, float]] = {}
            for impl, row in line.items():
                for part in row["by_class"]:  # a class has several directions
                    of_class = times.setdefault(part["class"], {})
                    of_class[impl] = of_class.get(impl, 0.0) + part["ms"]
            for name, by_impl in times.items():
                cells.append([*names, name, *(milliseconds(by_impl.get(impl)) for impl in impls)])
            for name, field in (("idle", "idle_ms"), ("a step without the profiler", "step_ms")):
                cells.append([*names, name, *(milliseconds(line.get(impl, {}).get(field)) for impl in impls)])
        return markdown(["model", "batch", "phase", "dtype", "class", *(f"{name} ms" for name in impls)], cells, 5)

    return section(
        "Milliseconds of one profiled step, on a GPU of its kernels, on the CPU of its operators.",
        newest(results, "profile", ("arch", "adapters", "batch_size", "dtype", "phase"), (), "impl"),
        table,
    )


def data(results: Results) -> str:
    """What reading a clip costs, by stage, and in a whole loader."""

    def table(lines: dict[tuple, Line], providers: list[str]) -> str:
        cells = []
        for (task, arch, media, phase, stage), line in lines.items():
            times = {name: row.get("p50_ms") or 1e3 / row["clips_per_s"] for name, row in line.items()}
            cells.append([marked(f"{task}, {arch}", line), media, phase, stage])
            cells[-1] += [milliseconds(times.get(name)) for name in providers]
            cells[-1].append(f"{times['plain'] / times['pyav']:.2f}x" if {"plain", "pyav"} <= times.keys() else "-")
        headings = [*(f"{name} ms" for name in providers), "pyav over plain"]
        return markdown(["data set", "media", "phase", "stage", *headings], cells, 4)

    return section(
        "Milliseconds a clip: of a stage the median, with one thread; of a loader the time over the clips it handed over.",
        newest(results, "data", ("task", "arch", "media", "phase"), ("stage",), "provider"),
        table,
    )


def fit(results: Results) -> str:
    """Whole trainings, beside their train steps alone."""

    def share(x: float | None) -> str:
        return "-" if x is None else f"{x:.0%}"

    def table(lines: dict[tuple, Line], impls: list[str]) -> str:
        cells = []
        for (arch, adapters, task, batch, dtype), line in lines.items():
            row = line["fit"]
            cells.append([marked(f"{arch} {adapters}, {task}", line), str(batch), dtype, row["backend"]])
            cells[-1] += [milliseconds(row["p50_ms"]), f"{row['clips_per_s']:.3g}"]
            for name in ("fast", "fast_graph"):
                cells[-1].append(share(row["clips_per_s"] / line[name]["clips_per_s"]) if name in line else "-")
            cells[-1] += [share(row["waiting"]), share(row["gpu_busy"])]
            cells[-1].append("-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}")
        headings = ["model", "batch", "dtype", "decoding", "step ms", "clips/s"]
        headings += [f"of {IMPLEMENTATIONS[name][0]}" for name in ("fast", "fast_graph")]
        return markdown([*headings, "waiting for data", "GPU busy", "peak MB"], cells, 4)

    return section(
        "`stgcma-fast fit` on synthetic clips, H.264 in mp4: the median of a step; clips/s, also as a share of what the same "
        "model does in train steps alone, without data; shares of the time in which the trainer had no batch to go on with, "
        "and in which the GPU ran any kernel; the most memory held.",
        newest(results, "fit", ("arch", "adapters", "task", "batch_size", "dtype"), (), "impl"),
        table,
    )


GENERATORS: dict[str, Callable[[Results], str]] = {
    "throughput": throughput,
    "operators": operators,
    "scaling": scaling,
    "profile": profile,
    "data": data,
    "fit": fit,
}


def fill(text: str, results: Results, name: str) -> str:
    """``text``, a document called ``name``, with a new table between each pair of marks.

    Raises:
        ValueError: a mark without a table that belongs there, or without the one that closes it.
    """
    prose, *rest = MARK.split(text)
    parts = [prose]
    while rest:
        mark, _, *rest = rest
        if mark not in GENERATORS:
            raise ValueError(f"{name}: nothing is made for the mark <!-- {mark} -->, there are {', '.join(GENERATORS)}")
        if not rest or rest[0] != f"/{mark}":
            raise ValueError(f"{name}: <!-- {mark} --> is not closed by <!-- /{mark} --> before the next mark or the end")
        _, prose, *rest = rest
        parts.append(f"<!-- {mark} -->\n{GENERATORS[mark](results)}\n<!-- /{mark} -->{prose}")
    return "".join(parts)


def main() -> int:
    """The command. Returns its exit status."""
    try:
        results = load(RESULTS)
        filled = {ROOT / name: fill((ROOT / name).read_text(), results, name) for name in DOCUMENTS if (ROOT / name).exists()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in filled.items():
        path.write_text(text)
    draw(results, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

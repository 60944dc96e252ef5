"""The targets that measure: what they run, in which order and within which limits. Nothing is measured here."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).resolve().parents[2]
SLOT = 600
GPU_TARGETS = ("bench-gpu", "bench-gpu-models", "bench-gpu-compiled", "bench-gpu-fit")


def make(*args, **options):
    return subprocess.run(["make", "-C", ROOT, "-o", "venv", *args], capture_output=True, text=True, **options)


def commands(target):
    """What a target runs: (limit in seconds or None, words)."""
    done = make("--no-print-directory", "-n", target, "BIN=bin", check=True)
    found = re.findall(r"(?:timeout (\d+) )?bin/python (.*?) \|\| failed=1;", done.stdout)
    assert len(found) == done.stdout.count("bin/python")
    return [(int(limit) if limit else None, shlex.split(words)) for limit, words in found]


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_a_target_fits_into_a_slot(target):
    limits = [limit for limit, _ in commands(target)]
    assert None not in limits
    assert sum(limits) <= SLOT


def test_order_on_a_gpu():
    """First what the README promises of swin_l, what takes long last; together every promised row."""
    texts = [" ".join(words) for _, words in commands("bench-gpu")]
    race = "benchmarks/throughput.py --arch swin_l --batch-size {} --impl reference fast fast_graph"
    ends = [race.format(1), race.format(8), "-m pytest benchmarks/ops", "benchmarks/profile.py", "benchmarks/throughput.py"]
    assert all(text.startswith(begin) for text, begin in zip(texts, ends, strict=True))
    measured = set()
    for target in GPU_TARGETS:
        for _, words in commands(target):
            if words[0].endswith("throughput.py"):
                named = {name: values.split() for name, values in re.findall(r"--([\w-]+) ([^-]+)", " ".join(words))}
                measured |= {(named["arch"][0], int(named["batch-size"][0]), impl) for impl in named["impl"]}
    assert measured == {(arch, batch, impl) for arch, _, _, batch, *_ in tables.PROMISED for impl in tables.COLUMNS["cuda"]}


@pytest.mark.parametrize("target", [*GPU_TARGETS, "bench-cpu"])
def test_options_are_known_and_results_kept(target, scripts, tmp_path):
    device = target.split("-")[1].replace("gpu", "cuda")
    for _, (*words, option, value, keep, file) in commands(target):
        assert (option, value, keep, file) == ("--device", device, "--json", "auto")
        if words[0] == "-m":  # it would ask for the device at once
            command = [sys.executable, *words, option, "cpu", keep, tmp_path / "rows.json", "--collect-only"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            script = importlib.import_module(Path(words[0]).stem)
            assert Path(script.__file__) == ROOT / words[0]
            script.parser().parse_args([*words[1:], option, value, keep, file])


def test_a_failure_stops_nothing_but_is_told(tmp_path):
    """Everything after it still runs, without Triton's interpreter, with the commit that was given."""
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$COMMIT ${{TRITON_INTERPRET-unset}} $*" >> {tmp_path}/log\ncase "$*" in *profile*) exit 3;; esac\n'
    )
    fake.chmod(0o755)
    done = make("bench-gpu", f"BIN={tmp_path}", "COMMIT=abcdef0", env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode != 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(commands("bench-gpu"))
    assert all(line.startswith("abcdef0 unset ") for line in lines)
    fake.write_text("#!/bin/sh\n")
    assert make("bench-gpu", f"BIN={tmp_path}").returncode == 0

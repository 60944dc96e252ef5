"""The console command."""

import importlib.metadata
import re
import subprocess
import sys
from importlib import import_module

import pytest

from stgcma_fast import cli
from stgcma_fast.data import check, commands, pack, synth
from stgcma_fast.data.errors import MediaError

SYNTH = ["data", "synth", "--task", "ave", "--out", "toy", "--clips", "5"]


@pytest.mark.parametrize("command", ["params", "report"])
def test_subcommands_run_their_module(command, monkeypatch):
    monkeypatch.setattr(import_module(cli.COMMANDS[command], "stgcma_fast"), "main", lambda: 7)
    assert cli.main([command]) == 7


def test_subcommands_of_data_run_their_module(monkeypatch):
    given = []
    monkeypatch.setattr(synth, "main", lambda args: given.append(args) or 7)
    assert cli.main([*SYNTH, "--seed", "3"]) == 7
    (args,) = given
    assert (args.task, args.out, args.clips, args.seed, args.codec) == ("ave", "toy", 5, 3, "h264")
    assert set(commands.COMMANDS) == {"synth", "check", "pack"}
    for module in (synth, check, pack):
        assert callable(module.main)


def test_help_teaches(capsys):
    pages = {
        (): ("beside those of the paper's Tables 2 to 5 and 7", "serves each operator here", "Make a synthetic data set"),
        ("params",): ("beside those of the paper's Tables 2 to 5 and 7",),
        ("report",): ("serves each operator here",),
        ("data",): ("stgcma-fast data synth --task ave --out toy", "synth", "check", "pack"),
        ("data", "synth"): ("Example: stgcma-fast data synth --task ave --out toy --clips 100", "finishes the work"),
        ("data", "check"): ("missing or broken",),
        ("data", "pack"): ("stgcma-fast data pack",),
    }
    for argv, parts in pages.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([*argv, "--help"])
        assert stop.value.code == 0
        page = " ".join(capsys.readouterr().out.split())
        for part in parts:
            assert part in page


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["bogus"],
        ["params", "--bogus"],
        ["data"],
        ["data", "bogus"],
        SYNTH[:-2],
        [*SYNTH, "--codec", "av1"],
        [*SYNTH, "--seed", "-1"],
    ],
)
def test_bad_calls_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MediaError("a.mp4", "it has no video track"), 1, "stgcma-fast: error: a.mp4: it has no video track\n"),
        (ValueError("clips: got 4"), 1, "stgcma-fast: error: clips: got 4\n"),
        (FileNotFoundError(2, "No such file", "a.mp4"), 1, "stgcma-fast: error: [Errno 2] No such file: 'a.mp4'\n"),
        (
            ModuleNotFoundError("No module named 'av'", name="av"),
            1,
            'stgcma-fast: error: av is not installed; pip install "stgcma-fast[data]"\n',
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_goes_wrong_is_one_line(error, status, line, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(synth, "main", fail)
    assert cli.main(SYNTH) == status
    assert capsys.readouterr().err == line


def test_other_missing_modules_are_a_fault_of_ours(monkeypatch):
    def fail(args):
        raise ModuleNotFoundError("No module named 'stgcma_fast.bogus'", name="stgcma_fast.bogus")

    monkeypatch.setattr(synth, "main", fail)
    with pytest.raises(ModuleNotFoundError, match="bogus"):
        cli.main(SYNTH)


def test_without_media_libraries_the_others_work(tmp_path):
    """Commands of data say how to install them."""
    code = """
        import importlib.abc, sys
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"av", "PIL", "torchvision", "torchaudio", "h5py", "webdataset", "nvidia"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        from stgcma_fast import cli
        sys.exit(cli.main(sys.argv[1:]))
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    kinds = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([sys.executable, "-c", code, "report"], check=False, **kinds)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([sys.executable, "-c", code, *SYNTH], check=False, **kinds)
    assert done.returncode == 1
    assert re.fullmatch(r'stgcma-fast: error: \w+ is not installed; pip install "stgcma-fast\[data\]"\n', done.stderr)
    assert not list(tmp_path.iterdir())


def test_entry_point_and_module():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="stgcma-fast")
    assert entry.load() is cli.main
    done = subprocess.run([sys.executable, "-m", "stgcma_fast.cli", "report"], check=True, capture_output=True, text=True)
    assert "av_adapter" in done.stdout

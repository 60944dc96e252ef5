"""The console command."""

import importlib.metadata
import subprocess
import sys

import pytest

from stgcma_fast import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_subcommands_run_their_module(command, monkeypatch):
    monkeypatch.setattr(cli.COMMANDS[command], "main", lambda: 7)
    assert cli.main([command]) == 7


def test_help_teaches(capsys):
    for argv in (["--help"], ["params", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("beside those of the paper's Tables 2, 5 and 7") == 2
    assert out.count("serves each operator here") == 2


@pytest.mark.parametrize("argv", [[], ["bogus"], ["params", "--bogus"]])
def test_bad_calls_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_entry_point_and_module():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="stgcma-fast")
    assert entry.load() is cli.main
    done = subprocess.run([sys.executable, "-m", "stgcma_fast.cli", "report"], check=True, capture_output=True, text=True)
    assert "av_adapter" in done.stdout

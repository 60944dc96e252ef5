"""The report of what is installed and what serves each operator."""

import subprocess
import sys

from stgcma_fast import report
from stgcma_fast.ops.dispatch import REGISTRY


def test_every_operator_has_a_line_and_reasons():
    lines = {name: (serving, why) for name, serving, why in report.operators()}
    assert REGISTRY.keys() < lines.keys()
    for op in REGISTRY:
        serving, why = lines[op]
        assert serving in REGISTRY[op]
        assert all(name in why for name in {"triton", "torch", "reference"} - {serving})


def test_versions_name_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(report, "_installed", lambda *names: None)
    assert report.versions()["triton"] is None
    assert report.main() == 0
    out = capsys.readouterr().out
    assert "not installed" in out
    assert "threads" in out


def test_import_touches_no_device():
    code = "import torch, stgcma_fast.report; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Source and binary distributions carry the kernels under their one import path."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("checkout")
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "stgcma_fast"]
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in names), str(copy)], check=True)
    (copy / "kernels" / "configs").mkdir(exist_ok=True)
    (copy / "kernels" / "configs" / "some_gpu.json").write_text("{}")
    return copy


def _build(checkout: Path, kind: str) -> Path:
    folder = checkout / "dist"
    code = f"import os, setuptools.build_meta as b; os.makedirs('dist', exist_ok=True); print(b.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_wheel(checkout, tmp_path):
    with zipfile.ZipFile(_build(checkout, "wheel")) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path)
    assert {"stgcma_fast/kernels/__init__.py", "stgcma_fast/kernels/configs/some_gpu.json"} <= set(names)
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    code = "import stgcma_fast, stgcma_fast.kernels as k; print(stgcma_fast.__file__, k.__name__)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "stgcma_fast/__init__.py"), "stgcma_fast.kernels"]


def test_sdist(checkout):
    with tarfile.open(_build(checkout, "sdist")) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    kernels = {f"stgcma_fast/kernels/{name}" for name in ("__init__.py", "configs/some_gpu.json")}
    assert {*kernels, "stgcma_fast/model.py", "setup.py", "LICENSE"} <= names

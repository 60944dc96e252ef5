"""What importing the package may and may not do, checked in fresh interpreters."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone():
    """With every other dependency missing, the package imports and the reference runs."""
    _python("""
        import importlib.abc, sys
        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"triton", "huggingface_hub", "safetensors", "rich", "jsonargparse", "timm"}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Block())
        import torch, stgcma_fast as sf
        backbone = sf.SwinConfig(image_size=28, embed_dim=32, depths=(1,), num_heads=(1,))
        model = sf.reference.ReferenceSTGCMA(sf.ModelConfig(backbone, num_frames=2))
        assert model(torch.randn(1, 2, 28, 28), torch.randn(1, 3, 2, 28, 28)).shape == (2, 29)
        try:
            sf.FastSTGCMA
        except ModuleNotFoundError as error:
            assert "huggingface_hub" in str(error)
        else:
            raise AssertionError("FastSTGCMA came without huggingface_hub")
    """)


def test_model_works_without_triton():
    _python("""
        import sys
        sys.modules["triton"] = None
        import torch, stgcma_fast as sf
        backbone = sf.SwinConfig(image_size=28, embed_dim=32, depths=(1,), num_heads=(1,))
        model = sf.FastSTGCMA(sf.ModelConfig(backbone, num_frames=2))
        model(torch.randn(1, 2, 28, 28), torch.randn(1, 3, 2, 28, 28)).mean().backward()
    """)


def test_import_touches_no_device():
    _python("""
        import torch
        def touched(*args, **kwargs):
            raise AssertionError("a device was touched")
        for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties"):
            setattr(torch.cuda, name, touched)
        import stgcma_fast
        for name in stgcma_fast.__all__:
            getattr(stgcma_fast, name)
        import stgcma_fast.cli, stgcma_fast.report
    """)


def test_kernels_have_one_name():
    """The bare name belongs to another package: under it nothing loads, and libraries that probe for it carry on."""
    assert "stgcma_fast.kernels" in _python("import stgcma_fast.kernels as k; print(k.__name__)")
    assert "imported as 'stgcma_fast.kernels'" in _python("""
        import kernels
        assert kernels.__path__ == [] and getattr(kernels, "__version__", None) is None
        try:
            kernels.launch
        except AttributeError as error:
            print(error)
    """)
    _python("from transformers import CLIPVisionModel")


def test_unknown_names_are_refused():
    assert "no attribute 'Fast'" in _python("""
        import stgcma_fast
        try:
            stgcma_fast.Fast
        except AttributeError as error:
            print(error)
    """)


def test_imports_run_one_way():
    """kernels and reference know nothing above them; ops know no model; nothing imports benchmarks or tests."""
    banned = {
        "kernels": {"stgcma_fast"},
        "stgcma_fast/reference": {"ops", "blocks", "model", "backbones", "config", "safetensors", "triton"},
        "stgcma_fast/ops": {"blocks", "model", "backbones", "config", "checkpoint"},
        "stgcma_fast": {"benchmarks", "tests"},
    }
    for folder, names in banned.items():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:  # what is imported for type checkers alone does not count
                if isinstance(node, ast.Import):
                    imported = {part for alias in node.names for part in alias.name.split(".")}
                elif isinstance(node, ast.ImportFrom) and node.level != 1:  # a sibling may bear any name
                    imported = set((node.module or "").split(".")) | {alias.name for alias in node.names}
                else:
                    continue
                assert not imported & names, f"{path} imports {imported & names}"

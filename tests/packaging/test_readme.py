"""The README's code runs, and what it names is there."""

import re
from pathlib import Path

import torch

from stgcma_fast import cli
from stgcma_fast.config import BACKBONES
from tests.support.models import inputs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_five_lines_run(tmp_path, monkeypatch):
    """With the preset made small and a checkpoint of our own in the published form."""
    import stgcma_fast as sf
    from stgcma_fast import config

    monkeypatch.chdir(tmp_path)
    small = sf.SwinConfig(image_size=56, embed_dim=32, depths=(1, 1), num_heads=(1, 2))
    monkeypatch.setitem(config.BACKBONES, "swin_l", small)
    monkeypatch.setitem(config.ADAPTER_RATIOS, ("swin_l", "base"), (0.5, 0.25))
    published = sf.FastSTGCMA("swin_l").state_dict()
    torch.save({f"module.{key}": value for key, value in published.items()}, "best_audio_model.pth")
    audio, video, _ = inputs(sf.preset("swin_l"), batch=1)
    names = {"torch": torch, "audio": audio, "video": video}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1), names)
    assert names["logits"].shape == (10, 29)


def test_reading_media_runs(tmp_path, monkeypatch):
    """Both documents' lines, on the CPU, with a set as the command makes it and a model that looks at what it gets."""
    monkeypatch.chdir(tmp_path)
    for root in ("toy", "AVE"):
        assert cli.main(["data", "synth", "--task", "ave", "--out", root, "--clips", "5"]) == 0
    seen = []
    for text in (README, (ROOT / "docs/data.md").read_text()):
        (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "AVPipeline" in code]
        names = {"model": lambda audio, video: seen.append((audio.shape, video.shape))}
        exec(code.replace('"cuda"', '"cpu"').replace("8,", "3,"), names)  # as many clips as the split has
    assert seen == [((3, 10, 224, 224), (3, 3, 10, 224, 224))] * 2


def test_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}: venv$", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_operator_has_its_files():
    ops = {p.stem for p in (ROOT / "docs/ops").glob("*.md")}
    assert ops >= {"cross_modal", "adapter", "av_adapter", "layer_norm"}
    assert ops >= {"temporal_attention", "window_attention", "spatial_attention"}
    for stem in ops:
        for path in (f"stgcma_fast/ops/{stem}.py", f"stgcma_fast/reference/{stem}.py", f"tests/ops/test_{stem}.py"):
            assert (ROOT / path).is_file(), path
    assert all(arch in README for arch in BACKBONES)

"""Small models, weights that exercise every path, and the golden files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from stgcma_fast import ClipConfig, ModelConfig, SwinConfig

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY_SWIN = SwinConfig(image_size=56, embed_dim=32, depths=(2, 2), num_heads=(1, 2))
TINY_CLIP = ClipConfig(image_size=64, patch_size=16, embed_dim=64, layers=2, heads=2, audio_frames=48, mel_bins=64)


def tiny_config(arch: str, **switches) -> ModelConfig:
    """A model of a few thousand parameters, without its head: "swin" has shifted and unshifted windows and two stages."""
    backbone, ratio = (TINY_SWIN, (0.5, 0.25)) if arch == "swin" else (TINY_CLIP, 0.25)
    classes = 1 if switches.get("task") == "avs" else 7
    return ModelConfig(backbone, **{"adapter_ratio": ratio, "num_frames": 3, "num_classes": classes} | switches)


def seeded_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that depend on their names alone, with open gates and no zero: the recipe of the full-size goldens."""
    out = {}
    for key, value in state.items():
        if not value.is_floating_point() or key.endswith("attn_mask"):
            out[key] = value
            continue
        x = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        low = key.lower()
        if key.endswith("running_var"):
            x = 1 + 0.1 * x.abs()
        elif value.ndim == 1 and ("ln_" in low or "norm" in low) and key.endswith("weight"):
            x = 1 + 0.1 * x
        elif "gate_" in key:
            x = 0.5 + 0.1 * x
        elif value.ndim >= 2 and "bias_table" not in key and "embedding" not in key:
            x = x * value[0].numel() ** -0.5
        else:
            x = 0.1 * x
        out[key] = x
    return out


def seed(model: nn.Module) -> nn.Module:
    """Give a model the weights of `seeded_state`."""
    model.load_state_dict(seeded_state(model.state_dict()))
    return model


def inputs(
    config: ModelConfig, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Audio, video and soft targets."""
    generator = torch.Generator().manual_seed(seed)
    size, frames = config.backbone.image_size, config.num_frames
    video = torch.randn(batch, 3, frames, size, size, generator=generator)
    audio = torch.randn(batch, frames, *config.backbone.audio_shape, generator=generator)
    target = (3 * torch.randn(batch * frames, config.num_classes, generator=generator)).softmax(-1)
    return audio.to(dtype), video.to(dtype), target.to(dtype)


def task_inputs(
    config: ModelConfig, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], Callable[[tuple], Tensor]]:
    """Arguments of a call of an AVS or AVQA model, and the published loss of what it returns, written out."""
    generator = torch.Generator().manual_seed(seed)
    size, frames = config.backbone.image_size, config.num_frames

    def images() -> Tensor:
        return torch.randn(batch, frames, 3, size, size, generator=generator).to(dtype)

    video = images()
    negative = images() if config.task == "avqa" else None
    audio = torch.randn(batch, frames, size, size, generator=generator).to(dtype)
    if config.task == "avs":
        mask = (torch.rand(batch, 1, size, size, generator=generator) > 0.5).to(dtype)
        return (audio, video), lambda out: F.binary_cross_entropy(out[0][0::frames].sigmoid(), mask)
    question = torch.randint(0, config.vocabulary, (batch, 14), generator=generator)
    label = torch.randint(0, config.num_classes, (batch,), generator=generator)

    def loss(out: tuple) -> Tensor:
        answers, positive, unlike = out
        pairs = [logits for pair in zip(positive, unlike, strict=True) for logits in pair]
        matched = torch.tensor([1, 0] * len(positive))
        return F.cross_entropy(answers, label) + 0.5 * F.cross_entropy(torch.stack(pairs), matched)

    return (audio, video, negative, question), loss


def golden(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a golden file."""
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def golden_config(meta: dict[str, str]) -> ModelConfig:
    """The configuration a tiny golden was measured with."""
    if meta["arch"] == "swin":
        backbone = SwinConfig(
            image_size=int(meta["img_size"]),
            embed_dim=int(meta["embed_dim"]),
            depths=json.loads(meta["depths"]),
            num_heads=json.loads(meta["num_heads"]),
            window=int(meta["window"]),
        )
    else:
        sizes = {"image_size": "input_resolution", "patch_size": "patch_size", "embed_dim": "embed_dim"}
        backbone = ClipConfig(
            **{field: int(meta[key]) for field, key in sizes.items()}, layers=int(meta["layers"]), heads=int(meta["heads"])
        )
    return ModelConfig(
        backbone,
        adapter_ratio=json.loads(meta["adapter_ratio"]),
        num_frames=int(meta["num_frames"]),
        num_classes=int(meta["label_dim"]),
        fusion="both" if meta["mode"] == "fusion" else "none",
    )

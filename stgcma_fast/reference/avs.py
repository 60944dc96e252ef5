"""The head that segments what sounds (AVS), written out as published: neck, attention to audio, path fusion, output.

Each stage's visual tokens become a map of 256 channels, which attends to the clip's audio (TPAVI); the maps are fused from the
coarsest to the finest. Shapes: B clips, T frames, F = B * T, R tokens a side of a stage, N = R * R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import ModelConfig

MAP = 256  # channels of the maps
AUDIO = 128  # channels of the audio feature, and of TPAVI's inner products
NECK = (64, 128, 320, 512)  # channels a stage's tokens are reduced to
DILATIONS = (3, 6, 12, 18)


class DilatedConvs(nn.Module):
    """The sum of four 3 x 3 convolutions, each looking further."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(nn.Conv2d(dim, MAP, 3, padding=d, dilation=d) for d in DILATIONS)
        for conv in self.conv2d_list:
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.conv2d_list)


class Tpavi(nn.Module):
    """Every pixel of every frame attends to the audio of all frames. Starts as a LayerNorm: the batch norm's scale is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.align_channel = nn.Linear(AUDIO, MAP)
        self.norm_layer = nn.LayerNorm(MAP)
        self.g, self.theta, self.phi = (nn.Conv3d(MAP, AUDIO, 1) for _ in range(3))
        self.W_z = nn.Sequential(nn.Conv3d(AUDIO, MAP, 1), nn.BatchNorm3d(MAP))
        nn.init.zeros_(self.W_z[1].weight)

    def forward(self, x: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """``z = LN(BN(W_z y) + x)`` over channels with ``y = (theta^T phi / M) g^T`` for the M = T * R * R pixels.

        Args:
            x: ``[B, 256, T, R, R]``.
            audio: ``[B, T, 128]``.

        Returns:
            ``[B, 256, T, R, R]``, and audio in the maps' channels, ``[B, T, 256]``.
        """
        aligned = self.align_channel(audio)
        repeated = aligned.mT[..., None, None].expand(x.shape)
        theta, phi, g = self.theta(x).flatten(2), self.phi(repeated).flatten(2), self.g(x).flatten(2)
        y = (theta.mT @ phi).div_(theta.shape[-1]) @ g.mT
        z = self.W_z(y.mT.unflatten(2, x.shape[2:])) + x
        return self.norm_layer(z.movedim(1, -1)).movedim(-1, 1), aligned


class ResidualConvs(nn.Module):
    """``relu(x) + conv(relu(conv(relu(x))))``: the published code's first ReLU works in place, so the skip has it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(MAP, MAP, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


class Fusion(nn.Module):
    """A map joins what comes from the coarser ones, at twice its size. The coarsest has no use for ``resConfUnit1``."""

    def __init__(self) -> None:
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = ResidualConvs(), ResidualConvs()

    def forward(self, coarser: Tensor | None, x: Tensor) -> Tensor:
        x = x if coarser is None else coarser + self.resConfUnit1(x)
        return F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)


def build_avs(model: nn.Module, config: ModelConfig) -> None:
    """Register the published parameters of the head on ``model``."""
    backbone = config.backbone
    for stage in range(backbone.stages):
        n = stage + 1
        setattr(model, f"avstask_x{n}_linear", nn.Linear(backbone.width(stage), NECK[stage]))
        setattr(model, f"avstask_conv{n}", DilatedConvs(NECK[stage]))
        setattr(model, f"avstask_tpavi_b{n}", Tpavi())
        setattr(model, f"avstask_path{n}", Fusion())
    model.avstask_audio_linear = nn.Linear(backbone.width(backbone.stages - 1), AUDIO)
    size = (backbone.image_size, backbone.image_size)
    model.avstask_output_conv = nn.Sequential(
        nn.Conv2d(MAP, 128, 3, padding=1),
        nn.Upsample(size, mode="bilinear"),
        nn.Conv2d(128, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 1, 1),
    )


def fuse(model: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """Maps ``[F, 256, R, R]`` of every stage to logits ``[F, 1, S, S]``."""
    path = None
    for n in range(len(maps), 0, -1):
        path = getattr(model, f"avstask_path{n}")(path, maps[n - 1])
    return model.avstask_output_conv(path)


def first_frames(maps: Sequence[Tensor], frames: int) -> list[Tensor]:
    """Of maps ``[B * T, C, R, R]``, t running fastest, those of each clip's first frame."""
    return [x[::frames] for x in maps]


def avs_head(
    model: nn.Module, visual: Sequence[Tensor], audio: Tensor, first_frame: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outputs of the model.

    Args:
        model: has the parameters of `build_avs`.
        visual: tokens ``[B, T, N, C]`` at the end of each stage, normalized those of the last alone.
        audio: normalized tokens ``[B, T, N, C]`` of the last stage.
        first_frame: give logits of each clip's first frame alone.

    Returns:
        Logits ``[F, 1, S, S]``, or ``[B, 1, S, S]``; the maps ``[F, 256, R, R]``, which as published are those after the ReLU;
        audio in the maps' channels ``[B, T, 256]``; both for each stage.
    """
    batch, frames = audio.shape[:2]
    heard = model.avstask_audio_linear(audio.mean(2))
    maps, aligned = [], []
    for stage, tokens in enumerate(visual):
        n, side = stage + 1, model.config.backbone.resolution(stage)
        x = getattr(model, f"avstask_x{n}_linear")(tokens).flatten(0, 1).mT.unflatten(2, (side, side))
        x = getattr(model, f"avstask_conv{n}")(x).unflatten(0, (batch, frames)).transpose(1, 2)
        z, a = getattr(model, f"avstask_tpavi_b{n}")(x, heard)
        maps.append(z.transpose(1, 2).flatten(0, 1).relu())
        aligned.append(a)
    return fuse(model, first_frames(maps, frames) if first_frame else maps), maps, aligned

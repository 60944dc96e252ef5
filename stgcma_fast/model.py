"""FastSTGCMA: the model users build, call, train, save and load."""

from __future__ import annotations

from torch import Tensor

from .backbones import clip, swin
from .blocks import Runner
from .config import ModelConfig, SwinConfig, preset
from .ops.dispatch import Impl
from .reference.model import ReferenceSTGCMA
from .reference.inputs import check_inputs
import torch


class FastSTGCMA(ReferenceSTGCMA):
    def __init__(self, config, *, adapters="base", impl="auto", fold_temporal=True, checkpointing=False, **switches):
        if isinstance(config, str):
            config = preset(config, adapters, **switches)
        super().__init__(config)
        self.run = Runner(impl, fold_temporal)
        self.checkpointing = checkpointing

    def forward(self, audio: Tensor | None, video: Tensor | None, mode: str | None = None) -> Tensor:
        if self.run.impl == "reference":
            return super().forward(audio, video, mode)
        check_inputs(self.config, audio, video, mode)
        images = {"visual": lambda: video.transpose(1, 2), "audio": lambda: audio[:, :, None]}
        backbone = swin if isinstance(self.config.backbone, SwinConfig) else clip
        features = backbone.features(self, {m: images[m]() for m in self.config.modalities}, self.run, self.checkpointing)
        return self.mlp_head(torch.cat([features[m] for m in ("audio", "visual") if m in features], -1))

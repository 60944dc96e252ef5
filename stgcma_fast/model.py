"""FastSTGCMA: the model users build, call, train, save and load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .backbones import clip, swin
from .blocks import Runner
from .checkpoint import checked_state, load_checkpoint
from .config import ModelConfig, SwinConfig, preset
from .ops.dispatch import Impl, select
from .reference.inputs import check_inputs
from .reference.model import ReferenceSTGCMA, is_trainable


class FastSTGCMA(ReferenceSTGCMA, PyTorchModelHubMixin, library_name="stgcma-fast", license="apache-2.0"):
    """STG-CMA, fast: the published model's call, checkpoint keys and numbers.

    Args:
        config: a `ModelConfig`, its dictionary, or the name of a preset: "clip_b16", "clip_l14", "swin_b", "swin_l".
        adapters: with a preset, "tiny" or "base".
        impl: which implementation serves the operators. "auto" takes the fastest that can; "triton", "torch" and "reference"
            run as asked or raise with every reason why not.
        fold_temporal: merge the frozen projection into the temporal adapters' down-projection. Same mathematics, one matrix
            product over all tokens less.
        checkpointing: keep only each block's inputs for the backward and run the block again there.
        switches: with a preset, any other field of `ModelConfig`.

    Raises:
        ValueError: a name or a combination no model has.
        NotImplementedError: ``impl`` cannot serve here.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any] | str,
        *,
        adapters: str = "base",
        impl: Impl = "auto",
        fold_temporal: bool = True,
        checkpointing: bool = False,
        **switches: Any,
    ) -> None:
        if isinstance(config, str):
            config = preset(config, adapters, **switches)
        elif switches:
            raise ValueError(f"got {sorted(switches)} beside a whole configuration; they go with the name of a preset")
        elif not isinstance(config, ModelConfig):
            config = ModelConfig.from_dict(config)
        select("av_adapter", impl)
        super().__init__(config)
        self.run = Runner(impl, fold_temporal)
        self.checkpointing = checkpointing
        self._hub_mixin_config = {"config": config.to_dict()}

    def forward(self, audio: Tensor | None, video: Tensor | None, mode: str | None = None) -> Tensor:
        """Class scores of every segment.

        Args:
            audio: filterbanks ``[B, T, time, mel]``, floating; ignored by a model without audio.
            video: normalized frames ``[B, 3, T, height, width]``, floating; ignored by a model without vision.
            mode: the published call's third argument: "fusion" or "multimodal" for two streams, "audioonly" or "videoonly"
                for one. It has no effect beyond a check; the configuration decides.

        Returns:
            Logits ``[B * T, num_classes]``, t running fastest.

        Raises:
            ValueError: inputs or a mode that do not fit the configuration, or a frozen part in another dtype without autocast.
        """
        if self.run.impl == "reference":
            return super().forward(audio, video, mode)
        check_inputs(self.config, audio, video, mode)
        self._check_dtypes()
        images = {"visual": lambda: video.transpose(1, 2), "audio": lambda: audio[:, :, None]}
        backbone = swin if isinstance(self.config.backbone, SwinConfig) else clip
        features = backbone.features(self, {m: images[m]() for m in self.config.modalities}, self.run, self.checkpointing)
        return self.mlp_head(torch.cat([features[m] for m in ("audio", "visual") if m in features], -1))

    def _frozen_products(self) -> Iterator[nn.Parameter]:
        """Weights and biases of the frozen linear and convolution layers."""
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                product = isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or ".in_proj_" in name
                if product and not is_trainable(name):
                    yield parameter

    def _check_dtypes(self) -> None:
        patches = self.patch_embed.proj if isinstance(self.config.backbone, SwinConfig) else self.conv1
        frozen, trained = patches.weight, self.mlp_head[-1].weight
        if frozen.dtype != trained.dtype and not torch.is_autocast_enabled(frozen.device.type):
            raise ValueError(
                f"the frozen layers are {frozen.dtype}, the trained ones {trained.dtype}: call the model under torch.autocast"
            )

    def cast_frozen(self, dtype: torch.dtype) -> FastSTGCMA:
        """Hold the frozen products' weights in ``dtype``, once, for calls under autocast to the same dtype.

        Autocast would otherwise cast them anew in every call. Norms, tables and everything trained keep their dtype.
        """
        for parameter in self._frozen_products():
            parameter.data = parameter.data.to(dtype)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Exactly what the paper trains: adapters, gates, temporal embeddings and tables, ``ln_post`` and the head."""
        return [parameter for name, parameter in self.named_parameters() if is_trainable(name)]

    def parameter_groups(self, lr: float, head_lr: float = 0.1) -> list[dict[str, Any]]:
        """The published optimizer groups, for any torch optimizer.

        Args:
            lr: learning rate of everything trained but the head.
            head_lr: the head's learning rate as a fraction of ``lr``; the published option of this name.
        """
        named = [(name, parameter) for name, parameter in self.named_parameters() if is_trainable(name)]
        return [
            {"name": "adapters", "lr": lr, "params": [p for name, p in named if not name.startswith("mlp_head.")]},
            {"name": "head", "lr": lr * head_lr, "params": [p for name, p in named if name.startswith("mlp_head.")]},
        ]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`, for published checkpoints too: keys may start with ``module.``.

        Raises:
            RuntimeError: missing, unexpected or misshapen keys, all named.
            ValueError: weights that are not finite, or buffers of another geometry, all named.
        """
        return super().load_state_dict(checked_state(self, state_dict), strict, assign)

    @classmethod
    def _load_as_safetensor(cls, model: FastSTGCMA, model_file: str, map_location: str, strict: bool) -> FastSTGCMA:
        # The mixin's own loader ignores missing keys by default.
        load_checkpoint(model, Path(model_file))
        return model.to(map_location).eval()

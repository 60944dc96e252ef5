"""FastSTGCMA: the model users build, call, train, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import save_file
from torch import Tensor, nn

from .backbones import clip, swin
from .blocks import FP8_LAYERS, Precision, Runner
from .checkpoint import checked_state, load_checkpoint
from .config import ModelConfig, preset
from .heads.avs import segment
from .ops.checks import check_choice
from .ops.dispatch import Impl, check_impl
from .ops.fp8 import quantize_weight, size_refusals
from .reference.model import Block, ReferenceSTGCMA, is_trainable


def _quantize_loaded(model: FastSTGCMA, keys: Any) -> None:
    model.quantize_frozen()


class FastSTGCMA(ReferenceSTGCMA, PyTorchModelHubMixin, library_name="stgcma-fast", license="apache-2.0"):
    """STG-CMA, fast: the published model's call, checkpoint keys and numbers.

    Args:
        config: a `ModelConfig`, its dictionary, or the name of a preset: "clip_b16", "clip_l14", "swin_b", "swin_l".
        adapters: with the name of a preset, "tiny" or "base", which is the default.
        impl: which implementation serves the operators. "auto" takes "triton" on CUDA for each call its kernels can serve, and
            "torch" elsewhere; "triton", "torch" and "reference" run as asked or raise with every reason why not. "reference"
            is the reference model itself.
        fold_temporal: merge the frozen projection into the temporal adapters' down-projection. Same mathematics, one matrix
            product over all tokens less.
        checkpointing: keep only each block's inputs for the backward and run the block again there.
        precision: "fp8-frozen" runs the frozen linear layers of the blocks in float8, but for the temporal projection, and so
            does the way back through them; "full" none. For bfloat16 on a GPU that has float8 products. Card: docs/ops/fp8.md.
        switches: with the name of a preset, any other field of `ModelConfig`.

    Blocks and frozen layers are not called as modules: hooks on them do not run, and modules put in their place are not used,
    but for ``impl="reference"``. ``impl``, ``fold_temporal``, ``checkpointing`` and ``precision`` are no part of a saved model;
    give them to ``from_pretrained`` again.

    Raises:
        ValueError: a name or a combination no model has.
        NotImplementedError: ``impl`` cannot serve here, or ``precision`` these sizes. What lies in the device, the dtypes and
            what is trained a call refuses.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any] | str,
        *,
        adapters: str | None = None,
        impl: Impl = "auto",
        fold_temporal: bool = True,
        checkpointing: bool = False,
        precision: Precision = "full",
        **switches: Any,
    ) -> None:
        if isinstance(config, str):
            config = preset(config, adapters or "base", **switches)
        elif switches or adapters is not None:
            given = sorted([*switches, *(["adapters"] if adapters is not None else [])])
            raise ValueError(f"got {given} beside a whole configuration; they go with the name of a preset")
        elif isinstance(config, Mapping):
            config = ModelConfig.from_dict(config)
        elif not isinstance(config, ModelConfig):
            raise ValueError(f"config: got {config!r}, expected a ModelConfig, its dictionary, or the name of a preset")
        if impl == "reference" and checkpointing:
            raise ValueError("checkpointing: got True with impl='reference', which keeps every activation")
        check_choice("precision", precision, get_args(Precision))
        if impl == "reference" and precision != "full":
            raise ValueError(f"precision: got {precision!r} with impl='reference', which rounds nothing to float8")
        check_impl(impl)
        super().__init__(config)
        self.runner = Runner(impl, fold_temporal, checkpointing, precision)
        self._hub_mixin_config = {"config": config.to_dict()}
        self.quantize_frozen()
        # A hook, as `load_state_dict` of a module that holds this one does not call ours.
        self.register_load_state_dict_post_hook(_quantize_loaded)

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """What AVE's head reads, ``[B * T, D]`` a stream, from images ``[B, T, c, height, width]``."""
        if self.is_swin or self.runner.impl == "reference":
            return super().features(images)
        self._check_dtypes(images)
        return clip.features(self, images, self.runner)

    def tokens(self, images: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the other heads read: see `reference.model.swin_tokens`."""
        self._check_dtypes(images)
        return super().tokens(images) if self.runner.impl == "reference" else swin.tokens(self, images, self.runner)

    def segment(
        self, visual: Sequence[Tensor], audio: Tensor, first_frame: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """AVS from tokens: see `reference.avs.avs_head`."""
        if self.runner.impl == "reference":
            return super().segment(visual, audio, first_frame)
        return segment(self, visual, audio, first_frame)

    def _frozen_products(self) -> Iterator[nn.Parameter]:
        """Weights and biases of the frozen linear and convolution layers."""
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                product = isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) or ".in_proj_" in name
                if product and not is_trainable(name):
                    yield parameter

    def _check_dtypes(self, images: dict[str, Tensor]) -> None:
        frozen = (self.patch_embed.proj if self.is_swin else self.conv1).weight
        head = {"ave": "mlp_head", "avs": "avstask_audio_linear", "avqa": "avqatask_fc_ans"}[self.config.task]
        if torch.is_autocast_enabled(frozen.device.type):
            return
        for name, dtype in {
            "the trained layers": next(getattr(self, head).parameters()).dtype,
            **{m: x.dtype for m, x in images.items()},
        }.items():
            if dtype != frozen.dtype:
                raise ValueError(
                    f"{name}: got {dtype}, expected {frozen.dtype} like the frozen layers, or a call under torch.autocast"
                )

    def cast_frozen(self, dtype: torch.dtype) -> FastSTGCMA:
        """Hold the frozen products' weights in ``dtype``, once, for calls under autocast to the same dtype.

        Autocast would otherwise cast them anew in every call. Norms, tables and everything trained keep their dtype. The
        weights are rounded for good: what is saved afterwards holds the rounded ones.
        """
        for parameter in self._frozen_products():
            parameter.data = parameter.data.to(dtype)
        self.quantize_frozen()
        return self

    def quantize_frozen(self) -> None:
        """With ``precision="fp8-frozen"``, make the float8 copies of frozen weights; else nothing.

        The constructor, loading a state, `cast_frozen` and whatever moves or casts the model call it. Call it after writing
        into frozen weights by other means.

        Raises:
            NotImplementedError: a weight's sizes do not fit.
        """
        if self.runner.precision == "full":
            return
        frozen_layers = (swin if self.is_swin else clip).frozen_layers
        for name, block in self.named_modules():
            if not isinstance(block, Block):
                continue
            layers = frozen_layers(block, self.runner.impl)
            weights = {layer: getattr(layers, layer)[0] for layer in FP8_LAYERS}
            reasons = [f"{name}.{layer}: {reason}" for layer, weight in weights.items() for reason in size_refusals(weight)]
            if reasons:
                raise NotImplementedError(f"precision='fp8-frozen' was asked for, but {'; '.join(reasons)}")
            block.quantized = {layer: quantize_weight(weight) for layer, weight in weights.items()}

    def _apply(self, fn: Callable, recurse: bool = True) -> FastSTGCMA:
        super()._apply(fn, recurse)
        self.quantize_frozen()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Exactly what the paper trains: adapters, gates, temporal embeddings and tables, ``ln_post`` and the head."""
        return [parameter for name, parameter in self.named_parameters() if is_trainable(name)]

    def parameter_groups(self, lr: float, head_lr: float = 0.1) -> list[dict[str, Any]]:
        """The published optimizer groups, for any torch optimizer: adapters and head for AVE, one for AVS and AVQA.

        Args:
            lr: learning rate of everything trained but AVE's head.
            head_lr: that head's learning rate as a fraction of ``lr``; the published option of this name, which the other
                tasks ignore, as published.
        """
        named = [(name, parameter) for name, parameter in self.named_parameters() if is_trainable(name)]
        if self.config.task != "ave":
            return [{"name": "adapters and head", "lr": lr, "params": [p for _, p in named]}]
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

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin's own writer refuses weights that are parts of one storage, as those of AVQA's LSTM are on a GPU.
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        save_file(state, save_directory / SAFETENSORS_SINGLE_FILE)

    @classmethod
    def _load_as_safetensor(cls, model: FastSTGCMA, model_file: str, map_location: str, strict: bool) -> FastSTGCMA:
        # The mixin's own loader ignores missing keys by default.
        load_checkpoint(model, Path(model_file))
        return model.to(map_location).eval()

"""The fast way through a Swin backbone: patch embedding, stages, patch merging."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..blocks import FrozenLayers, Runner, Streams, run_block, run_frozen_block
from ..ops.dispatch import Impl
from ..ops.layer_norm import packed_layer_norm
from ..ops.linear import linear
from ..reference.model import PatchMerging, SwinBlock, swin_embeddings


def frozen_layers(block: SwinBlock, impl: Impl) -> FrozenLayers:
    """The frozen weights of a block, and its attention with the bias gathered once."""
    bias, side = block.attn.window_bias(), block.resolution

    def attention(qkv: Tensor) -> Tensor:
        out = ops.window_attention(
            qkv.unflatten(1, (side, side)),
            bias,
            window=block.window,
            shift=block.shift,
            scale=qkv.shape[-1] ** -0.5,
            mask=block.attn_mask,
            impl=impl,
        )
        return out.flatten(1, 2)

    return FrozenLayers(
        norm1=(block.norm1.weight, block.norm1.bias),
        qkv=(block.attn.qkv.weight, block.attn.qkv.bias),
        proj=(block.attn.proj.weight, block.attn.proj.bias),
        norm2=(block.norm2.weight, block.norm2.bias),
        fc1=(block.mlp.fc1.weight, block.mlp.fc1.bias),
        fc2=(block.mlp.fc2.weight, block.mlp.fc2.bias),
        heads=block.attn.heads,
        activation=lambda x: ops.gelu(x, quick=False, impl=impl),
        attention=attention,
        temporal_bias=block.attn.temporal_bias,
        drop_shape=lambda x: (x.shape[0], 1, x.shape[2], 1),
        tables=(bias,),
    )


def _merge(layer: PatchMerging, x: Tensor, side: int, impl: Impl) -> Tensor:
    """2 x 2 neighbours to one token: ``[B, T, S, C]`` to ``[B, T, S / 4, 2 C]``."""
    # Stream by stream: gradients of the next stage's tokens are sums, which nobody could leave packed.
    rows = linear(packed_layer_norm([x], layer.norm.weight, layer.norm.bias, side=side, impl=impl), layer.reduction.weight)
    return rows.view(*x.shape[:2], -1, rows.shape[-1])


def tokens(model: nn.Module, images: Streams, runner: Runner) -> tuple[Streams, list[Tensor]]:
    """What the heads read, from images ``[B, T, c, height, width]`` a stream: see `reference.model.swin_tokens`."""
    config = model.config
    streams, earlier = swin_embeddings(model, images), []
    for stage, layer in enumerate(model.layers):
        for block in layer.blocks:
            frozen = {m: x for m, x in streams.items() if m not in config.modalities}
            if frozen:
                frozen = run_frozen_block(frozen_layers, block, frozen, runner)
            adapted = {m: x for m, x in streams.items() if m in config.modalities}
            streams = run_block(frozen_layers, block, adapted, runner) | frozen
        if layer.downsample is not None:
            if config.task == "avs":
                earlier.append(streams["visual"])
            side = config.backbone.resolution(stage)
            streams = {m: _merge(layer.downsample, x, side, runner.impl) for m, x in streams.items()}
    norm = model.norm
    return {m: ops.layer_norm(x, norm.weight, norm.bias, impl=runner.impl) for m, x in streams.items()}, earlier

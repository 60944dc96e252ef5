"""The fast way through a CLIP backbone."""

from __future__ import annotations

from torch import nn

from .. import ops
from ..blocks import FrozenLayers, Runner, Streams, run_block
from ..ops.dispatch import Impl
from ..reference.model import ClipBlock, clip_embeddings


def frozen_layers(block: ClipBlock, impl: Impl) -> FrozenLayers:
    """The frozen weights of a block, and its attention."""
    return FrozenLayers(
        norm1=(block.ln_1.weight, block.ln_1.bias),
        qkv=(block.attn.in_proj_weight, block.attn.in_proj_bias),
        proj=(block.attn.out_proj.weight, block.attn.out_proj.bias),
        norm2=(block.ln_2.weight, block.ln_2.bias),
        fc1=(block.mlp.c_fc.weight, block.mlp.c_fc.bias),
        fc2=(block.mlp.c_proj.weight, block.mlp.c_proj.bias),
        heads=block.heads,
        activation=lambda x: ops.gelu(x, quick=True, impl=impl),
        attention=lambda qkv: ops.spatial_attention(qkv, scale=qkv.shape[-1] ** -0.5, impl=impl),
        temporal_bias=lambda modality: None,
        drop_shape=lambda x: (1, 1, x.shape[2], 1),
    )


def features(model: nn.Module, images: Streams, runner: Runner) -> Streams:
    """One feature ``[B * T, D]`` a stream from images ``[B, T, c, height, width]``: the last block's class token."""
    streams = clip_embeddings(model, images)
    for block in model.transformer.resblocks:
        streams = run_block(frozen_layers, block, streams, runner)
    # Trained, and of one token a frame: part of the head, not of the frozen trunk that has kernels of its own.
    return {m: model.ln_post(x[:, :, 0]).flatten(0, 1) for m, x in streams.items()}

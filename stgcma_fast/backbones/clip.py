"""The fast way through a CLIP backbone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..blocks import FrozenLayers, Runner, Streams, forward_block
from ..ops.dispatch import Impl
from ..reference.model import ClipBlock, clip_embed


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
        activation=block.mlp.gelu,
        attention=lambda qkv: ops.spatial_attention(qkv, scale=qkv.shape[-1] ** -0.5, impl=impl),
        temporal_bias=lambda modality: None,
        drop_shape=lambda x: (1, 1, x.shape[2], 1),
    )


def _forward_block(block: ClipBlock, streams: Streams, run: Runner) -> Streams:
    return forward_block(block, frozen_layers(block, run.impl), streams, run)


def features(model: nn.Module, images: Streams, run: Runner, checkpointing: bool) -> Streams:
    """One feature ``[B * T, D]`` a stream from images ``[B, T, c, height, width]``: the last block's class token."""
    tables = {
        "visual": (model.conv1, model.positional_embedding, model.temporal_embedding),
        "audio": (model.conv1_audio, model.positional_embedding_audio, model.temporal_embedding_audio),
    }
    streams = {m: clip_embed(model, x, *tables[m]) for m, x in images.items()}
    for block in model.transformer.resblocks:
        if checkpointing and torch.is_grad_enabled():
            streams = checkpoint(_forward_block, block, streams, run, use_reentrant=False)
        else:
            streams = _forward_block(block, streams, run)
    norm = model.ln_post
    return {m: ops.layer_norm(x[:, :, 0], norm.weight, norm.bias, impl=run.impl).flatten(0, 1) for m, x in streams.items()}

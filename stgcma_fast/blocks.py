"""One transformer block for both streams and both backbones: temporal, spatial, global.

The parameters live in the modules of `reference.model`; this file is the fast way through them. Each frozen layer runs once,
on the tokens of all streams packed behind one another. On the CPU, where wide tensors cost more than launches, it runs on one
cache-sized piece of a stream at a time instead.

Shapes: B clips, T frames, S tokens of a frame, D channels, F = B * T, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
from .ops.adapter import adapters
from .ops.dispatch import Impl, product_dtype
from .ops.fp8 import QuantizedWeight, fp8_linear
from .ops.layer_norm import branched_layer_norm
from .ops.linear import linear
from .ops.packing import split
from .ops.stream import piece_size, stream
from .ops.temporal_attention import temporal_attentions
from .reference.adapter import AdapterParams
from .reference.model import Block

Affine = tuple[Tensor, Tensor]
Streams = dict[str, Tensor]
Precision = Literal["full", "fp8-frozen"]
# The frozen layers that "fp8-frozen" runs in float8.
FP8_LAYERS = ("qkv", "proj", "fc1", "fc2")


class FrozenLayers(NamedTuple):
    """The frozen weights of a block under one set of names for both backbones."""

    norm1: Affine
    qkv: Affine
    proj: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine
    heads: int
    activation: Callable[[Tensor], Tensor]
    # Attention within each frame: [F, S, 3, h, d] to [F, S, h * d].
    attention: Callable[[Tensor], Tensor]
    # Temporal bias [h, T, T] of a stream, or None.
    temporal_bias: Callable[[str], Tensor | None]
    # Shape of the mask that drops the temporal residual, for tokens [B, T, S, D].
    drop_shape: Callable[[Tensor], tuple[int, ...]]
    # Whatever else `attention` reads.
    tables: tuple[Tensor, ...] = ()
    # Of layers that run in float8.
    quantized: Mapping[str, QuantizedWeight] = {}

    @property
    def trained(self) -> bool:
        """Whether somebody trains a layer that the paper freezes."""
        return any(t.requires_grad for pair in (*self[:6], self.tables) for t in pair)

    def product(self, name: str, x: Tensor, impl: Impl) -> Tensor:
        """The linear layer of this name."""
        weight, bias = getattr(self, name)
        quantized = self.quantized.get(name)
        return linear(x, weight, bias) if quantized is None else fp8_linear(x, weight, bias, quantized, impl=impl)


class Runner(NamedTuple):
    """How a model runs its blocks; the meaning is that of `FastSTGCMA`'s arguments."""

    impl: Impl
    fold_temporal: bool
    checkpointing: bool
    precision: Precision = "full"


def _unpack(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Packed rows to the leading shapes of ``like``, as views."""
    parts = split(rows, [x.shape[:-1].numel() for x in like])
    return [part.view(*x.shape[:-1], *rows.shape[1:]) for part, x in zip(parts, like, strict=True)]


def _fold(params: AdapterParams, proj: Affine) -> AdapterParams:
    """Merge the frozen projection before an adapter into its down-projection: ``W_d (P o + b_p) + b_d``."""
    weight, bias = proj
    down = params.down_weight
    return params._replace(down_weight=down @ weight, down_bias=down @ bias + params.down_bias)


def _drop_mask(block: Block, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Stochastic depth of the temporal residual; the same random numbers as the reference draws."""
    if not block.training or block.drop_rate == 0:
        return None
    keep = 1 - block.drop_rate
    return torch.empty(shape, dtype=product_dtype(x), device=x.device).bernoulli_(keep).div_(keep)


def _piece_size(layers: FrozenLayers, runner: Runner, x: Tensor, dim: int, widening: int) -> int | None:
    """How many indices along ``dim`` a frozen step takes at a time; None for all of them, of all streams."""
    # Triton's kernels take both streams at once and keep no wide intermediate anyhow.
    return None if layers.trained or runner.impl == "triton" else piece_size(x, dim, widening)


def _packed_qkv(layers: FrozenLayers, xs: Sequence[Tensor], impl: Impl) -> tuple[Tensor, list[Tensor]]:
    """``[..., D]`` each to packed rows ``[rows, 3, h, d]``; and the streams, for their residual."""
    normed, xs = branched_layer_norm(xs, *layers.norm1, impl=impl)
    return layers.product("qkv", normed, impl).unflatten(-1, (3, layers.heads, -1)), xs


def _temporal(block: Block, layers: FrozenLayers, streams: Streams, runner: Runner) -> Streams:
    """``X_t <- X_t + DropPath(TAdapter(MHSA_T(LN(X_t))))``, equations 6 and 7."""
    adapted = [m for m in streams if m in block.config.adapt]
    masks = {m: _drop_mask(block, streams[m], layers.drop_shape(streams[m])) for m in adapted}
    biases = {m: layers.temporal_bias(m) for m in adapted}
    params: dict[str, AdapterParams | None] = dict.fromkeys(adapted)
    if block.config.use_temporal:
        params = {m: block.adapter_params("T_Adapter", m) for m in adapted}
        if runner.fold_temporal:
            params = {m: _fold(p, layers.proj) for m, p in params.items()}

    def finish(
        xs: Sequence[Tensor],
        qkvs: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        biases: Sequence[Tensor | None],
        weights: Sequence[AdapterParams | None],
    ) -> list[Tensor]:
        ys = temporal_attentions(qkvs, biases, scale=qkvs[0].shape[-1] ** -0.5, impl=runner.impl)
        has_adapters = weights[0] is not None
        if not (has_adapters and runner.fold_temporal):
            ys = [linear(y, *layers.proj) for y in ys]
        if has_adapters:
            return adapters(ys, weights, xs, masks, impl=runner.impl)
        return [x + (y if mask is None else y * mask) for x, y, mask in zip(xs, ys, masks, strict=True)]

    def piece(x: Tensor, mask: Tensor | None, *shared: Tensor) -> Tensor:
        used = 4 * block.config.use_temporal
        weights, bias = shared[:used], shared[used:]
        packed, xs = _packed_qkv(layers, [x], runner.impl)
        (y,) = finish(
            xs, _unpack(packed, xs), [mask], [bias[0] if bias else None], [AdapterParams(*weights) if weights else None]
        )
        return y

    streams = dict(streams)
    size = _piece_size(layers, runner, streams[adapted[0]], 2, 3)
    if size is None:
        packed, xs = _packed_qkv(layers, [streams[m] for m in adapted], runner.impl)
        chosen = ([of[m] for m in adapted] for of in (masks, biases, params))
        return streams | dict(zip(adapted, finish(xs, _unpack(packed, xs), *chosen), strict=True))
    for m in adapted:
        shared = [*(params[m] or ()), *([] if biases[m] is None else [biases[m]])]
        streams[m] = stream(piece, streams[m], *shared, dim=2, size=size, along=masks[m])
    return streams


def _frozen_step(
    inner: Callable[[Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]],
    layers: FrozenLayers,
    tail: str,
    streams: Streams,
    widening: int,
    runner: Runner,
) -> Streams:
    """``layers.product(tail, inner(xs))``: all streams at once, or one piece of a stream at a time.

    ``inner`` gives the rows of all streams in one tensor or, where they come apart, in one for each.
    """
    xs = list(streams.values())
    size = _piece_size(layers, runner, xs[0], 0, widening)
    if size is not None:
        affine = getattr(layers, tail)
        ys = [stream(lambda x, _: _unpack(*inner([x])[0], [x])[0], x, dim=0, size=size, tail=affine) for x in xs]
        return dict(zip(streams, ys, strict=True)), streams
    parts, xs = inner(xs)
    done = [layers.product(tail, rows, runner.impl) for rows in parts]
    ys = _unpack(done[0], xs) if len(done) == 1 else [_unpack(y, [x])[0] for y, x in zip(done, xs, strict=True)]
    return dict(zip(streams, ys, strict=True)), dict(zip(streams, xs, strict=True))


def spatial_step(layers: FrozenLayers, streams: Streams, runner: Runner) -> tuple[Streams, Streams]:
    """``X_med = MHSA(LN(X_s))``, equations 8 and 9, for streams ``[F, S, D]``; and the streams, for their residual."""

    def inner(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        packed, xs = _packed_qkv(layers, xs, runner.impl)
        if all(x.shape == xs[0].shape for x in xs):
            # Frames of one size: those of all streams are one batch.
            return [layers.attention(packed.unflatten(0, (-1, xs[0].shape[1]))).flatten(0, 1)], xs
        return [layers.attention(qkv).flatten(0, 1) for qkv in _unpack(packed, xs)], xs

    return _frozen_step(inner, layers, "proj", streams, 3, runner)


def global_step(layers: FrozenLayers, streams: Streams, runner: Runner) -> tuple[Streams, Streams]:
    """``X_med = FFN(LN(X))``, equations 12 and 13, for streams ``[..., D]``; and the streams, for their residual."""

    def inner(xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        normed, xs = branched_layer_norm(xs, *layers.norm2, impl=runner.impl)
        return [layers.activation(layers.product("fc1", normed, runner.impl))], xs

    rows = {m: x.flatten(0, -2) for m, x in streams.items()}
    done = _frozen_step(inner, layers, "fc2", rows, 4, runner)
    return tuple({m: of[m].view_as(x) for m, x in streams.items()} for of in done)


def adapt(
    block: Block, step: str, streams: Streams, medial: Streams, used: bool, runner: Runner, window: ops.WindowGrid | None = None
) -> Streams:
    """``X <- X + X_med + W_u h'``, equations 10, 11, 14 and 15, for streams ``[F, S, D]``."""
    adapted = block.config.adapt if used else ()
    if len(adapted) < 2:
        sums = {m: x + medial[m] for m, x in streams.items()}
        return {
            m: ops.adapter(medial[m], block.adapter_params(step, m), total, impl=runner.impl) if m in adapted else total
            for m, total in sums.items()
        }
    visual, audio = ops.av_adapter(
        medial["visual"],
        medial["audio"],
        block.adapter_params(step, "visual"),
        block.adapter_params(step, "audio"),
        block.gate_v,
        block.gate_a,
        residual_visual=streams["visual"],
        residual_audio=streams["audio"],
        window=window,
        fusion=block.config.fusion,
        impl=runner.impl,
    )
    return {"visual": visual, "audio": audio}


def _layers_of(frozen_layers: Callable[[Block, Impl], FrozenLayers], block: Block, runner: Runner) -> FrozenLayers:
    layers = frozen_layers(block, runner.impl)
    return layers._replace(quantized=block.quantized) if runner.precision == "fp8-frozen" else layers


def run_frozen_block(
    frozen_layers: Callable[[Block, Impl], FrozenLayers], block: Block, streams: Streams, runner: Runner
) -> Streams:
    """The transformer's own block alone, streams ``[B, T, S, D]`` to the same. Nothing is kept where nothing is trained."""
    layers = _layers_of(frozen_layers, block, runner)
    shapes = {m: x.shape for m, x in streams.items()}
    streams = {m: x.flatten(0, 1) for m, x in streams.items()}
    for step in (spatial_step, global_step):
        medial, streams = step(layers, streams, runner)
        for m, x in streams.items():
            mask = _drop_mask(block, x, (len(x), 1, 1))
            streams[m] = x + (medial[m] if mask is None else medial[m] * mask)
    return {m: x.view(shapes[m]) for m, x in streams.items()}


def run_block(frozen_layers: Callable[[Block, Impl], FrozenLayers], block: Block, streams: Streams, runner: Runner) -> Streams:
    """One block, streams ``[B, T, S, D]`` keyed by modality to the same. ``frozen_layers`` is the backbone's."""

    def forward(streams: Streams) -> Streams:
        return _forward(block, _layers_of(frozen_layers, block, runner), streams, runner)

    if runner.checkpointing and torch.is_grad_enabled():
        return checkpoint(forward, streams, use_reentrant=False)
    return forward(streams)


def _forward(block: Block, layers: FrozenLayers, streams: Streams, runner: Runner) -> Streams:
    shapes = {m: x.shape for m, x in streams.items()}
    if block.has_temporal:
        streams = _temporal(block, layers, streams, runner)
    streams = {m: x.flatten(0, 1) for m, x in streams.items()}
    medial, streams = spatial_step(layers, streams, runner)
    streams = adapt(block, block.SPATIAL, streams, medial, block.config.use_spatial, runner, block.spatial_window)
    medial, streams = global_step(layers, streams, runner)
    if block.parallel_adapter:
        streams = {m: x + medial[m] + _parallel_adapter(block, layers, m, x, runner) for m, x in streams.items()}
    else:
        streams = adapt(block, block.GLOBAL, streams, medial, block.config.use_global, runner)
    return {m: x.view(shapes[m]) for m, x in streams.items()}


def _parallel_adapter(block: Block, layers: FrozenLayers, modality: str, x: Tensor, runner: Runner) -> Tensor:
    """The one-stream Swin's adapter beside the FFN, for ``[F, S, D]``."""
    normed = ops.layer_norm(x, *layers.norm2, impl=runner.impl)
    y = 0.5 * ops.adapter(normed, block.adapter_params(block.GLOBAL, modality), impl=runner.impl)
    mask = _drop_mask(block, x, (len(x), 1, 1))
    return y if mask is None else y * mask

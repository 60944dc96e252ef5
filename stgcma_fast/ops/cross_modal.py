"""The parameter-free two-way cross-attention of the AV-adapter. Card: docs/ops/cross_modal.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .adapter import LARGEST_RANK
from .boundary import define
from .checks import check_alike, check_choice, check_shape
from .dispatch import Impl, Implementation, product_dtype, register, select
from .linear import input_gradient, linear, served_by_onednn
from .short_attention import is_short, softmax_gradient

FUSIONS = ("both", "a2v", "v2a", "none")


def listening(fusion: str) -> tuple[bool, bool]:
    """Whether vision hears audio, and audio vision."""
    return fusion in ("both", "a2v"), fusion in ("both", "v2a")


def cross_modal_attention(
    visual: Tensor,
    audio: Tensor,
    gate_visual: Tensor,
    gate_audio: Tensor,
    *,
    fusion: str = "both",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``(V + alpha softmax(V A^T) A, A + beta softmax(A V^T) V)``, equations 3 and 4; the scores are not scaled.

    Args:
        visual: ``[G, n, r]`` hidden tokens, any floating dtype.
        audio: ``[G, m, r]`` hidden tokens.
        gate_visual: ``[1]``, alpha.
        gate_audio: ``[1]``, beta.
        fusion: "both"; "a2v", only vision listens; "v2a", only audio listens; "none". Nothing else is computed.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[G, n, r]`` and ``[G, m, r]``.

    Raises:
        ValueError: shapes, dtypes or a fusion that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_choice("fusion", fusion, FUSIONS)
    check_shape("visual", visual, "G", "n", "r")
    check_shape("audio", audio, visual.shape[0], "m", visual.shape[2])
    check_shape("gate_visual", gate_visual, 1)
    check_shape("gate_audio", gate_audio, 1)
    check_alike("cross_modal_attention", visual=visual, audio=audio, gate_visual=gate_visual, gate_audio=gate_audio)
    tensors = visual, audio, gate_visual, gate_audio
    return select("cross_modal_attention", impl, *tensors, fusion=fusion)(*tensors, fusion=fusion)


# Bytes of a tile of scores in the tiled form: with its gradients it should stay in the last-level cache.
TILE_BYTES = 5 * 2**20
# Below this many bytes of scores a frame the library's fused attention is as fast and runs all frames in one call.
_SMALL_SCORES = 2**20


class _TiledAttention(torch.autograd.Function):
    """``(softmax(V A^T) A, softmax(A V^T) V)`` on the CPU in float32, one tile of scores at a time, by oneDNN's products.

    The backward recomputes each tile once for both softmaxes (card: formulas and saved tensors).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, visual: Tensor, audio: Tensor, to_visual: bool, to_audio: bool) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        heard_visual, lse_visual = _attend_in_tiles(visual, audio) if to_visual else (None, None)
        heard_audio, lse_audio = _attend_in_tiles(audio, visual) if to_audio else (None, None)
        ctx.save_for_backward(visual, audio, heard_visual, heard_audio, lse_visual, lse_audio)
        return heard_visual, heard_audio

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_visual: Tensor | None, grad_audio: Tensor | None) -> tuple[Tensor | None, ...]:
        visual, audio, heard_visual, heard_audio, lse_visual, lse_audio = ctx.saved_tensors
        d_visual, d_audio = torch.zeros_like(visual), torch.zeros_like(audio)
        to_visual, to_audio = grad_visual is not None, grad_audio is not None
        for group in range(len(visual)):
            a = audio[group].contiguous()
            if to_audio:
                g_a = grad_audio[group].contiguous()
                minus_e = -(g_a * heard_audio[group]).sum(-1)  # [m]
            for rows in _tiles(visual.shape[1], len(a)):
                v = visual[group, rows].contiguous()
                scores, d_scores = linear(v, a), 0
                if to_visual:
                    g_v = grad_visual[group, rows].contiguous()
                    d = (g_v * heard_visual[group, rows]).sum(-1, keepdim=True)  # [rows, 1]
                    p = torch.sub(scores, lse_visual[group, rows]).exp_()
                    d_scores = linear(g_v, a).sub_(d).mul_(p)
                    d_audio[group].addmm_(p.t(), g_v)
                if to_audio:
                    q = scores.sub_(lse_audio[group, :, 0]).exp_()
                    d_scores = linear(v, g_a, minus_e).mul_(q).add_(d_scores)
                    d_visual[group, rows] = input_gradient(q, g_a)
                d_visual[group, rows] += input_gradient(d_scores, a)
                d_audio[group].addmm_(d_scores.t(), v)
        return d_visual, d_audio, None, None


class _BatchedAttention(torch.autograd.Function):
    """``(softmax(V A^T) A, softmax(A V^T) V)`` of short sequences on the CPU: fused forward, backward in batched products."""

    @staticmethod
    def forward(ctx, visual: Tensor, audio: Tensor, to_visual: bool, to_audio: bool) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(visual, audio)
        return _attend(visual, audio) if to_visual else None, _attend(audio, visual) if to_audio else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_visual: Tensor | None, grad_audio: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_batched_backward(grad_visual, grad_audio, *ctx.saved_tensors), None, None


# An operator of its own, so that the compiler, which would bind the number of groups, does not look inside.
@torch.library.custom_op("stgcma_fast::cross_modal_batched_bwd", mutates_args=())
def _batched_backward(
    grad_visual: Tensor | None, grad_audio: Tensor | None, visual: Tensor, audio: Tensor
) -> tuple[Tensor, Tensor]:
    d_visual, d_audio = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (visual, audio))
    listeners = (visual, audio, grad_visual, d_visual, d_audio), (audio, visual, grad_audio, d_audio, d_visual)
    groups = max(1, TILE_BYTES // (visual.element_size() * visual.shape[1] * audio.shape[1]))
    for listener in listeners:
        if listener[2] is None:
            continue
        for queries, keys, grad, d_queries, d_keys in zip(*(x.split(groups) for x in listener), strict=True):
            with torch.autocast("cpu", enabled=False):
                p = torch.bmm(queries, keys.mT).softmax(-1)
                d_scores = softmax_gradient(torch.bmm(grad, keys.mT), p)
                d_queries.baddbmm_(d_scores, keys)
                d_keys.baddbmm_(d_scores.mT, queries).baddbmm_(p.mT, grad)
    return d_visual, d_audio


@_batched_backward.register_fake
def _(grad_visual, grad_audio, visual, audio):
    return visual.new_empty(visual.shape), audio.new_empty(audio.shape)


def _tiles(rows: int, columns: int) -> list[slice]:
    step = max(1, TILE_BYTES // (4 * columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _attend_in_tiles(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T) k`` and the scores' log-sum-exp ``[G, n, 1]``."""
    heard, lse = torch.empty_like(queries), queries.new_empty(*queries.shape[:2], 1)
    for group in range(len(queries)):
        k = keys[group].contiguous()
        for rows in _tiles(queries.shape[1], len(k)):
            scores = linear(queries[group, rows].contiguous(), k)
            peak = scores.amax(-1, keepdim=True)
            total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
            heard[group, rows] = input_gradient(scores, k).div_(total)
            lse[group, rows] = peak + total.log()
    return heard, lse


def _attend(queries: Tensor, keys: Tensor) -> Tensor:
    # The library's fused attention never writes the n x m scores; one head, no scale.
    return F.scaled_dot_product_attention(queries[:, None], keys[:, None], keys[:, None], scale=1.0)[:, 0]


def _torch(
    visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor, *, fusion: str = "both"
) -> tuple[Tensor, Tensor]:
    to_visual, to_audio = listening(fusion)
    dtype = product_dtype(visual)
    lengths = visual.shape[1], audio.shape[1]
    if min(lengths) > 0 and is_short(visual.device, dtype, max(lengths)):
        streams = visual.to(dtype), audio.to(dtype)
        heard_visual, heard_audio = _BatchedAttention.apply(*streams, to_visual, to_audio)
    elif served_by_onednn(visual, audio) and 4 * visual.shape[1] * audio.shape[1] > _SMALL_SCORES:
        heard_visual, heard_audio = _TiledAttention.apply(visual, audio, to_visual, to_audio)
    else:
        heard_visual = _attend(visual, audio) if to_visual else None
        heard_audio = _attend(audio, visual) if to_audio else None
    return (
        visual + gate_visual * heard_visual if to_visual else visual,
        audio + gate_audio * heard_audio if to_audio else audio,
    )


def _fwd_fake(visual, audio, gate_visual, gate_audio, fusion, dtype):
    listeners = list(zip((visual, audio), listening(fusion), strict=True))
    gates = gate_visual, gate_audio
    wide = [
        torch.promote_types(torch.promote_types(x.dtype, g.dtype), dtype) for (x, _), g in zip(listeners, gates, strict=True)
    ]
    outs = [x.new_empty(x.shape if listens else 0, dtype=d) for (x, listens), d in zip(listeners, wide, strict=True)]
    heards = [out.new_empty(out.shape, dtype=dtype) for out in outs]
    return *outs, *heards, *(x.new_empty(x.shape[:-1] if listens else 0, dtype=torch.float32) for x, listens in listeners)


def _bwd_fake(
    grad_visual,
    grad_audio,
    visual,
    audio,
    gate_visual,
    gate_audio,
    heard_visual,
    heard_audio,
    lse_visual,
    lse_audio,
    fusion,
    needs_tokens,
):
    grads = [x.new_empty(x.shape if needs_tokens else 0) for x in (visual, audio)]
    listeners = zip((visual, audio), listening(fusion), strict=True)
    return *grads, *(x.new_empty(x.shape[:-1] if listens else 0, dtype=torch.float32) for x, listens in listeners)


_fwd = define(
    "cross_modal",
    "cross_modal_fwd(Tensor visual, Tensor audio, Tensor gate_visual, Tensor gate_audio, str fusion, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = define(
    "cross_modal",
    "cross_modal_bwd(Tensor grad_visual, Tensor grad_audio, Tensor visual, Tensor audio, Tensor gate_visual, Tensor gate_audio,"
    " Tensor heard_visual, Tensor heard_audio, Tensor lse_visual, Tensor lse_audio, str fusion, bool needs_tokens)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _CrossModal(torch.autograd.Function):
    """The outputs of the streams that listen, in the order visual, audio."""

    @staticmethod
    def forward(
        ctx, visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor, fusion: str, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        out_visual, out_audio, *kept = _fwd(visual, audio, gate_visual, gate_audio, fusion, dtype)
        ctx.fusion = fusion
        ctx.save_for_backward(visual, audio, gate_visual, gate_audio, *kept)
        return tuple(out for out, listens in zip((out_visual, out_audio), listening(fusion), strict=True) if listens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        visual, audio, gate_visual, gate_audio, *kept = ctx.saved_tensors
        fusion, (needs_visual, needs_audio, needs_gate_visual, needs_gate_audio, *_) = ctx.fusion, ctx.needs_input_grad
        to_visual, to_audio = listening(fusion)
        # A stream that does not listen is passed on outside, so nothing comes back to it from here.
        grad_visual = grads[0] if to_visual else torch.zeros_like(visual)
        grad_audio = grads[-1] if to_audio else torch.zeros_like(audio)
        d_visual, d_audio, delta_visual, delta_audio = _bwd(
            grad_visual, grad_audio, visual, audio, gate_visual, gate_audio, *kept, fusion, needs_visual or needs_audio
        )
        return (
            d_visual if needs_visual else None,
            d_audio if needs_audio else None,
            delta_visual.sum().to(gate_visual.dtype).view(1) if needs_gate_visual and to_visual else None,
            delta_audio.sum().to(gate_audio.dtype).view(1) if needs_gate_audio and to_audio else None,
            None,
            None,
        )


def _triton(
    visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor, *, fusion: str = "both"
) -> tuple[Tensor, Tensor]:
    if fusion == "none":
        return visual, audio
    outs = _CrossModal.apply(visual, audio, gate_visual, gate_audio, fusion, product_dtype(visual))
    to_visual, to_audio = listening(fusion)
    return outs[0] if to_visual else visual, outs[-1] if to_audio else audio


def _limits(visual: Tensor, audio: Tensor, *gates: Tensor, fusion: str) -> Iterator[str]:
    if 0 in (visual.shape[1], audio.shape[1]):
        yield "its kernels need a token in each stream"
    if visual.shape[2] > LARGEST_RANK:
        yield f"its kernels take hidden tokens of at most {LARGEST_RANK} channels, got {visual.shape[2]}"


register(
    "cross_modal_attention",
    triton=Implementation(_triton, _limits),
    torch=_torch,
    reference=reference.cross_modal_attention,
)

"""The AV-adapter: two adapters whose hidden tokens attend to each other. Card: docs/ops/av_adapter.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.adapter import AdapterParams
from ..reference.windows import WindowGrid
from .adapter import adapter_limits, down, packed_rows_fake, packed_weights_fake, unpack_rows, unpack_weight_grads, up
from .boundary import define
from .checks import check_adapter, check_alike, check_choice, check_shape
from .cross_modal import FUSIONS, cross_modal_attention, listening
from .dispatch import Impl, Implementation, product_dtype, register, select
from .windows import window_partition, window_reverse


def av_adapter(
    visual: Tensor,
    audio: Tensor,
    visual_params: AdapterParams,
    audio_params: AdapterParams,
    gate_visual: Tensor,
    gate_audio: Tensor,
    *,
    residual_visual: Tensor | None = None,
    residual_audio: Tensor | None = None,
    window: WindowGrid | None = None,
    fusion: str = "both",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """``residual + x + up(CAIM(gelu(down(x))))`` for both streams, equations 1 to 5, 11 and 15.

    Args:
        visual: ``[F, n, D]`` tokens of F frames, any floating dtype.
        audio: ``[F, m, D]`` tokens of the F audio chunks that go with them.
        visual_params, audio_params: the two adapters, of one bottleneck width unless ``fusion`` is "none".
        gate_visual, gate_audio: ``[1]``, alpha and beta.
        residual_visual, residual_audio: ``[F, n, D]``, ``[F, m, D]`` or None.
        window: exchange within pairs of windows instead of whole frames; then n = m = height * width.
        fusion: as in `cross_modal_attention`.
        impl: which implementation serves; anything but "auto" runs as asked or raises.

    Returns:
        ``[F, n, D]`` and ``[F, m, D]``.

    Raises:
        ValueError: shapes, dtypes, a window grid or a fusion that do not fit.
        NotImplementedError: ``impl`` cannot serve; the text gives every reason.
    """
    check_choice("fusion", fusion, FUSIONS)
    check_shape("visual", visual, "F", "n", "D")
    check_shape("audio", audio, visual.shape[0], "m", visual.shape[2])
    check_adapter("visual_params", visual_params, visual.shape[2])
    check_adapter("audio_params", audio_params, audio.shape[2])
    if fusion != "none":
        check_shape("audio_params.down_bias", audio_params.down_bias, visual_params.down_bias.shape[0])
    for name, residual, x in (("residual_visual", residual_visual, visual), ("residual_audio", residual_audio, audio)):
        if residual is not None:
            check_shape(name, residual, *x.shape)
    check_alike(
        "av_adapter",
        visual=visual,
        audio=audio,
        gate_visual=gate_visual,
        gate_audio=gate_audio,
        **{f"visual_{name}": t for name, t in visual_params._asdict().items()},
        **{f"audio_{name}": t for name, t in audio_params._asdict().items()},
    )
    if window is not None:
        check_window_grid(window, visual.shape[1], audio.shape[1])
    tensors = visual, audio, visual_params, audio_params, gate_visual, gate_audio
    options = {"residual_visual": residual_visual, "residual_audio": residual_audio, "window": window, "fusion": fusion}
    return select("av_adapter", impl, *tensors, **options)(*tensors, **options)


def check_window_grid(window: WindowGrid, *tokens: int) -> None:
    """Raise ValueError unless whole windows cover the grid and the grid holds the given numbers of tokens."""
    height, width, size, shift = window
    if size < 1 or height % size or width % size or not 0 <= shift < size:
        raise ValueError(f"window: expected height and width in multiples of size and 0 <= shift < size, got {window}")
    if any(n != height * width for n in tokens):
        raise ValueError(
            f"window: {height} x {width} holds {height * width} tokens, got frames of {' and '.join(map(str, tokens))}"
        )


def _torch(
    visual: Tensor,
    audio: Tensor,
    visual_params: AdapterParams,
    audio_params: AdapterParams,
    gate_visual: Tensor,
    gate_audio: Tensor,
    *,
    residual_visual: Tensor | None,
    residual_audio: Tensor | None,
    window: WindowGrid | None,
    fusion: str,
) -> tuple[Tensor, Tensor]:
    pair = down(visual, visual_params), down(audio, audio_params)
    if fusion != "none" and window is None:
        pair = cross_modal_attention(*pair, gate_visual, gate_audio, fusion=fusion, impl="torch")
    elif fusion != "none":
        height, width, size, shift = window
        windows = (window_partition(h.unflatten(1, (height, width)), size, shift) for h in pair)
        windows = cross_modal_attention(
            *(w.flatten(0, 1) for w in windows), gate_visual, gate_audio, fusion=fusion, impl="torch"
        )
        pair = (window_reverse(w.unflatten(0, (len(visual), -1)), height, width, size, shift).flatten(1, 2) for w in windows)
    sums = (x if residual is None else residual + x for x, residual in ((visual, residual_visual), (audio, residual_audio)))
    return tuple(x + up(h, p) for x, h, p in zip(sums, pair, (visual_params, audio_params), strict=True))


def _fwd_fake(xs, residuals, down_weights, down_biases, up_weights, up_biases, gates, window, fusion, dtype):
    rank = down_biases[0].shape[0]
    outs, hiddens, heards, lses = [], [], [], []
    for x, residual, listens in zip(xs, residuals, listening(fusion), strict=True):
        wide = torch.promote_types(x.dtype, dtype)
        wide = wide if residual is None else torch.promote_types(wide, residual.dtype)
        outs.append(x.new_empty(x.shape, dtype=wide))
        hiddens.append(x.new_empty(*x.shape[:2], rank, dtype=dtype))
        heards.append(hiddens[-1].new_empty(hiddens[-1].shape if listens else 0))
        lses.append(x.new_empty(x.shape[:2] if listens else 0, dtype=torch.float32))
    return outs, hiddens, heards, lses


_fwd = define(
    "av_adapter",
    "av_adapter_fwd(Tensor[] xs, Tensor?[] residuals, Tensor[] down_weights, Tensor[] down_biases, Tensor[] up_weights,"
    " Tensor[] up_biases, Tensor[] gates, int[] window, str fusion, ScalarType dtype)"
    " -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _fwd_fake,
)


def _bwd_fake(
    grads, xs, down_weights, down_biases, up_weights, gates, hiddens, heards, lses, window, fusion, needs_x, needs_weights
):
    return (
        packed_rows_fake(xs, needs_x),
        packed_weights_fake(xs, down_weights) if needs_weights else [],
        [torch.empty_like(lse) for lse in lses],
    )


_bwd = define(
    "av_adapter",
    "av_adapter_bwd(Tensor[] grads, Tensor[] xs, Tensor[] down_weights, Tensor[] down_biases, Tensor[] up_weights,"
    " Tensor[] gates, Tensor[] hiddens, Tensor[] heards, Tensor[] lses, int[] window, str fusion, bool needs_x,"
    " bool needs_weights)"
    " -> (Tensor, Tensor[], Tensor[])",
    _bwd_fake,
)


class _AVAdapter(torch.autograd.Function):
    """Inputs in pairs, visual then audio: tokens, residuals, gates; then the four weights of each."""

    @staticmethod
    def forward(ctx, window: list[int], fusion: str, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        xs, residuals, gates = tensors[:2], tensors[2:4], tensors[4:6]
        params = AdapterParams(*tensors[6:10]), AdapterParams(*tensors[10:])
        weights = [list(each) for each in zip(*params, strict=True)]
        outs, hiddens, heards, lses = _fwd(list(xs), list(residuals), *weights, list(gates), window, fusion, dtype)
        ctx.window, ctx.fusion = window, fusion
        ctx.residual_dtypes = [None if r is None else r.dtype for r in residuals]
        ctx.save_for_backward(*xs, *gates, *params[0], *params[1], *hiddens, *heards, *lses)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        params = AdapterParams(*saved[4:8]), AdapterParams(*saved[8:12])
        xs, gates, hiddens, heards, lses = (list(saved[i : i + 2]) for i in (0, 2, 12, 14, 16))
        needs_x, needs_weights = any(needs[:2]), any(needs[6:])
        needs_gates = [need and listen for need, listen in zip(needs[4:6], listening(ctx.fusion), strict=True)]
        dx, packed, deltas = None, [], []
        if needs_x or needs_weights or any(needs_gates):
            weights = [list(each) for each in zip(*params, strict=True)][:3]
            dx, packed, deltas = _bwd(
                list(grads), xs, *weights, gates, hiddens, heards, lses, ctx.window, ctx.fusion, needs_x, needs_weights
            )
        d_residuals = [None if dtype is None else g.to(dtype) for g, dtype in zip(grads, ctx.residual_dtypes, strict=True)]
        d_gates = [deltas[i].sum().to(gates[i].dtype).view(1) if need else None for i, need in enumerate(needs_gates)]
        d_weights = [g for p in unpack_weight_grads(packed, params) for g in p] if needs_weights else [None] * 8
        return None, None, None, *(unpack_rows(dx, xs) if needs_x else (None, None)), *d_residuals, *d_gates, *d_weights


def _triton(
    visual: Tensor,
    audio: Tensor,
    visual_params: AdapterParams,
    audio_params: AdapterParams,
    gate_visual: Tensor,
    gate_audio: Tensor,
    *,
    residual_visual: Tensor | None,
    residual_audio: Tensor | None,
    window: WindowGrid | None,
    fusion: str,
) -> tuple[Tensor, Tensor]:
    pairs = visual, audio, residual_visual, residual_audio, gate_visual, gate_audio
    grid = [] if window is None else list(window)
    return _AVAdapter.apply(grid, fusion, product_dtype(visual), *pairs, *visual_params, *audio_params)


def _limits(
    visual: Tensor,
    audio: Tensor,
    visual_params: AdapterParams,
    audio_params: AdapterParams,
    *gates: Tensor,
    **options: Any,
) -> Iterator[str]:
    yield from adapter_limits([visual_params, audio_params], [options["residual_visual"], options["residual_audio"]])
    if 0 in (visual.shape[1], audio.shape[1]):
        yield "its kernels need a token in each stream"
    if len(visual_params.down_bias) != len(audio_params.down_bias):
        yield "its kernels take two adapters of one bottleneck width"
    if visual.dtype != audio.dtype:
        yield f"its kernels take two streams of one dtype, got {visual.dtype} and {audio.dtype}"


register("av_adapter", triton=Implementation(_triton, _limits), torch=_torch, reference=reference.av_adapter)

"""The AV-adapter: two adapters whose hidden tokens attend to each other. Card: docs/ops/av_adapter.md."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..reference.adapter import AdapterParams
from ..reference.windows import WindowGrid, window_partition, window_reverse
from .adapter import down, up
from .checks import check_adapter, check_choice, check_one_dtype, check_shape
from .cross_modal import FUSIONS, cross_modal_attention
from .dispatch import Impl, register, select


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
    check_one_dtype(
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


register("av_adapter", torch=_torch, reference=reference.av_adapter)

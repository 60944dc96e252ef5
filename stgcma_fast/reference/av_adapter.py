"""The AV-adapter (equations 1 to 5): two adapters whose hidden tokens attend to each other."""

from __future__ import annotations

from torch import Tensor

from .adapter import AdapterParams, down, up
from .cross_modal import cross_modal_attention
from .windows import WindowGrid, window_partition, window_reverse


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
) -> tuple[Tensor, Tensor]:
    """``residual + x + up(CAIM(down(x)))`` for both streams (equations 11 and 15, expanded).

    Args:
        visual: ``[F, n, D]`` tokens of F frames.
        audio: ``[F, m, D]`` tokens of the F audio chunks that go with them.
        visual_params, audio_params: the two adapters.
        gate_visual, gate_audio: ``[1]``, alpha and beta.
        residual_visual, residual_audio: ``[F, n, D]``, ``[F, m, D]`` or None.
        window: exchange within pairs of windows (no shift mask) instead of whole frames; then n = m = height * width.
        fusion: as in `cross_modal_attention`.
    """
    hidden_visual, hidden_audio = down(visual, visual_params), down(audio, audio_params)
    if window is None:
        hidden_visual, hidden_audio = cross_modal_attention(hidden_visual, hidden_audio, gate_visual, gate_audio, fusion=fusion)
    elif fusion != "none":
        height, width, size, shift = window
        frames, tokens, rank = hidden_visual.shape
        pair = [
            window_partition(h.view(frames, height, width, rank), size, shift).flatten(0, 1)
            for h in (hidden_visual, hidden_audio)
        ]
        pair = cross_modal_attention(*pair, gate_visual, gate_audio, fusion=fusion)
        hidden_visual, hidden_audio = (
            window_reverse(h.view(frames, -1, size * size, rank), height, width, size, shift).view(frames, tokens, rank)
            for h in pair
        )
    visual, audio = visual + up(hidden_visual, visual_params), audio + up(hidden_audio, audio_params)
    if residual_visual is not None:
        visual = residual_visual + visual
    if residual_audio is not None:
        audio = residual_audio + audio
    return visual, audio

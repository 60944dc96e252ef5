"""The parameter-free two-way cross-attention of the AV-adapter (equations 3 and 4)."""

from __future__ import annotations

from torch import Tensor


def cross_modal_attention(
    visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor, *, fusion: str = "both"
) -> tuple[Tensor, Tensor]:
    """``V' = V + alpha softmax(V A^T) A`` and ``A' = A + beta softmax(A V^T) V``; the scores are not scaled.

    Args:
        visual: ``[G, n, r]`` hidden tokens.
        audio: ``[G, m, r]`` hidden tokens.
        gate_visual: ``[1]``, alpha.
        gate_audio: ``[1]``, beta.
        fusion: "both"; "a2v", the first line alone; "v2a", the second alone; "none".
    """
    fused_visual, fused_audio = visual, audio
    if fusion in ("both", "a2v"):
        fused_visual = visual + gate_visual * ((visual @ audio.transpose(-1, -2)).softmax(-1) @ audio)
    if fusion in ("both", "v2a"):
        fused_audio = audio + gate_audio * ((audio @ visual.transpose(-1, -2)).softmax(-1) @ visual)
    return fused_visual, fused_audio

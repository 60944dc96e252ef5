"""The parameter-free two-way cross-attention of the AV-adapter. Card: docs/ops/cross_modal.md."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .checks import check_choice, check_one_dtype, check_shape
from .dispatch import Impl, register, select

FUSIONS = ("both", "a2v", "v2a", "none")


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
    check_one_dtype("cross_modal_attention", visual=visual, audio=audio, gate_visual=gate_visual, gate_audio=gate_audio)
    return select("cross_modal_attention", impl)(visual, audio, gate_visual, gate_audio, fusion=fusion)


def _listen(to_fuse: Tensor, other: Tensor, gate: Tensor) -> Tensor:
    # The library's fused attention never writes the n x m scores; one head, no scale.
    heard = F.scaled_dot_product_attention(to_fuse[:, None], other[:, None], other[:, None], scale=1.0)
    return to_fuse + gate * heard[:, 0]


def _torch(
    visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor, *, fusion: str = "both"
) -> tuple[Tensor, Tensor]:
    return (
        _listen(visual, audio, gate_visual) if fusion in ("both", "a2v") else visual,
        _listen(audio, visual, gate_audio) if fusion in ("both", "v2a") else audio,
    )


register("cross_modal_attention", torch=_torch, reference=reference.cross_modal_attention)

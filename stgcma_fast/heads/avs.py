"""The fast way through the AVS head, and its losses. The parameters are those of `reference.avs`.

Maps keep their channels last in memory, as tokens have them. TPAVI's M x M attention over all M = T * R * R pixels is a product
of three matrices with no softmax between them, and what attends is the same at every pixel of a frame, so that it comes down to
one small matrix a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.avs import DilatedConvs, Tpavi, first_frames, fuse


def _dilated(convs: DilatedConvs, x: Tensor) -> Tensor:
    """`DilatedConvs` without the products with padding: where the dilation is as large as the map, only the middle meets it."""
    whole = [conv for conv in convs.conv2d_list if conv.dilation[0] < x.shape[-1]]
    middle = [conv for conv in convs.conv2d_list if conv.dilation[0] >= x.shape[-1]]
    parts = [conv(x) for conv in whole]
    if middle:
        weight = sum(conv.weight[:, :, 1:2, 1:2] for conv in middle)
        parts.append(F.conv2d(x, weight, sum(conv.bias for conv in middle)))
    return reduce(torch.add, parts)


def tpavi(module: Tpavi, x: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """`Tpavi` on ``[B, T, N, 256]``: ``y = theta K`` for ``K = sum_t phi_t (sum_n g_tn)^T / M``, 128 x 128, without rounding
    between the products: ``W_z y`` is one 256 x 256 matrix of each clip times the pixels."""
    aligned = module.align_channel(audio)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        (theta, theta_bias), (phi, phi_bias), (g, g_bias), (w, w_bias) = (
            (conv.weight.flatten(1).to(dtype), conv.bias.to(dtype))
            for conv in (module.theta, module.phi, module.g, module.W_z[0])
        )
        sums = F.linear(x.sum(2, dtype=dtype), g, x.shape[2] * g_bias)
        k = F.linear(aligned.to(dtype), phi, phi_bias).mT @ sums / (x.shape[1] * x.shape[2])
        kw = k @ w.T
        matrix, offset = (theta.T @ kw).to(x.dtype), (theta_bias @ kw + w_bias).to(x.dtype)
    y = torch.baddbmm(offset[:, None], x.flatten(1, 2), matrix).view_as(x)
    # The module itself, of whose type a distributed training may have made another, on a view of what it expects.
    side = round(x.shape[2] ** 0.5)
    y = module.W_z[1](y.unflatten(2, (side, side)).movedim(-1, 1)).movedim(1, -1).flatten(2, 3)
    return module.norm_layer(y + x), aligned


def segment(
    model: nn.Module, visual: Sequence[Tensor], audio: Tensor, first_frame: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outputs of the model; arguments and results are those of `reference.avs.avs_head`."""
    batch, frames = audio.shape[:2]
    heard = model.avstask_audio_linear(audio.mean(2))
    maps, aligned = [], []
    for stage, tokens in enumerate(visual):
        n, side = stage + 1, model.config.backbone.resolution(stage)
        x = getattr(model, f"avstask_x{n}_linear")(tokens).flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        x = _dilated(getattr(model, f"avstask_conv{n}"), x).permute(0, 2, 3, 1).reshape(batch, frames, side * side, -1)
        z, a = tpavi(getattr(model, f"avstask_tpavi_b{n}"), x, heard)
        maps.append(z.relu().flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2))
        aligned.append(a)
    return fuse(model, first_frames(maps, frames) if first_frame else maps), maps, aligned


def avs_loss(prediction: Tensor, mask: Tensor, *, all_frames: bool = False, iou_weight: float = 0.0) -> Tensor:
    """Binary cross-entropy of the first frame of each clip, which alone has a mask to train on: the published loss.

    Args:
        prediction: logits ``[B * T, 1, height, width]``, t running fastest.
        mask: ``[B, 1, 1, height, width]`` or ``[B, T, 1, height, width]`` in [0, 1].
        all_frames: supervise every frame of the clip.
        iou_weight: add so much of ``1 - intersection / union``, a frame's mean, both of probabilities.

    Raises:
        ValueError: shapes that do not fit.
    """
    frames, rest = divmod(len(prediction), len(mask))
    counts = (frames,) if all_frames else (1, frames)
    if rest or mask.shape not in [(len(mask), count, *prediction.shape[1:]) for count in counts]:
        raise ValueError(
            f"mask: got shape {list(mask.shape)} for logits {list(prediction.shape)}, expected [B, "
            f"{'T' if all_frames else '1 or T'}, 1, height, width] for logits [B * T, 1, height, width]"
        )
    # In half precision the sums over a frame's pixels overflow, or lose most of them.
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32)).unflatten(0, (-1, frames))
    if not all_frames:
        prediction, mask = prediction[:, 0], mask[:, 0]
    mask = mask.to(prediction.dtype)
    # With logits: sigmoid and logarithm apart lose what saturates, and are refused under autocast.
    loss = F.binary_cross_entropy_with_logits(prediction, mask)
    if iou_weight:
        probability, mask = prediction.sigmoid().flatten(-3), mask.flatten(-3)
        intersection = (probability * mask).sum(-1)
        union = (probability + mask).sum(-1) - intersection
        # One pixel more on both sides: a frame without mask has a gradient, too.
        loss = loss + iou_weight * (1 - (intersection + 1) / (union + 1)).mean()
    return loss

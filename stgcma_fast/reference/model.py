"""The whole model as in the paper, one stream after the other: the oracle of every test, the baseline of every benchmark.

Parameter and buffer names are those of the published checkpoints. Shapes: B clips, T frames (and audio chunks), F = B * T,
N tokens of a frame, C channels. Section and equation numbers refer to the STG-CMA paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import AdapterParams, adapter
from .av_adapter import av_adapter
from .avqa import avqa_head, build_avqa
from .avs import avs_head, build_avs
from .gelu import gelu
from .inputs import check_inputs
from .layer_norm import layer_norm
from .spatial_attention import spatial_attention
from .temporal_attention import temporal_attention
from .window_attention import window_attention
from .windows import WindowGrid, shift_mask

if TYPE_CHECKING:
    from ..config import ClipConfig, ModelConfig, SwinConfig

TRAINABLE = (
    *("adapter", "Adapter", "temporal_embedding", "ln_post", "gate_", "temporal_position_bias_table"),
    *("mlp_head.", "avstask_", "avqatask_"),
)


def is_trainable(name: str) -> bool:
    """Whether the paper trains the parameter of this name; of a buffer, whether training changes it."""
    return any(part in name for part in TRAINABLE)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class Adapter(nn.Module):
    """The weights of one adapter. ``D_fc2`` starts at zero, so that the network starts as the frozen transformer."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.D_fc1 = nn.Linear(dim, rank)
        self.D_fc2 = nn.Linear(rank, dim)

    @property
    def params(self) -> AdapterParams:
        return AdapterParams(self.D_fc1.weight, self.D_fc1.bias, self.D_fc2.weight, self.D_fc2.bias)


def drop_path(x: Tensor, rate: float, training: bool, shape: tuple[int, ...]) -> Tensor:
    """Stochastic depth: zero whole slices of ``x`` (those along which ``shape`` is 1) with probability ``rate``."""
    if not training or rate == 0:
        return x
    return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - rate).div_(1 - rate)


def drop_rates(last: float, blocks: int) -> list[float]:
    """Rates of stochastic depth, rising linearly from 0 in the first block to ``last``."""
    return [last * block / max(1, blocks - 1) for block in range(blocks)]


class Block(nn.Module):
    """Temporal, spatial and global adaptation around one frozen transformer block (section 3).

    A subclass holds the frozen layers under their published names and says which adapter serves which step.
    """

    SPATIAL: str
    GLOBAL: str

    def __init__(self, config: ModelConfig, dim: int, rank: int, has_temporal: bool, drop_rate: float) -> None:
        super().__init__()
        self.config = config
        self.drop_rate = drop_rate
        self.has_temporal = has_temporal and (config.use_temporal or config.temporal_without_adapter)
        self.parallel_adapter = False
        self.gate_v = nn.Parameter(torch.zeros(1))
        self.gate_a = nn.Parameter(torch.zeros(1))
        steps = [("T_Adapter", has_temporal and config.use_temporal), (self.SPATIAL, config.use_spatial)]
        for step, used in [*steps, (self.GLOBAL, config.use_global)]:
            for modality in config.adapt if used else ():
                setattr(self, self._name(step, modality), Adapter(dim, rank))

    @staticmethod
    def _name(step: str, modality: str) -> str:
        return step + ("_Audio" if modality == "audio" else "")

    def adapter_params(self, step: str, modality: str) -> AdapterParams:
        return getattr(self, self._name(step, modality)).params

    def temporal(self, x: Tensor, modality: str) -> Tensor:
        """``X_t <- X_t + DropPath(TAdapter(MHSA_T(LN(X_t))))``, equations 6 and 7, on ``[B, T, N, C]``."""
        attended = self.temporal_mhsa(x, modality)
        if self.config.use_temporal:
            attended = adapter(attended, self.adapter_params("T_Adapter", modality))
        return x + self.drop_temporal(attended)

    def adapt(
        self, step: str, streams: dict[str, Tensor], medial: dict[str, Tensor], used: bool, window: WindowGrid | None = None
    ) -> dict[str, Tensor]:
        """``X <- X + X_med + W_u h'``: the AV-adapter and both residuals, equations 10, 11, 14 and 15."""
        adapted = self.config.adapt if used else ()
        if len(adapted) < 2:
            return {
                m: adapter(medial[m], self.adapter_params(step, m), x + medial[m]) if m in adapted else x + medial[m]
                for m, x in streams.items()
            }
        frames = {m: x.flatten(0, 1) for m, x in streams.items()}
        visual, audio = av_adapter(
            medial["visual"].flatten(0, 1),
            medial["audio"].flatten(0, 1),
            self.adapter_params(step, "visual"),
            self.adapter_params(step, "audio"),
            self.gate_v,
            self.gate_a,
            residual_visual=frames["visual"],
            residual_audio=frames["audio"],
            window=window,
            fusion=self.config.fusion,
        )
        return {"visual": visual.view_as(streams["visual"]), "audio": audio.view_as(streams["audio"])}

    def global_step(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        """``X <- X + AVAdapter(FFN(LN(X)))``, equations 12 to 15."""
        return self.adapt(self.GLOBAL, streams, {m: self.ffn(x) for m, x in streams.items()}, self.config.use_global)

    def forward(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        """Streams ``[B, T, N, C]`` keyed by modality, to the same."""
        if self.has_temporal:
            streams = {m: self.temporal(x, m) if m in self.config.adapt else x for m, x in streams.items()}
        medial = {m: self.mhsa(x) for m, x in streams.items()}
        streams = self.adapt(self.SPATIAL, streams, medial, self.config.use_spatial, self.spatial_window)
        return self.global_step(streams)

    def frozen(self, x: Tensor) -> Tensor:
        """The transformer's own block alone, on ``[B, T, N, C]``; stochastic depth drops whole frames, on both residuals."""
        shape = (*x.shape[:2], 1, 1)
        x = x + drop_path(self.mhsa(x), self.drop_rate, self.training, shape)
        return x + drop_path(self.ffn(x), self.drop_rate, self.training, shape)


class Head(nn.Sequential):
    """Class scores of each segment: two linear layers with dropout for two streams, LayerNorm and one layer for one."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        if len(config.modalities) == 2:
            super().__init__(nn.Linear(2 * dim, 512), nn.Dropout(0.5), nn.Linear(512, config.num_classes))
        else:
            super().__init__(LayerNorm(dim), nn.Linear(dim, config.num_classes))


# ------------------------------------------------------------------------------------------------------------------- CLIP


class ClipAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x, quick=True)


class ClipBlock(Block):
    SPATIAL = "S_Adapter"
    GLOBAL = "MLP_Adapter"
    spatial_window = None

    def __init__(self, config: ModelConfig, drop_rate: float) -> None:
        backbone: ClipConfig = config.backbone
        dim = backbone.embed_dim
        super().__init__(config, dim, config.adapter_width(), True, drop_rate)
        self.heads = backbone.heads
        self.attn = ClipAttention(dim)
        self.ln_1 = LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * dim, dim))
        self.ln_2 = LayerNorm(dim)

    def qkv(self, x: Tensor) -> Tensor:
        """``[B, T, N, C]`` to ``[B, T, N, 3, h, d]``."""
        return F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias).unflatten(-1, (3, self.heads, -1))

    def temporal_mhsa(self, x: Tensor, modality: str) -> Tensor:
        qkv = self.qkv(x)
        return self.attn.out_proj(temporal_attention(qkv, None, scale=qkv.shape[-1] ** -0.5))

    def drop_temporal(self, x: Tensor) -> Tensor:
        # As published: the mask runs over token positions and is shared by all clips and frames.
        return drop_path(x, self.drop_rate, self.training, (1, 1, x.shape[2], 1))

    def mhsa(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        out = spatial_attention(qkv.flatten(0, 1), scale=qkv.shape[-1] ** -0.5)
        return self.attn.out_proj(out).view_as(x)

    def ffn(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x))


def build_clip(model: nn.Module, config: ModelConfig) -> int:
    """Register the published parameters on ``model``; the number of channels."""
    backbone: ClipConfig = config.backbone
    dim, patch = backbone.embed_dim, backbone.patch_size
    model.class_embedding = nn.Parameter(dim**-0.5 * torch.randn(dim))
    model.positional_embedding = nn.Parameter(dim**-0.5 * torch.randn(backbone.visual_tokens, dim))
    model.positional_embedding_audio = nn.Parameter(dim**-0.5 * torch.randn(backbone.audio_tokens, dim))
    model.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, dim))
    model.temporal_embedding_audio = nn.Parameter(torch.zeros(1, config.num_frames, dim))
    model.conv1 = nn.Conv2d(3, dim, patch, patch, bias=False)
    model.conv1_audio = nn.Conv2d(1, dim, patch, patch, bias=False)
    model.ln_pre = LayerNorm(dim)
    model.transformer = nn.Module()
    rates = drop_rates(config.drop_path, backbone.layers)
    model.transformer.resblocks = nn.ModuleList(ClipBlock(config, rate) for rate in rates)
    model.ln_post = LayerNorm(dim)
    return dim


def clip_embed(model: nn.Module, images: Tensor, conv: nn.Conv2d, positions: Tensor, times: Tensor) -> Tensor:
    """Images ``[B, T, c, height, width]`` to tokens ``[B, T, N, D]``, class token first, patches row by row."""
    batch, frames = images.shape[:2]
    x = conv(images.flatten(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([model.class_embedding.to(x).expand(len(x), 1, -1), x], 1) + positions
    return model.ln_pre(x.view(batch, frames, *x.shape[1:]) + times[:, :, None])


def clip_embeddings(model: nn.Module, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens ``[B, T, N, D]`` of every stream."""
    tables = {
        "visual": (model.conv1, model.positional_embedding, model.temporal_embedding),
        "audio": (model.conv1_audio, model.positional_embedding_audio, model.temporal_embedding_audio),
    }
    return {m: clip_embed(model, x, *tables[m]) for m, x in images.items()}


def clip_features(model: nn.Module, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """One feature ``[F, D]`` a stream: the class token after the last block."""
    streams = clip_embeddings(model, images)
    for block in model.transformer.resblocks:
        streams = block(streams)
    return {m: model.ln_post(x[:, :, 0]).flatten(0, 1) for m, x in streams.items()}


# ------------------------------------------------------------------------------------------------------------------- Swin


class SwinAttention(nn.Module):
    """Frozen window attention, and the trainable temporal tables of even blocks."""

    def __init__(self, dim: int, heads: int, window: int, num_frames: int, has_temporal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        position = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = position[:, :, None] - position[:, None, :] + window - 1
        self.register_buffer("relative_position_index", offset[0] * (2 * window - 1) + offset[1])
        if has_temporal:
            step = torch.arange(num_frames)
            coords = (step[:, None] - step[None, :] + num_frames - 1).flatten()
            for suffix in ("", "_audio"):
                table = nn.Parameter(torch.empty(2 * num_frames - 1, heads))
                self.register_parameter(f"temporal_position_bias_table{suffix}", table)
                nn.init.trunc_normal_(table, std=0.02)
            self.register_buffer("t_relative_coords", coords)
            self.register_buffer("t_relative_coords_a", coords.clone())
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def window_bias(self) -> Tensor:
        """``[h, L, L]`` for the L tokens of a window."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def temporal_bias(self, modality: str) -> Tensor:
        """``[h, T, T]``."""
        table, coords = self.temporal_position_bias_table, self.t_relative_coords
        if modality == "audio":
            table, coords = self.temporal_position_bias_table_audio, self.t_relative_coords_a
        frames = (len(table) + 1) // 2
        return table[coords].view(frames, frames, -1).permute(2, 0, 1)


class SwinBlock(Block):
    SPATIAL = "S_Adapter2"
    GLOBAL = "S_Adapter"

    def __init__(self, config: ModelConfig, stage: int, index: int, drop_rate: float) -> None:
        backbone: SwinConfig = config.backbone
        dim = backbone.width(stage)
        has_temporal = index % 2 == 0
        super().__init__(config, dim, config.adapter_width(stage), has_temporal, drop_rate)
        # The published one-stream Swin has an older FFN adapter: beside the FFN, at half scale, dropped frame by frame.
        self.parallel_adapter = config.use_global and len(config.modalities) == 1
        self.resolution, self.window, self.shift = backbone.resolution(stage), backbone.window, backbone.shift(stage, index)
        self.spatial_window = WindowGrid(self.resolution, self.resolution, self.window, self.shift)
        self.norm1 = LayerNorm(dim)
        self.attn = SwinAttention(dim, backbone.num_heads[stage], self.window, config.num_frames, has_temporal)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))
        self.register_buffer("attn_mask", shift_mask(*self.spatial_window) if self.shift else None)

    def qkv(self, x: Tensor) -> Tensor:
        """``[B, T, N, C]`` to ``[B, T, N, 3, h, d]``."""
        return self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.heads, -1))

    def temporal_mhsa(self, x: Tensor, modality: str) -> Tensor:
        qkv = self.qkv(x)
        return self.attn.proj(temporal_attention(qkv, self.attn.temporal_bias(modality), scale=qkv.shape[-1] ** -0.5))

    def drop_temporal(self, x: Tensor) -> Tensor:
        # As published: the mask runs over the token positions of each clip and is shared by its frames.
        return drop_path(x, self.drop_rate, self.training, (x.shape[0], 1, x.shape[2], 1))

    def mhsa(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(0, 1).unflatten(1, (self.resolution, self.resolution))
        out = window_attention(
            qkv,
            self.attn.window_bias(),
            window=self.window,
            shift=self.shift,
            scale=qkv.shape[-1] ** -0.5,
            mask=self.attn_mask,
        )
        return self.attn.proj(out).view_as(x)

    def ffn(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def global_step(self, streams: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.parallel_adapter:
            return super().global_step(streams)
        ((modality, x),) = streams.items()
        y = self.norm2(x)
        parallel = 0.5 * adapter(y, self.adapter_params(self.GLOBAL, modality))
        return {modality: x + self.mlp(y) + drop_path(parallel, self.drop_rate, self.training, (*x.shape[:2], 1, 1))}


class PatchMerging(nn.Module):
    """2 x 2 neighbours to one token of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = LayerNorm(4 * dim)

    def forward(self, x: Tensor, resolution: int) -> Tensor:
        grid = x.unflatten(2, (resolution // 2, 2, resolution // 2, 2))  # [B, T, row, row parity, column, column parity, C]
        x = grid.permute(0, 1, 2, 4, 5, 3, 6).reshape(*x.shape[:2], -1, 4 * x.shape[-1])
        return self.reduction(self.norm(x))


class SwinPatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, patch, patch), (1, patch, patch))
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, c, T, height, width]`` to tokens ``[B, T, N, C]``."""
        return self.norm(self.proj(x).flatten(3).permute(0, 2, 3, 1))


def build_swin(model: nn.Module, config: ModelConfig) -> int:
    """Register the published parameters on ``model``; the number of channels of the last stage."""
    backbone: SwinConfig = config.backbone
    rates = iter(drop_rates(config.drop_path, sum(backbone.depths)))
    model.patch_embed = SwinPatchEmbed(3, backbone.embed_dim, backbone.patch_size)
    model.patch_embed_audio = SwinPatchEmbed(1, backbone.embed_dim, backbone.patch_size)
    model.layers = nn.ModuleList()
    for stage, depth in enumerate(backbone.depths):
        layer = nn.Module()
        layer.blocks = nn.ModuleList(SwinBlock(config, stage, i, rate) for i, rate in enumerate(itertools.islice(rates, depth)))
        layer.downsample = PatchMerging(backbone.width(stage)) if stage < backbone.stages - 1 else None
        model.layers.append(layer)
    dim = backbone.width(backbone.stages - 1)
    model.norm = LayerNorm(dim)
    return dim


def swin_embeddings(model: nn.Module, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens ``[B, T, N, C]`` of every stream."""
    embeds = {"visual": model.patch_embed, "negative": model.patch_embed, "audio": model.patch_embed_audio}
    return {m: embeds[m](x.transpose(1, 2)) for m, x in images.items()}


def swin_tokens(model: nn.Module, images: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the heads read.

    Args:
        images: ``[B, T, c, height, width]`` a stream. A stream "negative" passes the frozen transformer alone.

    Returns:
        Normalized tokens ``[B, T, N, C]`` of every stream; for AVS, those of vision at the end of each earlier stage, which are
        not normalized, else nothing.
    """
    config = model.config
    streams, earlier = swin_embeddings(model, images), []
    for stage, layer in enumerate(model.layers):
        for block in layer.blocks:
            frozen = {m: block.frozen(x) for m, x in streams.items() if m not in config.modalities}
            streams = block({m: x for m, x in streams.items() if m in config.modalities}) | frozen
        if layer.downsample is not None:
            if config.task == "avs":
                earlier.append(streams["visual"])
            streams = {m: layer.downsample(x, config.backbone.resolution(stage)) for m, x in streams.items()}
    return {m: model.norm(x) for m, x in streams.items()}, earlier


# ------------------------------------------------------------------------------------------------------------------ Model


class ReferenceSTGCMA(nn.Module):
    """STG-CMA in plain PyTorch, exact in float64. State dictionary, call and outputs are those of `FastSTGCMA`.

    Args:
        config: a `ModelConfig`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.is_swin = hasattr(config.backbone, "window")
        dim = (build_swin if self.is_swin else build_clip)(self, config)
        if config.task == "ave":
            self.mlp_head = Head(dim, config)
        else:
            {"avs": build_avs, "avqa": build_avqa}[config.task](self, config)
        init_parameters(self)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trainable(name))

    def features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """What AVE's head reads, ``[B * T, D]`` a stream, from images ``[B, T, c, height, width]``."""
        if not self.is_swin:
            return clip_features(self, images)
        return {m: x.mean(2).flatten(0, 1) for m, x in self.tokens(images)[0].items()}

    def tokens(self, images: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the other heads read: see `swin_tokens`."""
        return swin_tokens(self, images)

    def segment(
        self, visual: Sequence[Tensor], audio: Tensor, first_frame: bool = False
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """AVS from tokens: see `avs_head`."""
        return avs_head(self, visual, audio, first_frame)

    def forward(
        self,
        audio: Tensor | None,
        video: Tensor | None,
        negative: Tensor | str | None = None,
        question: Tensor | None = None,
        mode: str | None = None,
        *,
        first_frame: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor], list[Tensor]] | tuple[Tensor, Tensor, Tensor | None]:
        """What the task asks for.

        Args:
            audio: filterbanks ``[B, T, time, mel]``, floating; ignored by a model without audio.
            video: normalized frames, floating: ``[B, 3, T, height, width]`` for AVE, ``[B, T, 3, height, width]`` for AVS and
                AVQA. Ignored by a model without vision.
            negative: AVQA's frames of other videos, as ``video``. None leaves out their part, on which the answers do not
                depend. For AVE and AVS ``mode`` may stand in its place, as in the published call.
            question: AVQA's words ``[B, L]``, integers.
            mode: the published call's last argument: "fusion" or "multimodal" for two streams, "audioonly" or "videoonly"
                for one. It has no effect beyond a check; the configuration decides.
            first_frame: of AVS: give logits of each clip's first frame alone, ``[B, 1, height, width]``, which is what the
                published loss reads. Other frames then pass no path from the maps to the logits.

        Returns:
            AVE: logits ``[B * T, num_classes]``, t running fastest.
            AVS: logits ``[B * T, 1, height, width]``; and for each stage the map ``[B * T, 256, R, R]``, and audio in the
            maps' channels ``[B, T, 256]``.
            AVQA: logits of the answers ``[B, num_classes]``; of the match of sound with ``video``, ``[B * T, 2]``, where class
            1 is a match; and with ``negative``, or None.

        Raises:
            ValueError: inputs, a mode or ``first_frame`` that do not fit the configuration.
        """
        if isinstance(negative, str):
            negative, mode = None, negative
        if first_frame and self.config.task != "avs":
            raise ValueError(f"first_frame: got True with task {self.config.task!r}, expected 'avs'")
        check_inputs(self.config, audio, video, negative, question, mode)
        images = {}
        if "visual" in self.config.modalities:
            images["visual"] = video.transpose(1, 2) if self.config.task == "ave" else video
        if "audio" in self.config.modalities:
            images["audio"] = audio[:, :, None]
        if negative is not None:
            images["negative"] = negative
        if self.config.task == "ave":
            features = self.features(images)
            return self.mlp_head(torch.cat([features[m] for m in ("audio", "visual") if m in features], -1))
        streams, earlier = self.tokens(images)
        if self.config.task == "avs":
            return self.segment([*earlier, streams["visual"]], streams["audio"], first_frame)
        return avqa_head(self, streams["visual"], streams["audio"], streams.get("negative"), question)


def init_parameters(model: nn.Module) -> None:
    """Starting values of the published code before pretrained weights: Linear N(0, 0.02) and zero bias, ``D_fc2`` all zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("D_fc2"):
                nn.init.zeros_(module.weight)

"""The law: every operator, and the whole model, in plain PyTorch. Needs torch alone."""

from .adapter import AdapterParams, adapter
from .av_adapter import av_adapter
from .cross_modal import cross_modal_attention
from .gelu import gelu
from .layer_norm import layer_norm
from .model import ReferenceSTGCMA
from .spatial_attention import spatial_attention
from .temporal_attention import temporal_attention
from .window_attention import window_attention
from .windows import WindowGrid

__all__ = [
    "AdapterParams",
    "ReferenceSTGCMA",
    "WindowGrid",
    "adapter",
    "av_adapter",
    "cross_modal_attention",
    "gelu",
    "layer_norm",
    "spatial_attention",
    "temporal_attention",
    "window_attention",
]

"""The operators of STG-CMA: what each means, what it accepts, and which implementation serves it."""

from ..reference.adapter import AdapterParams
from ..reference.windows import WindowGrid
from .adapter import adapter
from .av_adapter import av_adapter
from .cross_modal import cross_modal_attention
from .gelu import gelu
from .layer_norm import layer_norm
from .spatial_attention import spatial_attention
from .temporal_attention import temporal_attention
from .window_attention import window_attention

__all__ = [
    "AdapterParams",
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

"""FastSTGCMA: the fast way to train and run STG-CMA. Importing it needs torch alone and touches no device."""

from typing import TYPE_CHECKING

from . import ops, reference
from .annotate import annotate
from .config import ClipConfig, ModelConfig, SwinConfig, preset

if TYPE_CHECKING:
    from .checkpoint import load_adapters, load_checkpoint, save_adapters
    from .model import FastSTGCMA
    from .pretrained import load_grounding, load_pretrained

__version__ = "0.1.0"
__all__ = [
    "ClipConfig",
    "FastSTGCMA",
    "ModelConfig",
    "SwinConfig",
    "annotate",
    "load_adapters",
    "load_checkpoint",
    "load_grounding",
    "load_pretrained",
    "ops",
    "preset",
    "reference",
    "save_adapters",
]

# These need huggingface_hub or safetensors, so they are imported when they are first used.
_HOMES = {
    "FastSTGCMA": "model",
    "load_adapters": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_grounding": "pretrained",
    "load_pretrained": "pretrained",
    "save_adapters": "checkpoint",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

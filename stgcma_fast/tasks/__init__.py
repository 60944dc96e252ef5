"""Training, evaluation and prediction for AVE, AVS and AVQA."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .predict import Predictor

# Where names are that need the extras `data` and `train`: they are imported when they are first used.
_HOMES = {"Predictor": "predict"}
__all__ = ["Predictor"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

"""Names for profilers: each stage, block and step of a model as a range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch.profiler import record_function

from . import blocks, ops
from .backbones import clip, swin
from .reference import model as reference
from .reference.model import Block, ReferenceSTGCMA


@contextmanager
def annotate(model: ReferenceSTGCMA) -> Iterator[None]:
    """While open, the model runs inside named ranges: of `torch.profiler`, and of NVTX where CUDA is in use.

    Names are paths, counted from 1: "embed"; "stage 3", "stage 3/block 5", "stage 3/block 5/temporal", "spatial" and "global"
    likewise, and "stage 3/block 5/negative" for AVQA's negative frames; "stage 3/merge"; "head". In a step "attention",
    "adapter" and, in the adapter, "cross-modal" are ranges of their own. A backward has no ranges but where it computes a part
    of the forward again; `torch.profiler` ties its nodes to the forward's operators by thread and sequence number.

    Outside, nothing is left of it: functions and methods of the package are replaced on entry and put back on exit. Hence it
    is not thread-safe, and a whole step, forward and backward, belongs inside.

    Args:
        model: a `FastSTGCMA` or `ReferenceSTGCMA`. Other models may run meanwhile; they get no ranges.

    Raises:
        ValueError: something else, such as a model under `torch.compile`, whose graph has no such functions left.
    """
    if not isinstance(model, ReferenceSTGCMA):
        raise ValueError(f"model: got {type(model).__name__}, expected a FastSTGCMA or ReferenceSTGCMA that is not compiled")
    if model._compiled_call_impl is not None:
        raise ValueError(f"model: got a compiled {type(model).__name__}, expected one that is not")
    originals: list[tuple[Any, str, Callable]] = []
    try:
        for owner, name, wrap in _Ranges(model).wrappers():
            originals.append((owner, name, vars(owner)[name]))
            setattr(owner, name, wrap(vars(owner)[name]))
        yield
    finally:
        for owner, name, original in reversed(originals):
            setattr(owner, name, original)


class _Ranges:
    """Which range is open, and functions that open others."""

    def __init__(self, model: ReferenceSTGCMA) -> None:
        stages = [layer.blocks for layer in model.layers] if model.is_swin else [model.transformer.resblocks]
        self.model = model
        self.paths = {block: f"stage {s}/block {b}" for s, stage in enumerate(stages, 1) for b, block in enumerate(stage, 1)}
        self.last = stages[-1][-1]
        self.current: str | None = None
        self.section = ExitStack()

    def wrappers(self) -> Iterator[tuple[Any, str, Callable[[Callable], Callable]]]:
        """What to replace: owner, name, and what makes the replacement out of the original."""
        # Not `from .ops import av_adapter`: that name of the packages is the function.
        reference_av, fast_av = (import_module(f"{__package__}.{room}.av_adapter") for room in ("reference", "ops"))
        yield ReferenceSTGCMA, "forward", self._forward
        # The block's argument. `_forward` also runs from within a backward, when a checkpointed block is computed again.
        for owner, name, position in (
            (Block, "forward", 0),
            (swin, "run_block", 1),
            (clip, "run_block", 1),
            (blocks, "_forward", 0),
        ):
            yield owner, name, lambda original, position=position: self._block(original, position)
        for owner, name, position in ((Block, "frozen", 0), (swin, "run_frozen_block", 1)):
            yield owner, name, lambda original, position=position: self._block(original, position, "negative")
        yield blocks, "stream", self._stream
        for owner in (Block, blocks):
            yield owner, "adapt", lambda original: self._step(original, _adapted_step)
        for name, places in {
            "merge": ((reference.PatchMerging, "forward"), (swin, "_merge")),
            "temporal": ((Block, "temporal"), (blocks, "_temporal")),
            "spatial": ((reference.SwinBlock, "mhsa"), (reference.ClipBlock, "mhsa"), (blocks, "spatial_step")),
            "global": (
                (Block, "global_step"),
                (reference.SwinBlock, "global_step"),
                (blocks, "global_step"),
                (blocks, "_parallel_adapter"),
            ),
            "attention": (
                (reference, "temporal_attention"),
                (reference, "window_attention"),
                (reference, "spatial_attention"),
                (blocks, "temporal_attentions"),
                (ops, "window_attention"),
                (ops, "spatial_attention"),
            ),
            "adapter": (
                (reference, "adapter"),
                (reference, "av_adapter"),
                (blocks, "adapters"),
                (blocks, "_fold"),
                (ops, "adapter"),
                (ops, "av_adapter"),
            ),
            "cross-modal": ((reference_av, "cross_modal_attention"), (fast_av, "cross_modal_attention")),
        }.items():
            for owner, attribute in places:
                yield owner, attribute, lambda original, name=name: self._step(original, lambda *_: name)

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Inside the range of this path, which is opened unless it is the innermost already."""
        if path == self.current:
            yield
            return
        before, self.current = self.current, path
        try:
            with record_function(path), torch.cuda.nvtx.range(path) if torch.cuda.is_initialized() else nullcontext():
                yield
        finally:
            self.current = before

    def _enter_section(self, name: str | None) -> None:
        self.section.close()
        if name is not None:
            self.section.enter_context(self.at(name))

    def _forward(self, original: Callable) -> Callable:
        def forward(model: ReferenceSTGCMA, *args: Any, **kwargs: Any) -> Any:
            if model is not self.model:
                return original(model, *args, **kwargs)
            self._enter_section("embed")
            try:
                return original(model, *args, **kwargs)
            finally:
                self._enter_section(None)

        return forward

    def _block(self, original: Callable, position: int, part: str | None = None) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            block = args[position]
            if block not in self.paths:
                return original(*args, **kwargs)
            path = self.paths[block]
            stage = path.split("/")[0]
            # Without a section the model's forward is not what runs: a backward computes the block again.
            if self.current not in (None, stage, path):
                self._enter_section(stage)
            with self.at(path), self.at(f"{path}/{part}") if part else nullcontext():
                out = original(*args, **kwargs)
            if part is None and block is self.last and self.current == stage:
                self._enter_section("head")
            return out

        return run

    def _step(self, original: Callable, name_of: Callable[..., str]) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.current is None:
                return original(*args, **kwargs)
            name = name_of(*args[:2])
            inside = self.current.endswith(f"/{name}")  # as `adapt` in the reference's `global_step`
            with self.at(self.current if inside else f"{self.current}/{name}"):
                return original(*args, **kwargs)

        return run

    def _stream(self, original: Callable) -> Callable:
        def run(step: Callable, *args: Any, **kwargs: Any) -> Any:
            path = self.current
            if path is None:
                return original(step, *args, **kwargs)

            def inside(*pieces: Any) -> Any:
                # The backward runs the step again, outside of all that is open now.
                with self.at(path):
                    return step(*pieces)

            return original(inside, *args, **kwargs)

        return run


def _adapted_step(block: Block, step: str) -> str:
    return "spatial" if step == block.SPATIAL else "global"

"""What is timed: an operator's call on values, its backward, or both; and the least work there is in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from benchmarks.ops.providers import with_impl
from benchmarks.shapes import Arguments, Case, tensors

# bwd: the backward alone, of a forward whose graph is kept. It comes last: it alone has to be compiled once more.
MODES = ("fwd", "fwdbwd", "bwd")

Step = Callable[[], list["Tensor | None"]]


class Work(NamedTuple):
    """What a call has to do at least; products alone count as operations."""

    flops: int
    bytes: int


def _products(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """FLOP of the products, forward and backward, by the operators' cards."""
    x = args[0]
    if op == "temporal_attention":
        return 4 * x.numel() // 3 * x.shape[1], 8 * x.numel() // 3 * x.shape[1]
    if op == "spatial_attention":
        return 4 * x.numel() // 3 * x.shape[1], 10 * x.numel() // 3 * x.shape[1]
    if op == "window_attention":
        length = kwargs["window"] ** 2
        return 4 * x.numel() // 3 * length, 10 * x.numel() // 3 * length
    if op == "adapter":
        rank = args[1].down_bias.numel()
        return 4 * x.numel() * rank, 8 * x.numel() * rank
    if op == "cross_modal_attention":
        pairs = x.numel() * args[1].shape[1]
        return 8 * pairs, 14 * pairs
    if op == "av_adapter":
        audio, params, window = args[1], args[2], kwargs["window"]
        rank = params.down_bias.numel()
        adapters = (x.numel() + audio.numel()) * rank
        pairs = math.prod(x.shape[:2]) * (audio.shape[1] if window is None else window.size**2) * rank
        return 4 * adapters + 8 * pairs, 8 * adapters + 14 * pairs
    return 0, 0


def _inputs(arguments: Arguments) -> list[Tensor]:
    """The tensors of a call; the mask says nothing that window and shift do not."""
    args, kwargs = arguments
    return [x for name, part in [*enumerate(args), *kwargs.items()] if name != "mask" for x in tensors(part)]


def work(case: Case, mode: str, arguments: Arguments, outputs: Sequence[Tensor]) -> Work:
    """The floor of a case: its products; each input read and each output written once; in the backward inputs and upstream
    gradients read and gradients written once, but for residuals, whose gradient is the upstream one."""
    args, kwargs = arguments
    inputs = _inputs(arguments)
    # An output that is an input itself, for a residual, is not written; its upstream gradient is read.
    written = sum(y.nbytes for y in outputs if all(y is not x for x in inputs))
    residuals = args[2:3] if case.op == "adapter" else [kwargs.get("residual_visual"), kwargs.get("residual_audio")]
    kept = [x for x in inputs if all(x is not residual for residual in residuals)]
    flops = _products(case.op, args, kwargs)
    forward = Work(flops[0], written + sum(x.nbytes for x in inputs))
    backward = Work(flops[1], sum(x.nbytes for x in outputs) + sum(x.nbytes * (1 + x.requires_grad) for x in kept))
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"fwd": forward, "bwd": backward, "fwdbwd": both}[mode]


class Problem:
    """A case's values, and an upstream gradient for each output."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case = case
        self.arguments = case.fill(dtype, device)
        args, kwargs = self.arguments
        with torch.no_grad():
            self.outputs = list(tensors(with_impl(case, "reference")(*args, **kwargs)))
        self.upstream = [torch.randn_like(y) for y in self.outputs]

    def work(self, mode: str) -> Work:
        """What a step has to do at least."""
        return work(self.case, mode, self.arguments, self.outputs)

    def rows(self) -> int:
        """The most terms that a weight's gradient adds up."""
        return max(x.numel() // x.shape[-1] for x in _inputs(self.arguments))

    def sizes(self) -> dict[str, Any]:
        """Shapes of what goes in, in the order of the arguments, and whether the operator's weights are frozen here."""
        inputs = _inputs(self.arguments)
        return {"sizes": [[*x.shape] for x in inputs], "frozen": not all(x.requires_grad for x in inputs)}

    def _leaves(self, arguments: Arguments) -> dict[str, Tensor]:
        named = tree_flatten_with_path(arguments)[0]
        return {keystr(path): x for path, x in named if isinstance(x, Tensor) and x.requires_grad}

    def step(self, call: Callable, mode: str, exact: bool = False) -> Step:
        """What to time, on leaves of its own; for "bwd" the forward runs here. With ``exact`` the same values in float64.

        Returns:
            A function that returns the outputs and, but for "fwd", the gradients.
        """

        def leaf(x: Tensor) -> Tensor:
            return (x.detach().double() if exact else x.detach()).requires_grad_(x.requires_grad)

        args, kwargs = arguments = tree_map_only(Tensor, leaf, self.arguments)
        upstream = [leaf(x) for x in self.upstream]
        leaves = [*self._leaves(arguments).values()]

        def forward() -> list[Tensor]:
            return list(tensors(call(*args, **kwargs)))

        def forward_backward() -> list[Tensor | None]:
            outputs = forward()
            return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)]

        if mode == "fwd":
            return torch.no_grad()(forward)
        if mode == "fwdbwd":
            return forward_backward
        # Compiled, a backward would else give away what it needs for the next time.
        with torch._functorch.config.patch(donated_buffer=False):
            outputs = forward()

        def backward() -> list[Tensor | None]:
            return [*outputs, *torch.autograd.grad(outputs, leaves, upstream, retain_graph=True, allow_unused=True)]

        return backward

    def results(self, call: Callable, mode: str, exact: bool = False) -> dict[str, Tensor | None]:
        """What a step returns, by name."""
        names = [f"output {i}" for i in range(len(self.outputs))]
        if mode != "fwd":
            names += [f"gradient of {name}" for name in self._leaves(self.arguments)]
        found = self.step(call, mode, exact)()
        return {name: None if x is None else x.detach() for name, x in zip(names, found, strict=True)}

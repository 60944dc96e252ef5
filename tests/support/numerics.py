"""The yardstick: a fast result may err about as much as an honest computation in the same dtype does, and no more.

``hi`` is the reference in float64 on inputs rounded to the dtype under test, ``low`` the reference in that dtype, ``fast`` the
operator. What the fast result may err beyond ``low`` is derived, never chosen: one relative unit

    eps(dtype) * roundings + eps(float32) * (sum of sqrt(reduction sizes) + largest score / 2)

times the magnitude of ``hi``. Gradients may err by a factor 3 of ``low``, outputs by 2; mean and root mean square less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from .inputs import Device, draw, strided

Function = Callable[..., Any]
EPS32 = torch.finfo(torch.float32).eps


def assert_close(
    op: str,
    name: str,
    fast: Tensor,
    hi: Tensor,
    low: Tensor,
    *,
    roundings: int = 1,
    reductions: Sequence[int] = (),
    scores: float = 0,
    gradient: bool = False,
    dtype: torch.dtype | None = None,
    magnitude: float | None = None,
) -> None:
    """Hold ``fast`` to the yardstick.

    Args:
        op, name: operator and tensor, for the failure's text.
        fast, hi, low: the three results.
        roundings: how often a value is rounded to ``dtype`` that ``low`` does not round.
        reductions: sizes of the sums on the way to a value, which ``fast`` may order otherwise.
        scores: largest attention score. A fused attention keeps the log-sum-exp of its scores for the backward; rounding that
            number to float32 is a relative error of every probability.
        gradient: whether the tensor is a gradient.
        dtype: the dtype of the arithmetic where it is not that of ``fast`` (autocast).
        magnitude: size of the numbers that are summed up, where they may cancel to less (the gradient of a gate).
    """
    assert fast.shape == hi.shape == low.shape, f"{op} {name}: shape {list(fast.shape)}, reference {list(hi.shape)}"
    assert fast.dtype == low.dtype, f"{op} {name}: dtype {fast.dtype}, reference {low.dtype}"
    assert hi.dtype == torch.float64
    assert low.isfinite().all(), f"{op} {name}: the reference overflows in {low.dtype}, so this case proves nothing"
    unit = torch.finfo(dtype or fast.dtype).eps * roundings + EPS32 * (sum(size**0.5 for size in reductions) + scores / 2)
    e_fast, e_low = (fast.double() - hi).abs(), (low.double() - hi).abs()

    def size(reduce: Callable[[Tensor], Tensor]) -> float:
        return reduce(hi.abs()).item() if magnitude is None else magnitude

    factor = 3 if gradient else 2
    # Mean and RMS of N errors scatter by about 1 / sqrt(N), so those of few elements differ by luck: two standard deviations.
    scatter = 1 + 2 * fast.numel() ** -0.5
    bounds = {
        "max": (e_fast.max().item(), factor * e_low.max().item() + unit * size(torch.max)),
        "mean": (e_fast.mean().item(), 1.25 * scatter * e_low.mean().item() + unit * size(torch.mean)),
        # Relative to the whole tensor: catches a bad row that neither the largest nor the mean error shows.
        "rms": (_rms(e_fast), max(1.5 * scatter * _rms(e_low), unit * size(_root_mean_square))),
    }
    wrong = [f"{key} error {got:.3e} > {bound:.3e}" for key, (got, bound) in bounds.items() if not got <= bound]
    if not fast.isfinite().all():
        wrong.insert(0, "not finite")
    if wrong:
        bad = ~(e_fast <= bounds["max"][1])
        flat = e_fast.nan_to_num(nan=float("inf")).argmax()
        index = tuple(i.item() for i in torch.unravel_index(flat, e_fast.shape))
        values = ", ".join(f"{key} {x[index].item():.8g}" for key, x in (("fast", fast), ("hi", hi), ("low", low)))
        raise AssertionError(
            f"{op} {name} {fast.dtype} shape {list(fast.shape)} strides {fast.stride()}: {'; '.join(wrong)}; "
            f"worst at {index}: {values}; {bad.double().mean().item():.2%} of the elements are bad"
        )


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _rms(x: Tensor) -> float:
    return _root_mean_square(x).item()


def evaluate(
    function: Function,
    tensors: Mapping[str, Tensor],
    *,
    frozen: Collection[str] = (),
    upstream: str = "packed",
    dtypes: Sequence[torch.dtype] = (),
) -> dict[str, Tensor | None]:
    """Outputs "out0", "out1", ... and gradients "grad_<input>" of ``function(**tensors)``.

    Args:
        function: takes the tensors by name, returns a tensor or several.
        tensors: its inputs; all but ``frozen`` get a gradient.
        upstream: memory layout of the upstream gradients. They are drawn, since ones or a sum hide errors that cancel.
        dtypes: of the outputs to round the upstream gradients to; default is those of the outputs.
    """
    leaves = {name: x.detach().requires_grad_(name not in frozen) for name, x in tensors.items()}
    outs = function(**leaves)
    outs = (outs,) if isinstance(outs, Tensor) else tuple(outs)
    wanted = [name for name in leaves if name not in frozen]
    results = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    if not wanted:
        return results
    rounded = dtypes or [out.dtype for out in outs]
    grads = [
        strided(draw(1000 + i, *out.shape, dtype=dtype).to(out), upstream)
        for i, (out, dtype) in enumerate(zip(outs, rounded, strict=True))
    ]
    # An output that hangs on no wanted input has no gradient to give.
    used, grads = zip(*((out, grad) for out, grad in zip(outs, grads, strict=True) if out.requires_grad), strict=True)
    found = torch.autograd.grad(used, [leaves[name] for name in wanted], grads, allow_unused=True)
    return results | {f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)}


def check(
    op: str,
    fast: Function,
    law: Function,
    problems: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    reductions: Sequence[int],
    scores: float = 0,
    frozen: Collection[str] = (),
    upstream: str = "packed",
    autocast: torch.dtype | None = None,
    gates: Mapping[str, tuple[int, ...]] | None = None,
    gate_roundings: int = 1,
) -> dict[str, Tensor | None]:
    """Hold every output and gradient of ``fast`` to the yardstick.

    Args:
        op: for the failure's text.
        fast, law: operator and reference; they take tensors by name.
        problems: the inputs; or those of several problems, whose results are held to the yardstick as one tensor.
        reductions, scores: as in `assert_close`.
        frozen: inputs without gradient.
        upstream: memory layout of the upstream gradients.
        autocast: run operator and reference under autocast to this dtype.
        gates: inputs of one number, each with the shape of what it multiplies. A gate's gradient is the sum of products of
            either sign: their errors add up to eps times the root of their summed squares, however near to zero the sum is.
        gate_roundings: roundings on the way to such a product. One number of ``low`` may be right by luck, and then this
            alone decides; several problems go without luck, and with 1.

    Returns:
        What ``fast`` gave, stacked where there are several problems.
    """
    context = nullcontext() if autocast is None else torch.autocast(Device.name, autocast)
    options = {"frozen": frozen, "upstream": upstream}
    single = isinstance(problems, Mapping)
    runs = []
    for tensors in [problems] if single else problems:
        with context:
            got = evaluate(fast, tensors, **options)
        options["dtypes"] = [x.dtype for name, x in got.items() if name.startswith("out")]
        with context:
            low = evaluate(law, tensors, **options)
        exact = {name: x.double() for name, x in tensors.items()}
        hi = evaluate(law, exact, **options)
        # With a gate of the shape of what it multiplies, its gradient is the products themselves.
        terms = (
            evaluate(law, exact | {name: exact[name].expand(shape) for name, shape in gates.items()}, **options)
            if gates
            else {}
        )
        runs.append((got, low, hi, terms))

    def stacked(which: int, name: str) -> Tensor | None:
        xs = [run[which][name] for run in runs]
        return xs[0] if single or xs[0] is None else torch.stack(xs)

    fasts = {name: stacked(0, name) for name in runs[0][0]}
    assert fasts.keys() == runs[0][2].keys()
    for name, x in fasts.items():
        hi = stacked(2, name)
        assert (x is None) == (hi is None), f"{op} {name}: {'no' if x is None else 'a'} gradient, unlike the reference"
        if x is None:
            continue
        is_gate = name.removeprefix("grad_") in (gates or ())
        assert_close(
            op,
            name,
            x,
            hi,
            stacked(1, name),
            roundings=gate_roundings if is_gate else 1,
            reductions=reductions,
            scores=scores,
            gradient=name.startswith("grad"),
            dtype=autocast,
            magnitude=stacked(3, name).norm().item() / len(runs) ** 0.5 if is_gate else None,
        )
    return fasts


def check_equal_in_float64(fast: Function, law: Function, tensors: Mapping[str, Tensor], frozen: Collection[str] = ()) -> None:
    """``fast`` and ``law`` agree in float64 to what reordered sums explain."""
    exact = {name: x.double() for name, x in tensors.items()}
    torch.testing.assert_close(
        evaluate(fast, exact, frozen=frozen), evaluate(law, exact, frozen=frozen), rtol=1e-11, atol=1e-11
    )


def check_compiled(
    fast: Function, hold: Function, problem: Callable[[int], Mapping[str, Tensor]], *, batched: Collection[str]
) -> None:
    """``fast`` compiles into one graph, which is right, and serves every batch size after the first.

    Args:
        fast: the operator; takes tensors by name.
        hold: ``hold(tensors, fast=...)`` holds a form of it to the yardstick.
        problem: the inputs for a batch size.
        batched: names of the inputs whose first dimension is the batch.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)

    def marked(**tensors: Tensor) -> Any:
        for name in batched:
            torch._dynamo.mark_dynamic(tensors[name], 0)
        return compiled(**tensors)

    for batch in (2, 3, 5):
        hold(problem(batch), fast=marked)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for three batch sizes"

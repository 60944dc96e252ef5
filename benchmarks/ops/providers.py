"""Who computes an operator: its plain form, the same compiled, FastSTGCMA, and the attention libraries where they can.

Each attention is written for the libraries as their users would write it, on the operator's own layout.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import Arguments, Case
from stgcma_fast.ops.spatial_attention import BACKENDS, backend_refusals
from stgcma_fast.reference.windows import shift_mask, window_partition, window_reverse

# softmax(scale q k^T + bias) v, of query, key and value [N, h, L, d], bias [..., h or 1, L, L] or None, scale.
Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


def with_impl(case: Case, impl: str) -> Callable:
    """The operator, served by one implementation."""
    return partial(case.function, impl=impl)


def _compiled(case: Case) -> Callable:
    # Every case is compiled as if it were the only one.
    torch._dynamo.reset()
    return torch.compile(with_impl(case, "reference"), dynamic=False)


def _cross_modal(
    attend: Attend, visual: Tensor, audio: Tensor, gate_visual: Tensor, gate_audio: Tensor
) -> tuple[Tensor, Tensor]:
    v, a = visual[:, None], audio[:, None]  # one head
    heard_visual, heard_audio = attend(v, a, a, None, 1.0)[:, 0], attend(a, v, v, None, 1.0)[:, 0]
    return visual + gate_visual * heard_visual, audio + gate_audio * heard_audio


def _temporal(attend: Attend, qkv: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    query, key, value = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [B * S, h, T, d] each
    out = attend(query, key, value, bias, scale).unflatten(0, (qkv.shape[0], -1))
    return out.permute(0, 3, 1, 2, 4).flatten(-2)


def _window(
    attend: Attend, qkv: Tensor, bias: Tensor, *, window: int, shift: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    frames, height, width, *_ = qkv.shape
    windows = window_partition(qkv, window, shift).flatten(0, 1)  # [F * windows, L, 3, h, d]
    if shift:
        mask = shift_mask(height, width, window, shift) if mask is None else mask
        bias = (bias + mask.to(bias)[:, None]).repeat(frames, 1, 1, 1)
    out = attend(*windows.permute(2, 0, 3, 1, 4), bias, scale)
    return window_reverse(out.transpose(1, 2).flatten(2).unflatten(0, (frames, -1)), height, width, window, shift)


# `spatial_attention` takes the libraries by name itself.
FORMULATIONS: dict[str, Callable[..., Any]] = {
    "cross_modal_attention": _cross_modal,
    "temporal_attention": _temporal,
    "window_attention": _window,
}


def _sdpa(kernel: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)

    return attend


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, bias: None, scale: float) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), softmax_scale=scale).transpose(1, 2)


def _xformers(query: Tensor, key: Tensor, value: Tensor, bias: None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=scale).transpose(1, 2)


ATTEND: dict[str, Attend] = {
    "flash_attn": _flash_attn,
    "xformers": _xformers,
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": _sdpa(SDPBackend.MATH),
}
NO_BIAS = {
    "flash_attn": "it adds no bias to the scores",
    "sdpa_flash": "it adds no bias to the scores",
    "xformers": "the rows of its bias must be padded to multiples of 8; sdpa_efficient, the same kernel, does that itself",
}


def _check(name: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Raises NotImplementedError with every reason why a backend cannot serve."""
    # The packed [F, S, 3, h, d] that the reasons are about, as far as they read it.
    reasons = [] if bias is None or name not in NO_BIAS else [NO_BIAS[name]]
    for x in (query, key):
        packed = x.transpose(1, 2).unsqueeze(2).expand(-1, -1, 3, -1, -1)
        reasons += [reason for reason in backend_refusals(name, packed) if reason not in reasons]
    if reasons:
        raise NotImplementedError("; ".join(reasons))
    return query


def _backend(name: str, case: Case) -> Callable:
    if case.op == "spatial_attention":
        return partial(case.function, backend=name)
    return partial(FORMULATIONS[case.op], ATTEND[name])


PROVIDERS: dict[str, Callable[[Case], Callable]] = {
    "reference": lambda case: with_impl(case, "reference"),
    "compiled": _compiled,
    "fast": lambda case: with_impl(case, "auto"),
    **{name: partial(_backend, name) for name in BACKENDS},
}


def has(provider: str, op: str) -> bool:
    """Whether a provider has an operator at all: the libraries know attention alone."""
    return provider not in BACKENDS or op in {"spatial_attention", *FORMULATIONS}


def refusals(provider: str, case: Case, arguments: Arguments) -> list[str]:
    """Every reason why a library cannot serve a case, by what the project knows of it or by its own words."""
    if provider not in BACKENDS:
        return []
    args, kwargs = arguments
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if case.op in FORMULATIONS:
                FORMULATIONS[case.op](partial(_check, provider), *args, **kwargs)
            PROVIDERS[provider](case)(*args, **kwargs)
        except NotImplementedError as error:
            return [str(error)]
        except RuntimeError as error:
            # What else goes wrong is for the comparison to report.
            if re.match("No (available kernel|viable backend)", str(error)):
                return [str(error), *(str(warning.message) for warning in said)]
    return []

"""The full self-attention of a ViT frame. Card: docs/ops/spatial_attention.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from .checks import check_choice, check_shape
from .dispatch import Impl, Implementation, check_impl, product_dtype, register, select
from .short_attention import attention

Backend = Literal["auto", "flash_attn", "xformers", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math"]


def spatial_attention(qkv: Tensor, *, scale: float, backend: Backend = "auto", impl: Impl = "auto") -> Tensor:
    """``softmax(scale q k^T) v`` over the tokens of each frame, equations 8 and 9.

    The libraries' flash attention serves, on views of the packed tensor; there is no kernel of our own to beat it.

    Args:
        qkv: ``[F, S, 3, h, d]``, any floating dtype and strides.
        scale: factor of the scores, normally ``d ** -0.5``.
        backend: whose attention runs; anything but "auto" runs as asked, on the tensor as it lies in memory, or raises. "auto"
            takes flash-attn where it is installed and can serve, else `torch.nn.functional.scaled_dot_product_attention` with
            PyTorch's own choice of kernel; on the CPU and for impl="torch" always the latter.
        impl: which implementation serves; anything but "auto" runs as asked or raises. "triton" means the libraries too.

    Returns:
        ``[F, S, h * d]``; under autocast in its dtype.

    Raises:
        ValueError: a shape that does not fit, or an unknown name.
        NotImplementedError: ``backend`` or ``impl`` cannot serve; the text gives every reason.
    """
    check_shape("qkv", qkv, "F", "S", 3, "h", "d")
    if backend == "auto":
        return select("spatial_attention", impl, qkv, scale=scale)(qkv, scale=scale)
    check_choice("backend", backend, ("auto", *BACKENDS))
    check_impl(impl)
    qkv = _cast(qkv)
    reasons = backend_refusals(backend, qkv)
    if impl == "reference" or (impl == "torch" and BACKENDS[backend].package is not None):
        reasons.append(f"impl={impl!r} does not use it")
    if reasons:
        raise NotImplementedError(f"spatial_attention: backend={backend!r} was asked for, but {'; '.join(reasons)}")
    return BACKENDS[backend].function(qkv, scale)


def _flash_attn(qkv: Tensor, scale: float) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_qkvpacked_func(qkv, softmax_scale=scale, deterministic=deterministic).flatten(-2)


def _xformers(qkv: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2), scale=scale).flatten(-2)


def _sdpa(kernel: SDPBackend) -> Callable[[Tensor, float], Tensor]:
    def attention(qkv: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(kernel):
            return reference.spatial_attention(qkv, scale=scale)

    return attention


class _Backend(NamedTuple):
    """Somebody's attention, and what it asks of a call."""

    # [F, S, 3, h, d] to [F, S, h * d].
    function: Callable[[Tensor, float], Tensor]
    # What to import; None is PyTorch itself.
    package: str | None = None
    on_cpu: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    oldest_gpu: tuple[int, int] = (8, 0)
    # Whether it reads 16 bytes at a time: other head widths would be padded, that is copied, and other strides fail.
    vectors: bool = True
    largest_head: int | None = None
    fewest_tokens: int = 1
    # Whether its backward gives the same bits again, at least under torch.use_deterministic_algorithms.
    deterministic: bool = True


_SINGLE = (torch.bfloat16, torch.float16, torch.float32)

BACKENDS = {
    "flash_attn": _Backend(_flash_attn, package="flash_attn", largest_head=256),
    "xformers": _Backend(_xformers, package="xformers.ops", dtypes=_SINGLE, oldest_gpu=(6, 0), deterministic=False),
    # Beyond 192 channels its backward is missing on some GPUs.
    "sdpa_flash": _Backend(_sdpa(SDPBackend.FLASH_ATTENTION), on_cpu=True, largest_head=192),
    # Beyond 128 channels it depends on the release of cuDNN.
    "sdpa_cudnn": _Backend(
        _sdpa(SDPBackend.CUDNN_ATTENTION),
        largest_head=128,
        fewest_tokens=2,
        deterministic=False,
    ),
    "sdpa_efficient": _Backend(_sdpa(SDPBackend.EFFICIENT_ATTENTION), dtypes=_SINGLE, oldest_gpu=(5, 0)),
    "sdpa_math": _Backend(
        _sdpa(SDPBackend.MATH),
        on_cpu=True,
        dtypes=(*_SINGLE, torch.float64),
        oldest_gpu=(0, 0),
        vectors=False,
    ),
}


@cache
def _import_error(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, OSError, RuntimeError) as error:
        # A binary for another PyTorch.
        return f"{package} cannot be imported: {error}"
    return None


@torch.compiler.assume_constant_result
def _missing(package: str) -> str | None:
    """Why a package cannot be imported; the compiler takes the answer and does not look inside."""
    return _import_error(package)


def backend_refusals(backend: str, qkv: Tensor | None = None) -> list[str]:
    """Every reason why a backend cannot serve ``qkv``; without a tensor, why it cannot serve on this machine."""
    return [*_machine_refusals(BACKENDS[backend], qkv), *([] if qkv is None else _refusals(BACKENDS[backend], qkv))]


def _machine_refusals(limits: _Backend, qkv: Tensor | None) -> Iterator[str]:
    missing = None if limits.package is None else _missing(limits.package)
    if missing is not None:
        yield missing
    on_cuda = torch.cuda.is_available() if qkv is None else qkv.is_cuda
    if on_cuda:
        gpu = torch.cuda.get_device_properties(0 if qkv is None else qkv.device)
        bfloat16 = qkv is not None and qkv.dtype == torch.bfloat16
        oldest = max(limits.oldest_gpu, (8, 0)) if bfloat16 and limits.vectors else limits.oldest_gpu
        if (gpu.major, gpu.minor) < oldest:
            yield f"it needs compute capability {oldest[0]}.{oldest[1]}, got {gpu.major}.{gpu.minor}"
    elif not limits.on_cpu:
        yield f"it needs a CUDA device, {'and PyTorch finds none' if qkv is None else f'got {qkv.device.type}'}"


def _refusals(limits: _Backend, qkv: Tensor) -> Iterator[str]:
    _, tokens, _, _, head = qkv.shape
    if limits.vectors and qkv.stride(-1) != 1:
        yield f"the channels of a head must lie side by side, got stride {qkv.stride(-1)}"
    if limits.on_cpu and not qkv.is_cuda:
        return
    if qkv.dtype not in limits.dtypes:
        yield f"it takes {', '.join(str(d).removeprefix('torch.') for d in limits.dtypes)}, got {qkv.dtype}"
    if limits.largest_head is not None and head > limits.largest_head:
        yield f"it takes heads of up to {limits.largest_head} channels, got {head}"
    if limits.vectors and head * qkv.element_size() % 16:
        yield f"a head's channels must fill 16 bytes, got {head} of {qkv.element_size()} bytes"
    elif limits.vectors and _misaligned(qkv):
        yield f"strides and offset must be multiples of 16 bytes, got strides {tuple(qkv.stride())}"
    if tokens < limits.fewest_tokens:
        yield f"it takes {limits.fewest_tokens} tokens or more, got {tokens}"
    needs_grad = qkv.requires_grad and torch.is_grad_enabled()
    if needs_grad and not limits.deterministic and torch.are_deterministic_algorithms_enabled():
        yield "its backward is not deterministic, and torch.use_deterministic_algorithms is on"


def _misaligned(qkv: Tensor) -> bool:
    # The compiler does not see offsets; a graph's own tensors have none.
    offset = 0 if torch.compiler.is_compiling() else qkv.storage_offset()
    return any(n * qkv.element_size() % 16 for n in (*qkv.stride()[:-1], offset))


def _cast(qkv: Tensor) -> Tensor:
    """Autocast, once for the packed tensor: PyTorch would cast query, key and value by themselves, the libraries not at all."""
    return qkv.to(product_dtype(qkv))


def _libraries(qkv: Tensor, *, scale: float) -> Tensor:
    qkv = _cast(qkv)
    if qkv.is_cuda:
        # No tensor of the model's: `linear` gives rows that begin at multiples of 16 bytes.
        if qkv.stride(-1) != 1 or (qkv.shape[-1] * qkv.element_size() % 16 == 0 and _misaligned(qkv)):
            qkv = qkv.clone(memory_format=torch.contiguous_format)
        # Expected, not measured, to be the faster: it writes the gradients of query, key and value into one packed tensor,
        # which the other backends leave to a copy. Among those PyTorch chooses better than a list here could: it knows what
        # its kernels and cuDNN's can do in each release and on each GPU, and no process-wide switch has to be set.
        if not backend_refusals("flash_attn", qkv):
            return _flash_attn(qkv, scale)
    return attention(qkv, None, scale)


def _torch(qkv: Tensor, *, scale: float) -> Tensor:
    return attention(_cast(qkv), None, scale)


register(
    "spatial_attention",
    # A library's attention is the fused kernel here, so that a model with impl="triton" runs whole.
    triton=Implementation(_libraries),
    # PyTorch's fused attention on strided views of the packed tensor.
    torch=_torch,
    reference=reference.spatial_attention,
)

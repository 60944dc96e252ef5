"""Swin's window attention, and the index moves under it."""

from functools import partial

import pytest
import torch

from stgcma_fast import ops, reference
from stgcma_fast.ops import windows as one_pass
from stgcma_fast.reference.windows import shift_mask, window_partition, window_reverse
from tests.support.inputs import Device, draw, each_dtype, each_low_dtype, each_stride
from tests.support.numerics import check, check_compiled, check_equal_in_float64, evaluate

# Height, width, window, shift.
GRIDS = {
    "one-window": (7, 7, 7, 0),
    "square": (14, 14, 7, 0),
    "square-shifted": (14, 14, 7, 3),
    "tall-shifted": (21, 7, 7, 3),
    "wide": (8, 12, 4, 0),
    "wide-shifted": (8, 12, 4, 2),
    "window-12-shifted": (12, 12, 12, 6),
    "one-window-shifted": (3, 3, 3, 1),
}
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
each_training = pytest.mark.parametrize("frozen", [(), ("bias",)], ids=["trained-bias", "frozen-bias"])
SMALL = {name: GRIDS[name] for name in ("wide", "wide-shifted")}
each_small_grid = pytest.mark.parametrize("grid", SMALL.values(), ids=SMALL.keys())


def problem(height, width, window, shift, *, frames=2, heads=2, head_dim=32, dtype=torch.float32, strides="packed", scale=1.0):
    return {
        "qkv": draw(0, frames, height, width, 3, heads, head_dim, dtype=dtype, scale=scale, strides=strides),
        "bias": draw(1, heads, window**2, window**2, dtype=dtype),
    }


def function(of, grid, **options):
    _, _, window, shift = grid

    def window_attention(qkv, bias):
        return of.window_attention(qkv, bias, window=window, shift=shift, scale=qkv.shape[-1] ** -0.5, **options)

    return window_attention


def hold(tensors, *, grid, fast=None, **options):
    frames, height, width, _, _, head_dim = tensors["qkv"].shape
    window = grid[2]
    return check(
        "window_attention",
        fast or function(ops, grid),
        function(reference, grid),
        tensors,
        reductions=[head_dim, window**2, frames * height * width // window**2],
        **options,
    )


@each_training
@each_dtype
@each_grid
def test_grids(grid, dtype, frozen):
    hold(problem(*grid, dtype=dtype), grid=grid, frozen=frozen)


@pytest.mark.parametrize("sizes", [(1, 1, 5), (3, 1, 96), (1, 4, 16)], ids=["d5", "d96", "one-frame"])
@each_dtype
def test_sizes(dtype, sizes):
    grid = GRIDS["wide-shifted"]
    frames, heads, head_dim = sizes
    hold(problem(*grid, frames=frames, heads=heads, head_dim=head_dim, dtype=dtype), grid=grid)


@each_training
@each_small_grid
@each_stride
def test_strided_inputs(strides, grid, frozen):
    hold(problem(*grid, strides=strides), grid=grid, frozen=frozen)


@each_training
@each_small_grid
@each_stride
def test_strided_upstream_gradients(strides, grid, frozen):
    hold(problem(*grid), grid=grid, frozen=frozen, upstream=strides)


@each_training
@each_dtype
@each_small_grid
def test_large_scores(grid, dtype, frozen):
    tensors = problem(*grid, dtype=dtype, scale=30**0.5)
    query, key, _ = window_partition(tensors["qkv"].double(), *grid[2:]).permute(3, 0, 1, 4, 2, 5)
    scores = (query @ key.mT).abs().max().item() * 32**-0.5
    assert scores > 100
    hold(tensors, grid=grid, frozen=frozen, scores=scores)


def test_frozen_qkv():
    """The bias alone gets a gradient."""
    grid = GRIDS["wide-shifted"]
    got = hold(problem(*grid), grid=grid, frozen={"qkv"})
    assert got.keys() == {"out0", "grad_bias"}


@each_grid
def test_equals_the_reference_in_float64(grid):
    check_equal_in_float64(function(ops, grid, impl="torch"), function(ops, grid, impl="reference"), problem(*grid))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_mask_at_hand_changes_nothing(impl):
    grid = GRIDS["square-shifted"]
    tensors = problem(*grid)
    bare = evaluate(function(ops, grid, impl=impl), tensors)
    given = evaluate(function(ops, grid, impl=impl, mask=shift_mask(*grid)), tensors)
    assert all(torch.equal(x, given[name]) for name, x in bare.items())


def one_by_one(qkv, bias, height, width, window, shift):
    """Every pair of tokens by itself, on coordinates: which window a token is in, and which tokens it may attend to."""
    side = torch.arange(max(height, width))
    rows, columns = (x.flatten() for x in torch.meshgrid(side[:height], side[:width], indexing="ij"))
    rolled = [(rows - shift) % height, (columns - shift) % width]  # where the cyclic roll puts each token
    same_window = torch.ones(height * width, height * width, dtype=torch.bool)
    contiguous = same_window.clone()
    for place, at in zip((rows, columns), rolled, strict=True):
        same_window &= (at // window)[:, None] == (at // window)[None, :]
        # The roll keeps the distance of two tokens unless it carries one of them, alone, over the border.
        contiguous &= place[:, None] - place[None, :] == at[:, None] - at[None, :]
    inside = (rolled[0] % window) * window + rolled[1] % window
    query, key, value = qkv.flatten(1, 2).unbind(2)  # [F, N, h, d]
    scores = torch.einsum("fihd,fjhd->fhij", query, key) * qkv.shape[-1] ** -0.5
    scores = scores + bias[:, inside[:, None], inside[None, :]] - 100.0 * ~contiguous
    weights = scores.masked_fill(~same_window, float("-inf")).softmax(-1)
    return torch.einsum("fhij,fjhd->fihd", weights, value).flatten(2).unflatten(1, (height, width))


@each_grid
def test_is_attention_between_the_tokens_of_a_window(grid):
    tensors = problem(*grid, heads=2, head_dim=5, dtype=torch.float64)
    expected = one_by_one(**tensors, **dict(zip(("height", "width", "window", "shift"), grid, strict=True)))
    for impl in ("torch", "reference"):
        torch.testing.assert_close(function(ops, grid, impl=impl)(**tensors), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("grid", [*GRIDS.values(), (6, 9, 3, 2), (8, 8, 4, 3)], ids=[*GRIDS, "six-by-nine", "three-of-four"])
def test_shift_mask(grid):
    """Two tokens of a window may attend to each other iff they are neighbours in the picture before the roll too."""
    height, width, window, shift = grid
    mask = shift_mask(*grid)
    assert mask.shape == (height // window * (width // window), window**2, window**2)
    for w, a, b in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist() if window <= 4 else ():
        top, left = divmod(w, width // window)
        tokens = [(top * window + t // window, left * window + t % window) for t in (a, b)]
        before = [((row + shift) % height, (column + shift) % width) for row, column in tokens]
        moved = [(tokens[0][i] - tokens[1][i]) - (before[0][i] - before[1][i]) for i in (0, 1)]
        assert mask[w, a, b] == (0 if moved == [0, 0] else -100)
    assert bool(mask.any()) == (shift > 0)


@each_dtype
@each_stride
@each_grid
@pytest.mark.parametrize("moves", [reference.windows, one_pass], ids=["reference", "one-pass"])
def test_partition_and_reverse_are_index_moves(moves, grid, strides, dtype):
    """Bit-exact inverses of each other, forward and backward; with the tokens numbered, the numbers land where they should."""
    height, width, window, shift = grid
    window_partition, window_reverse = moves.window_partition, moves.window_reverse
    x = draw(0, 2, height, width, 6, dtype=dtype, strides=strides).requires_grad_()
    windows = window_partition(x, window, shift)
    assert torch.equal(window_reverse(windows, height, width, window, shift), x)
    upstream = draw(1, *windows.shape, dtype=dtype)
    (grad,) = torch.autograd.grad(windows, x, upstream)
    assert torch.equal(grad, window_reverse(upstream, height, width, window, shift))
    y = draw(2, *windows.shape, dtype=dtype).requires_grad_()
    image = window_reverse(y, height, width, window, shift)
    assert torch.equal(window_partition(image, window, shift), y)
    upstream = draw(3, *image.shape, dtype=dtype, strides=strides)
    (grad,) = torch.autograd.grad(image, y, upstream)
    assert torch.equal(grad, window_partition(upstream, window, shift))
    numbers = torch.arange(height * width).view(1, height, width)
    for w, window_tokens in enumerate(window_partition(numbers, window, shift)[0].tolist()):
        top, left = w // (width // window) * window + shift, w % (width // window) * window + shift
        assert window_tokens == [(top + i) % height * width + (left + j) % width for i in range(window) for j in range(window)]


@each_training
@each_low_dtype
def test_autocast(dtype, frozen):
    grid = GRIDS["wide-shifted"]
    hold(problem(*grid), grid=grid, frozen=frozen, autocast=dtype)


@pytest.mark.parametrize("grid", [(2, 4, 2, 0), (2, 4, 2, 1)], ids=["plain", "shifted"])
def test_gradcheck_of_the_reference(grid):
    inputs = [x.requires_grad_() for x in problem(*grid, frames=1, heads=2, head_dim=2, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(function(reference, grid), inputs)


@each_training
@each_small_grid
def test_compiled(grid, frozen):
    check_compiled(
        function(ops, grid),
        partial(hold, grid=grid, frozen=frozen),
        lambda batch: problem(*grid, frames=batch, head_dim=8),
        batched=["qkv"],
    )


ERRORS = {
    "qkv": ({"qkv": draw(0, 2, 98, 3, 2, 16)}, r"qkv: expected shape \[F, H, W, 3, h, d\], got \[2, 98, 3, 2, 16\]"),
    "bias": ({"bias": draw(0, 2, 49, 48)}, r"bias: expected shape \[2, 49, 49\], got \[2, 49, 48\]"),
    "heads": ({"bias": draw(0, 3, 49, 49)}, r"bias: expected shape \[2, 49, 49\], got \[3, 49, 49\]"),
    "grid": ({"window": 5}, r"expected height and width in multiples of size .* got WindowGrid\(height=14, width=14, size=5"),
    "shift": ({"shift": 7}, "expected .* 0 <= shift < size, got .*shift=7"),
    "mask": ({"mask": draw(0, 3, 49, 49)}, r"mask: expected shape \[4, 49, 49\], got \[3, 49, 49\]"),
    "dtype": ({"bias": draw(0, 2, 49, 49).half()}, "expected one floating dtype.*qkv torch.float32, bias torch.float16"),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changed, message):
    arguments = problem(14, 14, 7, 3) | {"window": 7, "shift": 3, "scale": 0.2}
    with pytest.raises(ValueError, match=message):
        ops.window_attention(**arguments | changed)


# Grid, frames, heads; a program takes four of the windows up to 8 x 8.
KERNEL_GRIDS = {
    "one-window": ((7, 7, 7, 0), 5, 2),
    "square": ((14, 14, 7, 0), 1, 3),
    "square-shifted": ((14, 14, 7, 3), 1, 2),
    "wide-shifted": ((8, 12, 4, 1), 2, 1),
    "window-2-shifted": ((6, 4, 2, 1), 2, 1),
    "one-window-shifted": ((3, 3, 3, 1), 1, 1),
    "window-8-shifted": ((16, 8, 8, 4), 1, 1),
    "window-9": ((9, 9, 9, 0), 1, 2),
    "window-12-shifted": ((12, 24, 12, 6), 1, 1),
}
each_kernel_grid = pytest.mark.parametrize("case", KERNEL_GRIDS.values(), ids=KERNEL_GRIDS.keys())
LARGE_WINDOW = (9, 9, 9, 4)
each_kernel = pytest.mark.parametrize("grid", [GRIDS["wide-shifted"], LARGE_WINDOW], ids=["tile", "blocks"])
FREEZE = ("bias",)


def kernel(grid, **options):
    return function(ops, grid, impl="triton", **options)


def hold_kernel(tensors, *, grid, fast=None, frozen=FREEZE, **options):
    return hold(tensors, grid=grid, fast=fast or kernel(grid), frozen=frozen, **options)


@each_dtype
@each_kernel_grid
def test_kernel_grids(kernels, case, dtype):
    grid, frames, heads = case
    got = hold_kernel(problem(*grid, frames=frames, heads=heads, dtype=dtype), grid=grid)
    assert got["grad_qkv"].is_contiguous()


@each_dtype
@pytest.mark.parametrize("name", ["one-window", "square-shifted", "window-2-shifted", "window-12-shifted"])
def test_kernel_moves_are_exact(kernels, name, dtype):
    """With a bias that gives each query one key, values and their gradients are moved and nothing else."""
    (height, width, window, shift), frames, heads = KERNEL_GRIDS[name]
    tokens = window**2
    chosen = (torch.arange(tokens, device=Device.name) * (tokens - 1) + 2) % tokens
    bias = torch.full((heads, tokens, tokens), -1e4, dtype=dtype, device=Device.name)
    bias[:, torch.arange(tokens), chosen] = 0
    qkv = draw(0, frames, height, width, 3, heads, 16, dtype=dtype)
    qkv[..., 0, :, :] = 0
    got = evaluate(kernel((height, width, window, shift)), {"qkv": qkv, "bias": bias}, frozen=FREEZE)

    value = qkv[..., 2, :, :].flatten(3).requires_grad_()
    moved = window_reverse(window_partition(value, window, shift)[:, :, chosen], height, width, window, shift)
    (grad,) = torch.autograd.grad(moved, value, draw(1000, *moved.shape, dtype=dtype))
    assert torch.equal(got["out0"], moved)
    assert torch.equal(got["grad_qkv"][..., 2, :, :].flatten(3), grad)
    assert not got["grad_qkv"][..., :2, :, :].any()


@pytest.mark.parametrize("head_dim", [1, 5, 16, 64, 96, 128])
@each_dtype
def test_kernel_head_dims(kernels, dtype, head_dim):
    grid = (4, 8, 4, 2)
    hold_kernel(problem(*grid, frames=1, heads=2, head_dim=head_dim, dtype=dtype), grid=grid)


def test_kernel_wide_heads_in_large_windows(kernels):
    hold_kernel(problem(*LARGE_WINDOW, frames=1, heads=1, head_dim=96), grid=LARGE_WINDOW)


@each_kernel
@each_stride
def test_kernel_strides(kernels, strides, grid):
    hold_kernel(problem(*grid, heads=1, head_dim=16, strides=strides), grid=grid, upstream=strides)


@each_dtype
@each_kernel
def test_kernel_large_scores(kernels, grid, dtype):
    tensors = problem(*grid, frames=1, heads=1, dtype=dtype, scale=30**0.5)
    query, key, _ = window_partition(tensors["qkv"].double(), *grid[2:]).permute(3, 0, 1, 4, 2, 5)
    scores = (query @ key.mT).abs().max().item() * 32**-0.5
    assert scores > 100
    hold_kernel(tensors, grid=grid, scores=scores)


@each_kernel
def test_kernel_masks_by_a_hundred(kernels, grid):
    """Masked pairs lose 100, not everything: a large enough bias outweighs it."""
    tensors = problem(*grid, frames=1, heads=1)
    tensors["bias"] *= 60
    hold_kernel(tensors, grid=grid, scores=tensors["bias"].abs().max().item())


@each_kernel
def test_kernel_works_the_mask_out(kernels, grid):
    tensors = problem(*grid, frames=1, heads=1, head_dim=16)
    given = kernel(grid, mask=shift_mask(*grid))(**tensors)
    assert torch.equal(given, kernel(grid)(**tensors))


def test_kernel_bias_of_any_strides(kernels):
    """The model's bias is gathered with the heads last."""
    grid = GRIDS["wide-shifted"]
    tensors = problem(*grid)
    tensors["bias"] = tensors["bias"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    hold_kernel(tensors, grid=grid)


def test_kernel_frozen_qkv(kernels):
    grid = GRIDS["wide-shifted"]
    assert hold_kernel(problem(*grid), grid=grid, frozen=("qkv", "bias")).keys() == {"out0"}


@each_low_dtype
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "frozen-bias-float32"])
@each_kernel
def test_kernel_autocast(kernels, grid, dtype, mixed):
    tensors = problem(*grid, frames=1, heads=1)
    if mixed:
        tensors["qkv"] = tensors["qkv"].to(dtype)
    hold_kernel(tensors, grid=grid, autocast=dtype)


def test_kernel_compiled(kernels):
    grid = GRIDS["wide-shifted"]
    check_compiled(
        kernel(grid),
        partial(hold_kernel, grid=grid),
        lambda batch: problem(*grid, frames=batch, heads=1, head_dim=8),
        batched=["qkv"],
    )


@each_kernel
def test_kernel_as_pytorch_sees_it(kernels, grid):
    """Schema, fake and dispatch keys of the registered operators."""
    qkv, bias = problem(*grid, frames=1, heads=1, head_dim=16).values()
    options = (*grid[2:], 0.25)
    torch.library.opcheck(torch.ops.stgcma_fast.window_attention_fwd.default, (qkv, bias, *options))
    grad = draw(2, 1, *grid[:2], 16)
    torch.library.opcheck(torch.ops.stgcma_fast.window_attention_bwd.default, (grad, qkv, bias, *options))


@each_kernel
def test_kernel_repeats_bit_equal(kernels, grid):
    tensors = problem(*grid, frames=1, heads=1)
    first = evaluate(kernel(grid), tensors, frozen=FREEZE)
    for _ in range(2):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(kernel(grid), tensors, frozen=FREEZE).items())


def test_kernel_refuses_a_trained_bias(kernels):
    grid = GRIDS["wide-shifted"]
    tensors = problem(*grid)
    tensors["bias"].requires_grad_()
    with pytest.raises(
        NotImplementedError, match="window_attention: impl='triton' was asked for, but its kernel gives the bias"
    ):
        kernel(grid)(**tensors)
    with torch.no_grad():
        kernel(grid)(**tensors)


def test_kernel_refuses_what_it_cannot_take(kernels):
    grid = GRIDS["wide-shifted"]
    with pytest.raises(NotImplementedError, match="up to 128 channels a head, got 144"):
        kernel(grid)(**problem(*grid, head_dim=144))
    tensors = problem(*grid)
    with (
        torch.autocast(Device.name, torch.bfloat16),
        pytest.raises(NotImplementedError, match="a bias in float32, bfloat16 and float16"),
    ):
        kernel(grid)(tensors["qkv"], tensors["bias"].double())

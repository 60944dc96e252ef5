"""Streams packed one behind the other, taken apart and put together."""

import pytest
import torch

from stgcma_fast.ops.packing import join, split
from tests.support.inputs import draw


def test_parts_that_lie_together_are_joined_without_a_copy():
    rows = draw(0, 7, 3, 4)
    joined = join(rows.split([2, 4, 1]))
    assert joined.data_ptr() == rows.data_ptr()
    assert torch.equal(joined, rows)


APART = {
    "two-tensors": lambda: [draw(0, 2, 4), draw(1, 3, 4)],
    "gap": lambda: [draw(0, 7, 4)[:2], draw(0, 7, 4)[3:]],
    "order": lambda: list(draw(0, 7, 4).split([3, 4]))[::-1],
    "columns": lambda: list(draw(0, 4, 6).t().split([3, 3])),
    "repeated": lambda: [draw(0, 1, 4).expand(2, 4), draw(1, 3, 4)],
}


@pytest.mark.parametrize("parts", APART.values(), ids=APART.keys())
def test_parts_that_do_not_are_copied(parts):
    parts = parts()
    assert torch.equal(join(parts), torch.cat(parts))


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (0, 5), (1, 3, 1)], ids=str)
def test_split_and_its_gradient(sizes):
    rows = draw(0, 5, 4).requires_grad_()
    parts = split(rows, sizes)
    assert all(torch.equal(part, wanted) for part, wanted in zip(parts, rows.split(sizes), strict=True))
    weights = [draw(1 + i, *part.shape) for i, part in enumerate(parts)]
    (grad,) = torch.autograd.grad(parts, rows, weights)
    assert torch.equal(grad, torch.cat(weights))


def test_packed_gradients_come_back_as_they_are():
    rows = draw(0, 5, 4).requires_grad_()
    packed = draw(1, 5, 4)
    (grad,) = torch.autograd.grad(split(rows, (2, 3)), rows, packed.split([2, 3]))
    assert grad.data_ptr() == packed.data_ptr()


def test_a_part_without_gradient_counts_as_zero():
    rows = draw(0, 5, 4).requires_grad_()
    (grad,) = torch.autograd.grad(split(rows, (2, 3))[1].sum(), rows)
    assert torch.equal(grad, torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]]).expand(5, 4))


def test_compiled():
    compiled = torch.compile(lambda x: [part * 2 for part in split(x, (2, 3))], fullgraph=True, backend="aot_eager")
    x = draw(0, 5, 4).requires_grad_()
    outs = compiled(x)
    (grad,) = torch.autograd.grad(outs, x, [draw(1, 2, 4), draw(2, 3, 4)])
    assert torch.equal(grad, 2 * torch.cat([draw(1, 2, 4), draw(2, 3, 4)]))

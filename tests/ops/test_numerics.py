"""The yardstick itself: it must fail on what is wrong."""

import pytest
import torch

from tests.support.inputs import STRIDES, draw, each_stride, strided
from tests.support.numerics import assert_close, check

HI = draw(0, 1000, 64, dtype=torch.float64)
LOW = HI.half()
NEAR = (HI * (1 + 2e-4 * draw(1, 1000, 64, dtype=torch.float64).sign())).half()


def corrupted(row: torch.Tensor) -> torch.Tensor:
    fast = LOW.clone()
    fast[417] = row.half()
    return fast


def test_accepts_an_honest_result():
    assert_close("op", "out", NEAR, HI, LOW)


def test_rejects_a_bad_row_that_mean_and_max_do_not_show():
    """One outlier in ``low`` widens the bound on the largest error; a whole row at half of it still fails, by its RMS."""
    low = LOW.clone()
    low[3, 5] += 0.1
    with pytest.raises(AssertionError, match=r"out torch.float16 shape \[1000, 64\].*: rms error .*worst at \(417, "):
        assert_close("op", "out", corrupted(HI[417] + 0.1), HI, low, roundings=0, reductions=[1_000_000])


def test_rejects_a_swapped_row():
    with pytest.raises(AssertionError, match="max error"):
        assert_close("op", "out", corrupted(HI[416]), HI, LOW)


def test_rejects_a_small_bias_of_every_element():
    with pytest.raises(AssertionError, match="mean error"):
        assert_close("op", "out", (HI * 1.0015).half(), HI, LOW)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_what_is_not_finite(value):
    with pytest.raises(AssertionError, match=r"not finite.*worst at \(417, "):
        assert_close("op", "out", corrupted(torch.full((64,), value)), HI, LOW)


def test_rejects_another_dtype():
    with pytest.raises(AssertionError, match=r"dtype torch.float32, reference torch.float16"):
        assert_close("op", "out", LOW.float(), HI, LOW)


def test_rejects_a_reference_that_overflows():
    with pytest.raises(AssertionError, match="proves nothing"):
        assert_close("op", "out", LOW, HI, LOW * 1e6)


def test_an_exact_reference_leaves_only_the_derived_bound():
    hi = HI.half().double()
    assert_close("op", "out", LOW, hi, LOW)
    with pytest.raises(AssertionError, match="max error"):
        assert_close("op", "out", LOW * 1.01, hi, LOW)


def test_gradients_are_checked_too():
    """An operator right in its value and wrong in one gradient alone."""

    def wrong(x, y):
        return x * (y - 0.5 * (y - y.detach()))

    tensors = {"x": draw(0, 5, 7), "y": draw(1, 5, 7)}
    with pytest.raises(AssertionError, match="op grad_y"):
        check("op", wrong, lambda x, y: x * y, tensors, reductions=[])


@each_stride
def test_layouts(strides):
    x = draw(0, 3, 5, 4)
    y = strided(x, strides)
    assert torch.equal(y, x[:1].expand_as(x) if strides == "expanded" else x)
    layouts = {s: (strided(x, s).stride(), strided(x, s).storage_offset()) for s in STRIDES}
    assert len(set(layouts.values())) == len(STRIDES)

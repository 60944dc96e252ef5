"""The operators' shapes in the models."""

from __future__ import annotations

import importlib

import pytest
import torch

from stgcma_fast import ops


@pytest.fixture
def shapes(scripts):
    return importlib.import_module("shapes")


def test_every_operator_has_every_stage(shapes):
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name[0].islower()}
    assert {case.op for case in shapes.CASES} == functions
    swin = {f"swin_{size} stage {stage}" for size in "bl" for stage in (1, 2, 3, 4)}
    clip = {"clip_b16", "clip_l14"}
    for op in functions:
        labels = [case.label for case in shapes.CASES if case.op == op]
        assert len(labels) == len(set(labels))
        wanted = {"window_attention": swin, "spatial_attention": clip}.get(op, swin | clip)
        assert all(any(label.startswith(stage) for label in labels) for stage in wanted)


def test_the_papers_sizes(shapes):
    sizes = {stage.label: stage for stage in shapes.STAGES}
    large = [sizes[f"swin_l stage {i}"] for i in (1, 2, 3, 4)]
    assert [(s.side, s.dim, s.rank) for s in large] == [(56, 192, 96), (28, 384, 96), (14, 768, 96), (7, 1536, 96)]
    assert [s.shifts for s in large] == [(0, 3), (0, 3), (0, 3), (0,)]
    assert (sizes["clip_b16"].visual, sizes["clip_b16"].audio, sizes["clip_b16"].rank) == (197, 49, 96)
    assert (sizes["clip_l14"].visual, sizes["clip_l14"].audio, sizes["clip_l14"].rank) == (257, 64, 64)


def test_the_operators_take_them(shapes):
    """The reference checks and computes their shapes, on no data."""
    for case in (*shapes.CASES, *shapes.STRESS):
        args, kwargs = case.build(torch.float32, "meta")
        outputs = list(shapes.tensors(case.function(*args, **kwargs, impl="reference")))
        assert all(y.requires_grad for y in outputs), case


def test_values(shapes):
    case = next(c for c in shapes.CASES if (c.op, c.label) == ("adapter", "clip_b16 audio"))
    (x, params, *_), _ = case.fill(torch.bfloat16, "cpu")
    assert x.std().item() == pytest.approx(1, rel=0.05)
    assert params.down_weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert x.dtype == torch.bfloat16
    assert params.up_weight.requires_grad


def test_stress_shapes(shapes):
    """The odd shapes have names of their own, and every operator but that of the ViTs has eight clips, one frame, width 100."""
    labels = [(case.op, case.label) for case in (*shapes.CASES, *shapes.STRESS)]
    assert len(labels) == len(set(labels))
    stressed = ("swin_l stage 3 batch 8", "swin_l stage 3 one frame", "width 100")
    for op in {case.op for case in shapes.CASES} - {"spatial_attention"}:
        assert all(any(name == op and label.startswith(stress) for name, label in labels) for stress in stressed), op


def test_clips_multiply_the_images(shapes):
    (case,) = (case for case in shapes.STRESS if (case.op, case.label) == ("temporal_attention", "swin_l stage 3 batch 8"))
    assert case.build(torch.float32, "meta")[0][0].shape == (8, 10, 196, 3, 24, 32)
    (case,) = (case for case in shapes.STRESS if (case.op, case.label) == ("av_adapter", "swin_l stage 3 batch 8"))
    assert case.build(torch.float32, "meta")[0][0].shape == (80, 196, 768)

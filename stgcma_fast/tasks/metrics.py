"""What a model of a task is judged by: one metric a task, fed with the model's output and the pipeline's batch.

Every state is an int64 counter that is summed over processes. So the same outputs give the same scores, to the last bit, in
any order and on any number of processes, and casting a module that holds a metric leaves it as it is.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, get_args

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from ..config import Task
from ..ops.checks import check_choice

# The score that tells the best checkpoint of a task; of all of them the higher is the better.
SELECTED: dict[Task, str] = {"ave": "accuracy", "avs": "miou", "avqa": "accuracy"}
# Of MUSIC-AVQA: a question's modality, and what it asks for.
QUESTION_TYPES = (
    ("Audio", "Counting"),
    ("Audio", "Comparative"),
    ("Visual", "Counting"),
    ("Visual", "Location"),
    ("Audio-Visual", "Existential"),
    ("Audio-Visual", "Counting"),
    ("Audio-Visual", "Location"),
    ("Audio-Visual", "Comparative"),
    ("Audio-Visual", "Temporal"),
)
MODALITIES = tuple(dict.fromkeys(modality for modality, _ in QUESTION_TYPES))
THRESHOLDS = 255
# Fractions are summed in steps of 2**-40, as integers: exactly, up to 2**23 images.
_STEPS = 2**40


def build_metrics(task: Task) -> Metric:
    """The metric of a task: ``update(output, batch)``, then ``compute()``, a flat dictionary of scores, then ``reset()``.

    ``output`` is what `FastSTGCMA` returns, in any floating dtype, ``batch`` a dictionary of `data.AVPipeline`. Scores are
    float64 scalars in [0, 1], NaN where nothing was counted. Updating never waits for the device.

    Raises:
        ValueError: an unknown task.
    """
    check_choice("task", task, get_args(Task))
    return {"ave": SegmentAccuracy, "avs": MaskScores, "avqa": AnswerAccuracy}[task]()


class _Scores(Metric):
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def add_counter(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest of ``[N, C]`` is that of the label; NaN is no answer, so that a diverged model scores nothing."""
    value, best = logits.max(-1)
    return (best == labels) & ~value.isnan()


class SegmentAccuracy(_Scores):
    """AVE: "accuracy", the share of all segments, background included, whose class is the label's.

    ``update`` reads logits ``[B * T, C]``, t running fastest, and "label" ``[B, T, C]``, one-hot or a mixture, of which the
    largest counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_counter("correct")
        self.add_counter("total")

    def update(self, output: Tensor, batch: Mapping[str, Any]) -> None:
        labels = batch["label"]
        if labels.ndim != 3 or output.shape != labels.flatten(0, 1).shape:
            raise ValueError(
                f"label: got shape {list(labels.shape)} for logits {list(output.shape)}, expected [B, T, C] for [B * T, C]"
            )
        self.correct = self.correct + _hits(output, labels.flatten(0, 1).argmax(-1)).sum()
        self.total = self.total + len(output)

    def compute(self) -> dict[str, Tensor]:
        return {"accuracy": self.correct.double() / self.total}


class MaskScores(_Scores):
    """AVS: "miou" and "fscore", of every image alike, however images are batched.

    Probabilities are sigmoids in float32; a NaN is no pixel of a mask.

    "miou" is the mean over images of ``intersection / (union + 1e-7)``, of probabilities > 0.5. In an image without mask it is
    the share of pixels left empty.

    "fscore" is the convention of AVSBench: for each of 255 thresholds, ``linspace(0, 1 - 1e-10, 255)`` in float64, an image's
    pixels with probability >= threshold have a precision and a recall, each with 1e-20 in the denominator, and
    ``F = 1.3 P R / (0.3 P + R)``, 0 where both are 0. F's curve is averaged over the images that have a mask; its maximum is
    the score.

    ``update`` reads the first of the outputs, logits ``[B * T, 1, height, width]``, t running fastest, and "mask", 0 or 1, of
    shape ``[B, T, 1, height, width]`` or ``[B, 1, 1, height, width]``, where first frames alone have masks and are judged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_counter("iou")
        self.add_counter("images")
        self.add_counter("curve", THRESHOLDS)
        self.add_counter("sounding")

    def update(self, output: tuple[Tensor, Any, Any], batch: Mapping[str, Any]) -> None:
        logits, masks = output[0], batch["mask"]
        frames, rest = divmod(len(logits), len(masks))
        if rest or masks.shape not in [(len(masks), count, *logits.shape[1:]) for count in (1, frames)]:
            raise ValueError(
                f"mask: got shape {list(masks.shape)} for logits {list(logits.shape)}, expected [B, 1 or T, 1, height, width] "
                "for logits [B * T, 1, height, width]"
            )
        logits = logits.unflatten(0, (-1, frames))[:, : masks.shape[1]]
        probabilities = logits.float().sigmoid().flatten(0, 1).flatten(1)
        wanted = masks.flatten(0, 1).flatten(1) > 0.5
        self.iou = self.iou + _steps(_iou(probabilities > 0.5, wanted)).sum()
        self.images = self.images + len(wanted)
        self.curve = self.curve + _steps(_f_curves(probabilities, wanted)).sum(0)
        self.sounding = self.sounding + wanted.any(-1).sum()

    def compute(self) -> dict[str, Tensor]:
        return {
            "miou": self.iou.double() / _STEPS / self.images,
            "fscore": self.curve.max().double() / _STEPS / self.sounding,
        }


def _steps(fractions: Tensor) -> Tensor:
    return (fractions * _STEPS).round().long()


def _iou(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each image, float64 ``[N]``, from bool ``[N, pixels]``."""
    empty = ~wanted.any(-1, keepdim=True)
    intersection = torch.where(empty, ~found, found & wanted).sum(-1)
    union = torch.where(empty, True, found | wanted).sum(-1)
    return intersection.double() / (union.double() + 1e-7)


def _f_curves(probabilities: Tensor, wanted: Tensor) -> Tensor:
    """F at each threshold, float64 ``[N, 255]``, 0 for images without mask, from ``[N, pixels]``."""
    thresholds = torch.linspace(0, 1 - 1e-10, THRESHOLDS, dtype=torch.float64, device=probabilities.device)
    # A histogram of each image, apart for background and mask: bin k has the pixels that pass the first k thresholds.
    bins = torch.bucketize(probabilities.double().nan_to_num(nan=-1.0), thresholds, right=True)
    bins += wanted * (THRESHOLDS + 1)
    counts = bins.new_zeros(len(bins), 2 * (THRESHOLDS + 1)).scatter_add_(1, bins, torch.ones_like(bins))
    passing = counts.unflatten(1, (2, -1)).flip(-1).cumsum(-1).flip(-1)
    found, hit = passing.sum(1)[:, 1:].double(), passing[:, 1, 1:].double()
    precision, recall = hit / (found + 1e-20), hit / (wanted.sum(-1, keepdim=True).double() + 1e-20)
    return (1.3 * precision * recall / (0.3 * precision + recall)).nan_to_num(nan=0.0)


class AnswerAccuracy(_Scores):
    """AVQA: the share of questions answered rightly: "accuracy" of all, "accuracy/Audio" and so on of those of a modality,
    "accuracy/Audio/Counting" and so on of those of a type. Types and modalities without a question are left out.

    ``update`` reads the first of the outputs, logits ``[B, answers]``, "label" ``[B]``, and "type", for each question the
    published word for it, such as ``'["Audio", "Counting"]'``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_counter("correct", len(QUESTION_TYPES))
        self.add_counter("total", len(QUESTION_TYPES))

    def update(self, output: tuple[Tensor, Any, Any], batch: Mapping[str, Any]) -> None:
        answers, labels, types = output[0], batch["label"], batch["type"]
        if answers.ndim != 2 or labels.shape != answers.shape[:1] or len(types) != len(answers):
            raise ValueError(
                f"label and type: got shape {list(labels.shape)} and {len(types)} types for answers {list(answers.shape)}, "
                "expected [B] and B for [B, answers]"
            )
        numbers = torch.tensor([_type_number(name) for name in types]).to(answers.device, non_blocking=True)
        self.correct = self.correct.index_add(0, numbers, _hits(answers, labels).long())
        self.total = self.total.index_add(0, numbers, torch.ones_like(numbers))

    def compute(self) -> dict[str, Tensor]:
        correct, total = self.correct.double(), self.total
        scores = {"accuracy": correct.sum() / total.sum()}
        for modality in MODALITIES:
            members = [number for number, (name, _) in enumerate(QUESTION_TYPES) if name == modality]
            if total[members].any():
                scores[f"accuracy/{modality}"] = correct[members].sum() / total[members].sum()
        for number, (modality, kind) in enumerate(QUESTION_TYPES):
            if total[number]:
                scores[f"accuracy/{modality}/{kind}"] = correct[number] / total[number]
        return scores


def _type_number(name: str) -> int:
    """Place in `QUESTION_TYPES` of a list written as a string."""
    try:
        return QUESTION_TYPES.index(tuple(ast.literal_eval(name)))
    except (ValueError, SyntaxError, TypeError) as error:
        known = ", ".join(f'["{modality}", "{kind}"]' for modality, kind in QUESTION_TYPES)
        raise ValueError(f"type: got {name!r}, expected one of {known}") from error


def table(task: Task, values: Mapping[str, Tensor | float]) -> Table:
    """Scores as the paper prints them, in percent: of AVQA, each type of question, averages, and all.

    Args:
        task: whose scores.
        values: what the task's metric computed.

    Raises:
        ValueError: an unknown task, or the score that `SELECTED` names is not there.
    """
    check_choice("task", task, get_args(Task))
    if SELECTED[task] not in values:
        raise ValueError(f"values: got {sorted(values)}, expected {SELECTED[task]!r} among them")
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    out.add_column("score", no_wrap=True)
    out.add_column("%", justify="right", no_wrap=True)

    def row(name: str, key: str, end_section: bool = False) -> None:
        out.add_row(name, f"{100 * float(values[key]):.2f}" if key in values else "-", end_section=end_section)

    if task == "avs":
        row("mIoU", "miou")
        row("F-score", "fscore")
        return out
    if task == "avqa":
        for modality in MODALITIES:
            for kind in (kind for name, kind in QUESTION_TYPES if name == modality):
                row(f"{modality}, {kind}", f"accuracy/{modality}/{kind}")
            row(f"{modality}, average", f"accuracy/{modality}", end_section=True)
    row("Accuracy", "accuracy")
    return out

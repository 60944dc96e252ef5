"""Scores against loops in numpy, written from the definitions; and that shares of processes change no bit of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning_utilities import apply_to_collection
from rich.console import Console
from torch import multiprocessing

from stgcma_fast.tasks.metrics import QUESTION_TYPES, SELECTED, build_metrics, table

TYPES = [
    '["Audio", "Counting"]',
    '["Audio", "Comparative"]',
    '["Visual", "Counting"]',
    '["Visual", "Location"]',
    '["Audio-Visual", "Existential"]',
    '["Audio-Visual", "Counting"]',
    '["Audio-Visual", "Location"]',
    '["Audio-Visual", "Comparative"]',
    '["Audio-Visual", "Temporal"]',
]
# Of six batches, no two alike.
SIZES = (3, 1, 2, 4, 1, 2)
FRAMES, CLASSES, SIDE = 5, 7, 12
TASKS = tuple(SELECTED)


def batches(task: str) -> list[tuple]:
    """Outputs and batches as a model and a pipeline give them, the same ones in every call."""
    draws = torch.Generator().manual_seed(1)
    return [batch_of(task, size, draws) for size in SIZES]


def batch_of(task: str, size: int, draws: torch.Generator) -> tuple:
    if task == "ave":
        label = torch.rand(size, FRAMES, CLASSES, generator=draws)
        # Logits that are often right.
        return torch.randn(size * FRAMES, CLASSES, generator=draws) + 3 * label.flatten(0, 1), {"label": label}
    if task == "avqa":
        label = torch.randint(CLASSES, (size,), generator=draws)
        answers = torch.randn(size, CLASSES, generator=draws) + 2 * torch.nn.functional.one_hot(label, CLASSES)
        kinds = torch.randint(len(TYPES), (size,), generator=draws).tolist()
        return (answers, None, None), {"label": label, "type": [TYPES[kind] for kind in kinds]}
    mask = (
        torch.rand(size, FRAMES, 1, SIDE, SIDE, generator=draws) < torch.rand(size, FRAMES, 1, 1, 1, generator=draws)
    ).float()
    mask[:, 1] = 0
    logits = 4 * torch.randn(size * FRAMES, 1, SIDE, SIDE, generator=draws) + 5 * mask.flatten(0, 1)
    # Probabilities of 0, 1/2 and 1 to the bit.
    logits[:, :, 0, :3], logits[:, :, 1, :3], logits[:, :, 2, :3] = -200, 0, 200
    return (logits, [], []), {"mask": mask}


def scores(task: str, pairs: list[tuple], metric=None) -> dict[str, float]:
    metric = metric or build_metrics(task)
    for output, batch in pairs:
        metric.update(output, batch)
    return {name: value.item() for name, value in metric.compute().items()}


def logits_as(dtype: torch.dtype, pairs: list[tuple]) -> list[tuple]:
    return [((o[0].to(dtype), *o[1:]) if isinstance(o, tuple) else o.to(dtype), batch) for o, batch in pairs]


def expected_segments(pairs: list[tuple]) -> dict[str, float]:
    correct = total = 0
    for logits, batch in pairs:
        logits = logits.float().numpy()
        for b, clip in enumerate(batch["label"].numpy()):
            for t, segment in enumerate(clip):
                correct += int(np.argmax(logits[b * len(clip) + t]) == np.argmax(segment))
                total += 1
    return {"accuracy": correct / total}


def images(pairs: list[tuple]):
    """Probabilities and masks, frame by frame."""
    for (logits, _, _), batch in pairs:
        probabilities = torch.sigmoid(logits.float()).numpy()
        for number, mask in enumerate(batch["mask"].flatten(0, 1).numpy()):
            yield probabilities[number, 0], mask[0] == 1


def expected_masks(pairs: list[tuple]) -> dict[str, float]:
    ious, curves = [], []
    thresholds = np.linspace(0, 1 - 1e-10, 255)
    for probability, mask in images(pairs):
        found = probability > 0.5
        if not mask.any():
            ious.append((~found).sum() / (mask.size + 1e-7))
            continue
        ious.append((found & mask).sum() / ((found | mask).sum() + 1e-7))
        curve = []
        for threshold in thresholds:
            passed = probability.astype(np.float64) >= threshold
            precision = (passed & mask).sum() / (passed.sum() + 1e-20)
            recall = (passed & mask).sum() / (mask.sum() + 1e-20)
            curve.append(1.3 * precision * recall / (0.3 * precision + recall) if precision or recall else 0.0)
        curves.append(curve)
    return {"miou": np.mean(ious), "fscore": np.mean(curves, axis=0).max()}


def expected_answers(pairs: list[tuple]) -> dict[str, float]:
    counts: dict[str, list[int]] = {}
    for (answers, _, _), batch in pairs:
        for logits, label, kind in zip(answers.float().numpy(), batch["label"].tolist(), batch["type"], strict=True):
            modality, what = kind.strip('[]"').split('", "')
            for key in ("accuracy", f"accuracy/{modality}", f"accuracy/{modality}/{what}"):
                count = counts.setdefault(key, [0, 0])
                count[0] += int(np.argmax(logits) == label)
                count[1] += 1
    return {key: correct / total for key, (correct, total) in counts.items()}


EXPECTED = {"ave": expected_segments, "avs": expected_masks, "avqa": expected_answers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_definitions(task: str, dtype: torch.dtype) -> None:
    pairs = logits_as(dtype, batches(task))
    expected = EXPECTED[task](pairs)
    assert 0.3 < expected[SELECTED[task]] < 0.9
    # Every image's fraction is rounded to a multiple of 2**-40.
    assert scores(task, pairs) == pytest.approx(expected, rel=0, abs=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert scores(task, pairs) == scores(task, pairs[::-1]) == pytest.approx(expected, rel=0, abs=1e-12)


def test_every_type_of_question_has_its_own_score() -> None:
    answers = torch.eye(2)[[0] * len(TYPES)]
    batch = {"label": torch.tensor([number % 2 for number in range(len(TYPES))]), "type": TYPES}
    got = scores("avqa", [((answers, None, None), batch)])
    assert got == expected_answers([((answers, None, None), batch)])
    assert set(got) == {
        "accuracy",
        *("accuracy/Audio", "accuracy/Visual", "accuracy/Audio-Visual"),
        *(f"accuracy/{modality}/{kind}" for modality, kind in QUESTION_TYPES),
    }


def test_averages_of_answers_weigh_questions_not_types() -> None:
    batch = {"label": torch.tensor([0, 0, 0, 1]), "type": [TYPES[0]] * 3 + [TYPES[1]]}
    got = scores("avqa", [((torch.eye(2)[[0] * 4], None, None), batch)])
    assert got == {"accuracy": 0.75, "accuracy/Audio": 0.75, "accuracy/Audio/Counting": 1, "accuracy/Audio/Comparative": 0}


def of_images(logits: list[list[float]], masks: list[list[float]]) -> dict[str, float]:
    """Scores of images of one row each, each a clip of its own."""
    return scores("avs", [((torch.tensor(logits)[:, None, None], [], []), {"mask": torch.tensor(masks)[:, None, None, None]})])


def test_a_probability_equal_to_a_threshold_passes_it() -> None:
    # All are 0 and pass the first threshold alone, where precision is 3/4 and recall 1.
    assert of_images([[-200.0] * 4], [[1.0, 1, 1, 0]])["fscore"] == pytest.approx(1.3 * 0.75 / (0.3 * 0.75 + 1), abs=1e-12)


def test_the_last_threshold_is_passed_by_a_probability_of_one_alone() -> None:
    assert of_images([[200.0, 200, 15, 15]], [[1.0, 1, 0, 0]])["fscore"] == pytest.approx(1, abs=1e-12)


def test_a_probability_of_one_half_is_no_pixel_of_the_mask_for_iou() -> None:
    assert of_images([[0.0, 1, 1, -1]], [[1.0, 1, 0, 0]])["miou"] == pytest.approx(1 / 3, abs=1e-7)


def test_images_without_mask() -> None:
    got = of_images([[9.0, -9, -9, -9]], [[0.0] * 4])
    assert got["miou"] == pytest.approx(3 / 4, abs=1e-7)
    assert np.isnan(got["fscore"])
    one = of_images([[9.0, -9, -9, -9]], [[1.0, 0, 0, 0]])
    assert of_images([[9.0, -9, -9, -9], [9.0, 9, 9, 9]], [[1.0, 0, 0, 0], [0.0] * 4])["fscore"] == one["fscore"]


def test_first_frames_are_judged_where_they_alone_have_masks() -> None:
    (logits, _, _), batch = batches("avs")[0]
    first = {"mask": batch["mask"][:, :1]}
    assert scores("avs", [((logits, [], []), first)]) == scores("avs", [((logits[::FRAMES], [], []), first)])


def test_nan_is_no_answer() -> None:
    nan = torch.full((5, 2), torch.nan)
    assert scores("ave", [(nan, {"label": torch.eye(2)[[0] * 5][None]})]) == {"accuracy": 0}
    batch = {"label": torch.zeros(5, dtype=torch.long), "type": [TYPES[0]] * 5}
    assert scores("avqa", [((nan, None, None), batch)])["accuracy"] == 0
    assert of_images([[torch.nan] * 4], [[1.0, 1, 0, 0]]) == {"miou": 0, "fscore": 0}


@pytest.mark.parametrize("task", TASKS)
def test_casts_resets_and_inference_mode_keep_counters(task: str) -> None:
    pairs = batches(task)
    expected = scores(task, pairs)
    metric = build_metrics(task)
    with torch.inference_mode():
        scores(task, pairs[:2], metric)
    metric.reset()
    with torch.inference_mode():
        scores(task, pairs[:2], metric)
    holder = torch.nn.ModuleList([metric]).to(torch.bfloat16).half()
    assert scores(task, pairs[2:], holder[0]) == expected


def _one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        shares = {"four and two": (slice(0, 4), slice(4, 6)), "all and none": (slice(0, 6), slice(0, 0))}
        results = {(task, name): scores(task, batches(task)[share[rank]]) for task in TASKS for name, share in shares.items()}
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_with_uneven_shares_give_what_one_gives(tmp_path: Path) -> None:
    multiprocessing.start_processes(_one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert len(first) == 2 * len(TASKS)
    for (task, _), got in first.items():
        assert got == scores(task, batches(task))


@pytest.mark.parametrize(
    ("task", "output", "batch", "message"),
    [
        ("ave", torch.zeros(6, 3), {"label": torch.zeros(2, 2, 3)}, r"got shape \[2, 2, 3\] for logits \[6, 3\]"),
        ("ave", torch.zeros(6, 3), {"label": torch.zeros(6, 3)}, r"expected \[B, T, C\]"),
        ("avs", (torch.zeros(5, 1, 4, 4), [], []), {"mask": torch.zeros(1, 5, 1, 8, 8)}, r"got shape \[1, 5, 1, 8, 8\]"),
        ("avs", (torch.zeros(5, 1, 4, 4), [], []), {"mask": torch.zeros(1, 4, 1, 4, 4)}, r"expected \[B, 1 or T"),
        ("avqa", (torch.zeros(2, 3),), {"label": torch.zeros(1), "type": TYPES[:2]}, r"got shape \[1\] and 2 types"),
        ("avqa", (torch.zeros(2, 3),), {"label": torch.zeros(2), "type": TYPES[:1]}, "and 1 types"),
    ],
)
def test_what_does_not_fit_is_refused(task: str, output: object, batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_metrics(task).update(output, batch)


@pytest.mark.parametrize("name", ['["Audio", "Smell"]', "Audio", "[", "", "3", '[["Audio"], "Counting"]', '["Audio"]'])
def test_an_unknown_type_of_question_is_refused(name: str) -> None:
    batch = {"label": torch.zeros(1, dtype=torch.long), "type": [name]}
    with pytest.raises(ValueError, match=r"type: got .*, expected one of \[\"Audio\", \"Counting\"\]") as error:
        build_metrics("avqa").update((torch.zeros(1, 3), None, None), batch)
    assert repr(name) in str(error.value)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task: got 'avd', allowed are 'ave', 'avs', 'avqa'"):
        build_metrics("avd")
    with pytest.raises(ValueError, match="task: got 'avd'"):
        table("avd", {})


def printed(task: str, values: dict) -> list[list[str]]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(task, values))
    return [line.rsplit(maxsplit=1) for line in capture.get().splitlines()[2:] if line.strip(" ─")]


def test_tables() -> None:
    assert printed("ave", {"accuracy": torch.tensor(0.8125)}) == [["Accuracy", "81.25"]]
    assert printed("avs", {"miou": 0.5, "fscore": 0.875}) == [["mIoU", "50.00"], ["F-score", "87.50"]]
    values = {"accuracy": 0.5, "accuracy/Visual": 0.25, "accuracy/Visual/Location": 0.125, "loss": 3.0}
    assert printed("avqa", values) == [
        ["Audio, Counting", "-"],
        ["Audio, Comparative", "-"],
        ["Audio, average", "-"],
        ["Visual, Counting", "-"],
        ["Visual, Location", "12.50"],
        ["Visual, average", "25.00"],
        ["Audio-Visual, Existential", "-"],
        ["Audio-Visual, Counting", "-"],
        ["Audio-Visual, Location", "-"],
        ["Audio-Visual, Comparative", "-"],
        ["Audio-Visual, Temporal", "-"],
        ["Audio-Visual, average", "-"],
        ["Accuracy", "50.00"],
    ]
    with pytest.raises(ValueError, match=r"got \['test/miou'\], expected 'miou'"):
        table("avs", {"test/miou": 0.5})


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
def test_updates_on_the_gpu_do_not_wait_and_count_the_same(task: str) -> None:
    pairs = [apply_to_collection(pair, torch.Tensor, torch.Tensor.cuda) for pair in batches(task)]
    metric = build_metrics(task).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for output, batch in pairs:
            metric.update(output, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(
        scores(task, batches(task)), rel=0, abs=1e-12
    )

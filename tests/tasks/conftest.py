"""Data sets of a few clips, and the arguments of trainings so small that a test can run several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stgcma_fast.data.synth import synthesize

# Sizes of a model's own, the smallest Swin of two stages.
ARCH = {"image_size": 56, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window": 7}


@pytest.fixture(scope="session")
def ave_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AVE's layout: 9 clips for training, 3 for validation, 3 for test."""
    root = tmp_path_factory.mktemp("ave")
    synthesize("ave", root, 15, workers=1)
    return root


@pytest.fixture(scope="session")
def avs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AVSBench's layout, S4: 6 clips for training, 2 for validation, 2 for test."""
    root = tmp_path_factory.mktemp("avs")
    synthesize("avs", root, 10, workers=1)
    return root


@pytest.fixture(scope="session")
def avqa_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MUSIC-AVQA's layout: 10 questions of 2 clips for training, 3 of 2 clips for validation and for test each."""
    root = tmp_path_factory.mktemp("avqa")
    synthesize("avqa", root, 10, workers=1)
    path = root / "avqa-train.json"
    # The first clip has questions of all types. Negatives are of another one.
    train = json.loads(path.read_text())[:10]
    path.write_text(json.dumps(train))
    # Words and answers have their numbers from training.
    texts = {record["question_content"] for record in train}
    answers = {record["anser"] for record in train}
    values = {value for record in train for value in json.loads(record["templ_values"])}
    for split in ("val", "test"):
        path = root / f"avqa-{split}.json"
        known = [
            record
            for record in json.loads(path.read_text())
            if record["question_content"] in texts
            and record["anser"] in answers
            and values.issuperset(json.loads(record["templ_values"]))
        ]
        # From both ends, for negatives are of another clip here, too.
        path.write_text(json.dumps([*known[:2], known[-1]]))
    return root


@pytest.fixture(scope="session")
def fit_args(request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """``fit_args(task, folder, **changes)``: arguments of ``stgcma-fast fit`` for two epochs of the smallest model."""

    def args(task: str, folder: Path, **changes: object) -> list[str]:
        """Keys are as on the command line, with ``__`` for the dot: ``trainer__max_epochs=1``."""
        values = {
            "model__task": task,
            "model__arch": {"class_path": "stgcma_fast.SwinConfig", "init_args": ARCH},
            "model__adapters": 0.5,
            "model__lr": 1e-3,
            "model__head_lr": 1.0,
            "model__warmup_epochs": 0,
            "data__root": request.getfixturevalue(f"{task}_root"),
            "data__batch_size": 2,
            "data__workers": 0,
            "trainer__accelerator": "cpu",
            "trainer__precision": "32-true",
            "trainer__max_epochs": 2,
            "trainer__default_root_dir": folder,
            "trainer__enable_progress_bar": False,
        } | changes
        return [
            f"--{key.replace('__', '.')}={json.dumps(value) if isinstance(value, dict | list | bool) else value}"
            for key, value in values.items()
        ]

    return args

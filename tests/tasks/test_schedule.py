"""Learning rates as published, in the table and in the optimizer's hands; accumulated gradients are those of one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from stgcma_fast import ClipConfig
from stgcma_fast.tasks.datamodule import AVDataModule
from stgcma_fast.tasks.module import STGCMAModule
from stgcma_fast.tasks.schedule import learning_rates
from tests.support.models import seeded_state

CLIP = ClipConfig(image_size=32, patch_size=16, embed_dim=32, layers=2, heads=2, audio_frames=102, mel_bins=128)


def published(base: float, minimum: float, warmup: int, steps: int) -> np.ndarray:
    """Section 4 of the settings: ``linspace(0, base)``, both ends included, then half a cosine."""
    rest = steps - warmup
    falling = minimum + 0.5 * (base - minimum) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate([np.linspace(0, base, warmup), falling])


@pytest.mark.parametrize(
    ("base", "minimum", "warmup", "steps"),
    [
        (5e-5, 2e-6, 2 * 3339, 20 * 3339),  # AVE's adapters, published
        (5e-6, 2e-6, 2 * 3339, 20 * 3339),  # AVE's head
        (3e-4, 2e-5, 5 * 1726, 20 * 1726),  # AVS
        (1e-3, 0.0, 1, 7),
        (1e-3, 1e-5, 0, 7),
        (1e-3, 1e-5, 7, 7),
        (1e-3, 1e-3, 2, 4),
    ],
)
def test_the_table_is_the_published_one(base, minimum, warmup, steps):
    rates = learning_rates(base, minimum, warmup, steps)
    np.testing.assert_allclose(rates, published(base, minimum, warmup, steps), rtol=1e-12)
    assert len(rates) == steps
    if warmup:
        assert rates[0] == 0
    if warmup > 1:
        assert rates[warmup - 1] == base
    if steps > warmup:
        assert rates[warmup] == base
        assert rates[-1] > minimum or base == minimum


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1e-5, 1e-4, 0, 5), "got minimum 0.0001 and base 1e-05"),
        ((1e-5, -1.0, 0, 5), "got minimum -1.0"),
        ((float("nan"), 0.0, 0, 5), "got minimum 0.0 and base nan"),
        ((1e-5, 0.0, 6, 5), "got 6 of 5 steps"),
        ((1e-5, 0.0, -1, 5), "got -1 of 5 steps"),
    ],
)
def test_rates_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        learning_rates(*arguments)


class Recorder(L.Callback):
    """Weights that leave no path silent and no dropout; keeps learning rates and gradients of every optimizer step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.network.load_state_dict(seeded_state(module.network.state_dict()))
        for part in module.network.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.gradients.append({name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None})


def train(root: Path, batch_size: int, *, precision: str = "32-true", **trainer: Any) -> Recorder:
    module = STGCMAModule("ave", CLIP, 0.25, switches={"drop_path": 0.0}, lr=1e-3, min_lr=1e-5, head_lr=0.1, warmup_epochs=1)
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        limit_val_batches=0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    trainer.fit(module, AVDataModule(str(root), batch_size, workers=0))
    return recorder


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 3}, 3),
        # The last step of an epoch has the one batch that is left.
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 2),
        # Lightning counts no epochs here, but the warm-up does.
        ({"max_epochs": -1, "max_steps": 8}, 3),
    ],
    ids=["each batch", "accumulated", "max_steps"],
)
def test_the_optimizer_steps_at_the_published_rates(trainer, steps, ave_root):
    rates = train(ave_root, 1, limit_train_batches=3, **trainer).rates
    total = trainer.get("max_steps", steps * trainer["max_epochs"])
    expected = np.stack([published(1e-3, 1e-5, steps, total), published(1e-4, 1e-5, steps, total)], 1)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_accumulated_gradients_are_those_of_one_batch(ave_root):
    options = {"max_epochs": 1, "precision": "64-true"}
    (whole,) = train(ave_root, 2, limit_train_batches=1, **options).gradients
    (parts,) = train(ave_root, 1, limit_train_batches=2, accumulate_grad_batches=2, **options).gradients
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert gradient.any(), name
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")

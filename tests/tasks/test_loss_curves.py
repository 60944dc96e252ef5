"""Trainings go where the published ones go: the losses of 50 steps, on the data of each task.

Three computations are compared, in float64 where they must agree, in float32 by the yardstick: the fast model and the
reference model through the trainer, and the reference model through a loop of plain PyTorch that is written from the paper's
settings. Fast and reference draw the same stochastic depth and dropout, so both stay as they are in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stgcma_fast import ClipConfig, ModelConfig, SwinConfig
from stgcma_fast.data import AVPipeline, media_config, open_dataset
from stgcma_fast.reference import ReferenceSTGCMA
from stgcma_fast.reference.model import is_trainable
from stgcma_fast.tasks.datamodule import AVDataModule
from stgcma_fast.tasks.module import STGCMAModule
from tests.support.models import seeded_state
from tests.support.numerics import assert_close

# Windows of 4 x 4 in both stages, shifted ones in the first.
SWIN = SwinConfig(image_size=32, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window=4)
CLIP = ClipConfig(image_size=32, patch_size=16, embed_dim=32, layers=2, heads=2, audio_frames=102, mel_bins=128)
BATCH = 2
MIN_LR = 1e-5
WARMUP_EPOCHS = 1


@dataclass(frozen=True)
class Case:
    task: str
    backbone: SwinConfig | ClipConfig
    adapters: float | list[float]
    switches: dict[str, Any] = field(default_factory=dict)
    head_lr: float = 0.5
    lr: float = 2e-3

    @property
    def config(self) -> ModelConfig:
        ratio = tuple(self.adapters) if isinstance(self.adapters, list) else self.adapters
        return ModelConfig(self.backbone, ratio, task=self.task, **self.switches)


CASES = {
    "ave-swin": Case("ave", SWIN, [0.5, 0.25]),
    "ave-clip": Case("ave", CLIP, 0.25),
    # Millions of weights in the head. AVS's learning rate keeps logits so small that the published loss, of probabilities,
    # loses nothing; that of the trainer, of logits, loses nothing of large ones either.
    "avs": Case("avs", SWIN, [0.5, 0.25], lr=1e-4),
    "avqa": Case("avqa", SWIN, [0.5, 0.25], {"head": "lavish512"}, lr=2e-4),
}


class Recorder(L.Callback):
    """Gives the model weights that leave no path silent, and keeps what a training passes through."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.draws: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.network.load_state_dict(seeded_state(module.network.state_dict()))
        module.network.register_forward_pre_hook(lambda *_: self.draws.append(torch.get_rng_state()))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())

    @property
    def curve(self) -> Tensor:
        return torch.stack(self.losses)


def train(case: Case, root: Path, steps: int, *, impl: str, precision: str) -> Recorder:
    module = STGCMAModule(
        case.task,
        case.backbone,
        case.adapters,
        switches=case.switches,
        head_lr=case.head_lr,
        impl=impl,
        lr=case.lr,
        min_lr=MIN_LR,
        warmup_epochs=WARMUP_EPOCHS,
    )
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, AVDataModule(str(root), BATCH, workers=0))
    assert len(recorder.losses) == steps
    return recorder


def loss_by_hand(task: str, output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Section 4 of the paper's settings, one term after the other."""
    if task == "ave":
        return -(batch["label"].flatten(0, 1) * output.log_softmax(-1)).sum(-1).mean()
    if task == "avs":
        first = output[0][0 :: len(output[0]) // len(batch["mask"])]
        return F.binary_cross_entropy(first.sigmoid(), batch["mask"][:, 0])
    answers, positive, negative = output
    pairs = torch.stack([row for pair in zip(positive, negative, strict=True) for row in pair])
    return F.cross_entropy(answers, batch["label"]) + 0.5 * F.cross_entropy(pairs, torch.tensor([1, 0] * len(positive)))


def train_by_hand(case: Case, root: Path, steps: int, draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The published training of the reference model in float64, with the draws of another training.

    Returns:
        The losses, and what the last would be if nothing had been learned.
    """
    media = media_config(case.task, case.backbone, case.config.num_frames)
    dataset = open_dataset(case.task, root, "train", media, train=True, seed=0)
    counts = {} if case.task == "avs" else {"num_classes": len(dataset.classes)}
    counts |= {"vocabulary": len(dataset.vocabulary)} if case.task == "avqa" else {}
    model = ReferenceSTGCMA(replace(case.config, **counts)).double()
    start = seeded_state(model.state_dict())
    model.load_state_dict(start)
    named = {name: parameter for name, parameter in model.named_parameters() if is_trainable(name)}
    head = {name for name in named if case.task == "ave" and name.startswith("mlp_head")}
    groups = [{"params": [parameter for name, parameter in named.items() if name not in head]}]
    bases = [case.lr]
    if head:
        groups.append({"params": [named[name] for name in head]})
        bases.append(case.lr * case.head_lr)
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.95, 0.999), weight_decay=5e-7)
    epoch = len(dataset) // BATCH
    rest = steps - WARMUP_EPOCHS * epoch
    assert rest > 0
    falling = [MIN_LR + 0.5 * (base - MIN_LR) * (1 + np.cos(np.pi * np.arange(rest) / rest)) for base in bases]
    tables = [np.concatenate([np.linspace(0, base, steps - rest), fall]) for base, fall in zip(bases, falling, strict=True)]
    pipeline = AVPipeline(dataset, BATCH, shuffle=True, drop_last=True, workers=0)
    batches = (batch for _ in range(steps // epoch + 1) for batch in pipeline)

    def loss(batch: dict[str, Any], draw: Tensor) -> Tensor:
        batch = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in batch.items()}
        more = (batch["negative"], batch["question"]) if case.task == "avqa" else ()
        torch.set_rng_state(draw)
        return loss_by_hand(case.task, model(batch["audio"], batch["video"], *more), batch)

    losses = []
    for step, batch in zip(range(steps), batches, strict=False):
        for group, table in zip(optimizer.param_groups, tables, strict=True):
            group["lr"] = table[step]
        value = loss(batch, draws[step])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    model.load_state_dict(start)
    return torch.stack(losses), loss(batch, draws[-1]).detach()


def _compare(name: str, root: Path, steps: int) -> None:
    case = CASES[name]
    law = train(case, root, steps, impl="reference", precision="64-true")
    low = train(case, root, steps, impl="reference", precision="32-true")
    fast = train(case, root, steps, impl="auto", precision="32-true")
    # Every step has draws of its own, and all trainings have the same.
    assert len({state.numpy().tobytes() for state in law.draws}) == steps
    for other in (low, fast):
        assert all(torch.equal(a, b) for a, b in zip(law.draws, other.draws, strict=True))
    by_hand, untrained = train_by_hand(case, root, steps, law.draws)
    torch.testing.assert_close(law.curve, by_hand, rtol=1e-9, atol=1e-9)
    assert_close("training", name, fast.curve, law.curve, low.curve)
    # What was learned is far more than what is tolerated.
    assert (untrained - by_hand[-1]).abs() > 1000 * (low.curve - law.curve).abs().max()


def test_six_steps(ave_root):
    _compare("ave-swin", ave_root, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps(name, request):
    _compare(name, request.getfixturevalue(f"{CASES[name].task}_root"), 50)


@pytest.mark.slow
def test_the_yardstick_tells_a_learning_rate_that_is_off_by_a_thousandth(ave_root):
    case = CASES["ave-clip"]
    law = train(case, ave_root, 6, impl="reference", precision="64-true")
    low = train(case, ave_root, 6, impl="reference", precision="32-true")
    wrong = train(replace(case, lr=1.001 * case.lr), ave_root, 6, impl="auto", precision="32-true")
    with pytest.raises(AssertionError, match="max error"):
        assert_close("training", "ave-clip", wrong.curve, law.curve, low.curve)

"""Trainings on a CUDA device: as CUDA graphs, without waiting for the device, in half precision. Run by `make test-gpu`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

import stgcma_fast as sf
from stgcma_fast.tasks.trained import LAST, load_trained
from stgcma_fast.tasks.training import _CLI
from tests.support.models import inputs, seed, tiny_config

pytestmark = pytest.mark.gpu

# Steps of an epoch of `ave_root` and `avs_root` in batches of two, and of `avqa_root`.
STEPS = {"ave": 4, "avs": 3, "avqa": 5}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    # What is compiled draws the same numbers, in the same order, as what is not. A model that is no whole CUDA graph is not cut
    # into several without a word.
    with torch._inductor.config.patch(fallback_random=True, reorder_for_peak_memory=False, graph_partition=False):
        yield
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


class StopFitError(Exception):
    """A test has seen enough."""


class Watch(L.Callback):
    """Keeps losses, norms of gradients and losses of evaluations.

    Args:
        quiet: from the second epoch on no step may wait for the device.
        stop: end the training behind this optimizer step.
    """

    def __init__(self, quiet: bool = True, stop: int | None = None) -> None:
        self.quiet, self.stop = quiet, stop
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.evaluations: list[Tensor] = []
        # At the start of the second epoch's steps and behind the last of them.
        self.compiled: list[tuple[int, int]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.compiled.append(compiled())

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.quiet and trainer.current_epoch > 0:
            torch.cuda.set_sync_debug_mode("error")

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(torch.stack([gradient.norm() for gradient in gradients]))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.losses.append(outputs["loss"].clone())
        if trainer.current_epoch == 1 and trainer.is_last_batch:
            self.compiled.append(compiled())
        if trainer.global_step == self.stop:
            raise StopFitError

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.evaluations.append(trainer.callback_metrics["val/loss"].clone())


def compiled() -> tuple[int, int]:
    """How many graphs were traced, and how many recorded as CUDA graphs, so far."""
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return counters["stats"]["unique_graphs"], sum(1 for root in manager.get_roots() for _ in nodes(root)) if manager else 0


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for children in node.children.values():
        for child in children:
            yield from nodes(child)


@pytest.fixture
def train(fit_args: Callable[..., list[str]]) -> Callable[..., tuple[Watch, _CLI]]:
    """``train(task, folder, watch, **changes)``: a training as the command builds it, or the rest of it."""

    def run(task: str, folder: Path, watch: Watch, **changes: object) -> tuple[Watch, _CLI]:
        cli = _CLI("fit", fit_args(task, folder, **{"trainer__accelerator": "gpu"} | changes))
        cli.trainer.callbacks.append(watch)
        last = folder / "checkpoints" / LAST
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=last if last.is_file() else None, weights_only=True)
        except StopFitError:
            assert watch.stop is not None
        return watch, cli

    return run


def assert_near(got: list[Tensor], wanted: list[Tensor], rtol: float) -> None:
    assert len(got) == len(wanted) > 0
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.isfinite().all(), f"{step}: {a}"
        assert (a - b).norm() <= rtol * b.norm(), f"{step}: {a} and {b}"


@pytest.mark.parametrize(
    ("task", "precision"), [("ave", "bf16-mixed"), ("ave", "16-mixed"), ("avs", "bf16-mixed"), ("avqa", "bf16-mixed")]
)
def test_steps_are_cuda_graphs(train, tmp_path, task, precision):
    """Losses, gradients and evaluations, whose last batch is smaller, are near those of a training that is not compiled. No
    step of the second epoch waits for the device, traces or records anything."""
    plain, _ = train(task, tmp_path / "plain", Watch(), trainer__precision=precision, model__compile="off")
    counters.clear()
    watch, cli = train(task, tmp_path / "compiled", Watch(), trainer__precision=precision)
    assert counters["inductor"]["cudagraph_skips"] == 0
    (traced, recorded), after = watch.compiled
    assert traced > 0
    assert recorded > 0
    assert after == (traced, recorded)
    assert len(watch.losses) == 2 * STEPS[task]
    assert_near(watch.losses, plain.losses, 0.02)
    assert_near(watch.evaluations, plain.evaluations, 0.02)
    if precision == "bf16-mixed":  # another scale of the loss is another of its gradients
        assert_near(watch.norms[:1], plain.norms[:1], 0.05)
    # Also what has its weights in one piece of memory on the device, as AVQA's LSTM has.
    loaded = load_trained(tmp_path / "compiled" / "checkpoints" / LAST)[0].state_dict()
    for key, value in cli.model.network.state_dict().items():
        assert torch.equal(loaded[key], value.cpu().to(loaded[key].dtype)), key


def test_gradients_are_summed_over_graphs(train, tmp_path):
    """They lie in the memory of graphs, which the next run of these takes. Adam does not mind their scale: norms tell."""
    settings = {"trainer__accumulate_grad_batches": 2, "trainer__precision": "bf16-mixed"}
    plain, _ = train("ave", tmp_path / "plain", Watch(), **settings, model__compile="off")
    watch, _ = train("ave", tmp_path / "compiled", Watch(), **settings)
    assert len(watch.norms) == STEPS["ave"]
    assert_near(watch.losses, plain.losses, 0.02)
    assert_near(watch.norms, plain.norms, 0.05)


def test_scaled_gradients_are_clipped(train, tmp_path):
    """Fused optimizers unscale in their step, behind the clipping, and Lightning refuses them."""
    clip = {
        "trainer__log_every_n_steps": 0,
        "trainer__gradient_clip_val": 0.01,
        "trainer__precision": "16-mixed",
        "model__compile": "off",
    }
    # To its end: the first steps may overflow, until the loss's scale has come down.
    _, cli = train("ave", tmp_path, Watch(quiet=False), **clip)
    total = torch.cat([p.grad.flatten() for p in cli.model.parameters() if p.grad is not None]).norm()
    assert total <= 0.01 * (1 + 1e-3)


def test_a_resumed_training_ends_alike(train, tmp_path):
    """Adam's state goes back to the device, the loss's scale is the same, and so are the draws of a step."""
    # A checkpoint of every step waits for the device.
    settings = {"trainer__precision": "16-mixed", "model__compile": "off", "save_every": 1}
    whole, _ = train("ave", tmp_path / "whole", Watch(quiet=False), **settings)
    stop = STEPS["ave"] + 1
    begun, _ = train("ave", tmp_path / "parts", Watch(quiet=False, stop=stop), **settings)
    rest, cli = train("ave", tmp_path / "parts", Watch(quiet=False), **settings)
    assert_near([*begun.losses[:stop], *rest.losses], whole.losses, 0.01)
    (optimizer,) = cli.trainer.optimizers
    assert all(x.is_cuda for state in optimizer.state.values() for x in state.values())


def test_a_replayed_graph_draws_by_the_seed():
    """The draws of a step come from a seed that is set before it, in a graph too."""
    config = tiny_config("swin", drop_path=0.5)
    model = seed(sf.FastSTGCMA(config)).cuda().train()
    model.compile(mode="reduce-overhead")
    audio, video, target = (x.cuda() for x in inputs(config))
    logits = []
    for step in range(9):
        torch.manual_seed(step % 3)
        out = model(audio, video)
        logits.append(out.detach().clone())
        F.cross_entropy(out, target).backward()
        model.zero_grad()
    # The first steps are not replayed yet.
    for number in range(3):
        torch.testing.assert_close(logits[6 + number], logits[3 + number], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[6], logits[7], rtol=1e-2)

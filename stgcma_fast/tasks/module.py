"""One Lightning module for the three tasks: the model, its loss, its optimizer as published, and what its checkpoints hold."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ..checkpoint import named
from ..config import ClipConfig, ModelConfig, SwinConfig, Task, preset
from ..data import MediaConfig, media_config
from ..heads.avqa import avqa_loss
from ..heads.avs import avs_loss
from ..model import FastSTGCMA
from ..ops.dispatch import Impl
from ..pretrained import load_grounding, load_pretrained
from ..reference.model import ReferenceSTGCMA, is_trainable
from .metrics import build_metrics
from .schedule import learning_rates
from .trained import DESCRIPTION, PREFIX, Description, Weights, backbone_digest, check_backbone, check_state, saved_state

Compile = Literal["auto", "off", "default", "reduce-overhead"]
# Settings of a run, in its checkpoints.
SETTINGS = "stgcma_settings"
# What frozen weights are held in, by Lightning's precision.
_FROZEN = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class STGCMAModule(L.LightningModule):
    """STG-CMA in training: adapters, gates, temporal tables and the head are trained, the backbone is frozen.

    Args:
        task: "ave" (event localization), "avs" (segmentation) or "avqa" (question answering).
        arch: "clip_b16", "clip_l14", "swin_b" or "swin_l", or sizes of one's own (SwinConfig or ClipConfig).
        adapters: with the name of an arch "tiny" or "base"; or bottleneck width over channels, one number or one per stage.
        switches: other fields of ModelConfig, such as {"fusion": "a2v"}, the rows of the paper's Tables 5 and 7. Numbers of
            classes and of words are those of the data.
        pretrained: file of the frozen backbone's weights, or hf://owner/name/file; "random" draws them, for a try.
        grounding: file of AVQA's pretrained match layers.
        lr: highest learning rate.
        min_lr: learning rate that the cosine falls towards, of every group.
        head_lr: learning rate of AVE's head over lr.
        warmup_epochs: epochs in which the learning rate rises.
        weight_decay: of Adam, added to the gradient.
        all_frames: of AVS: learn from the masks of all frames (MS3), not of the first alone.
        iou_weight: of AVS: weight of a loss of intersection over union beside the cross-entropy.
        match_weight: of AVQA: weight of the matches' loss beside the answers'; 0 also saves reading their frames.
        compile: torch.compile of the model; "auto" is "reduce-overhead", whose steps are CUDA graphs, on CUDA, else "off".
        checkpointing: run each block again in the backward instead of keeping what it computed.
        impl: which implementation serves the operators.
        save: what checkpoints hold; "full" where the backbone is random, for it could not be found again. None: "adapters"
            where the backbone comes from a file.
        seed: of what is drawn in a step, by its place in the training.

    Raises:
        ValueError: a combination no model has, a preset without weights for its backbone, rates out of range.
    """

    def __init__(
        self,
        task: Task = "ave",
        arch: str | SwinConfig | ClipConfig = "swin_l",
        adapters: float | list[float] | str = "base",
        switches: dict[str, Any] | None = None,
        pretrained: str | None = None,
        grounding: str | None = None,
        lr: float = 5e-5,
        min_lr: float = 2e-6,
        head_lr: float = 0.1,
        warmup_epochs: int = 2,
        weight_decay: float = 5e-7,
        all_frames: bool = False,
        iou_weight: float = 0.0,
        match_weight: float = 0.5,
        compile: Compile = "auto",
        checkpointing: bool = False,
        impl: Impl = "auto",
        save: Weights | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(arch, str) and pretrained is None:
            raise ValueError(
                f"pretrained: got None with arch {arch!r}, expected the file of its frozen backbone's weights, without which "
                "there is nothing to adapt, or 'random' for a try"
            )
        self.pretrained = None if pretrained == "random" else pretrained
        if save == "adapters" and self.pretrained is None:
            raise ValueError("save: got 'adapters' with a random backbone, which could not be found again; expected 'full'")
        switches = {"task": task, **(switches or {})}
        if isinstance(adapters, str):
            if not isinstance(arch, str):
                raise ValueError(f"adapters: got {adapters!r} with sizes of your own, expected numbers: width over channels")
            self.config = preset(arch, adapters, **switches)
        else:
            ratio = tuple(adapters) if isinstance(adapters, list) else adapters
            backbone = arch if not isinstance(arch, str) else preset(arch).backbone
            self.config = ModelConfig(backbone, ratio, **switches)
        for name, rate in {"lr": lr, "lr * head_lr": lr * head_lr if task == "ave" else lr}.items():
            if not 0 <= min_lr <= rate:
                raise ValueError(f"{name}: got {rate:g} with min_lr {min_lr:g}, expected 0 <= min_lr <= {name}")
        self.grounding, self.lr, self.min_lr, self.head_lr, self.warmup_epochs = grounding, lr, min_lr, head_lr, warmup_epochs
        self.weight_decay, self.seed, self.compile_mode = weight_decay, seed, compile
        self.model_options = {"checkpointing": checkpointing, "impl": impl}
        self.loss_options: dict[str, Any] = {
            "ave": {},
            "avs": {"all_frames": all_frames, "iou_weight": iou_weight},
            "avqa": {"match_weight": match_weight},
        }[task]
        self.weights: Weights = save or ("adapters" if self.pretrained else "full")
        # Adapters are loaded beside a backbone that is there already; `on_load_checkpoint` has the eye on what is missing.
        self.strict_loading = False
        self.classes: tuple[str, ...] = ()
        self.words: tuple[str, ...] = ()
        self.network: FastSTGCMA | None = None
        self._backbone: str | None = None
        self._bad_step: Tensor | None = None

    @property
    def media(self) -> MediaConfig:
        """What the task makes of media, at this backbone's sizes."""
        return media_config(self.config.task, self.config.backbone, self.config.num_frames)

    def configure_model(self) -> None:
        """Build the network, once the data have told how many classes and words there are."""
        if self.network is not None:
            return
        self.classes, self.words = self.trainer.datamodule.names
        if self.config.task != "avs":
            self.config = replace(self.config, num_classes=len(self.classes))
        if self.words:
            self.config = replace(self.config, vocabulary=len(self.words))
        self.network = FastSTGCMA(self.config, **self.model_options)
        if self.pretrained is not None:
            rank_zero_info(load_pretrained(self.network, self.pretrained))
            self._backbone = backbone_digest(self.network)
        else:
            draw_weights(self.network)
        if self.grounding is not None and self.trainer.state.fn == "fit":
            rank_zero_info(load_grounding(self.network, self.grounding))
        if dtype := _FROZEN.get(self.trainer.precision):
            self.network.cast_frozen(dtype)
        # Adam would go on decaying what the loss does not reach, and processes would wait for its gradients.
        unreached = unreached_parameters(self.config, matches=self.loss_options.get("match_weight") != 0)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(is_trainable(name) and name not in unreached)
        if self.trainer.state.fn == "fit":
            trained = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
            whole = sum(parameter.numel() for parameter in self.network.parameters())
            rank_zero_info(f"{trained / 1e6:.2f} of {whole / 1e6:.2f} million parameters are trained")
        self.metrics = build_metrics(self.config.task)
        # Lightning's own mean over processes counts their clips wrongly where not all have as many.
        self.mean_loss = MeanMetric(nan_strategy="disable")
        mode = self.compile_mode
        if mode == "auto":
            mode = "reduce-overhead" if self.trainer.strategy.root_device.type == "cuda" else "off"
        if mode != "off":
            self.network.compile(mode=mode)

    def configure_optimizers(self) -> dict[str, Any]:
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "trainer: got neither max_epochs nor max_steps, expected one, for the learning rate falls to its end"
            )
        # Where max_steps alone is given, Lightning has not asked the data how long an epoch is.
        self.trainer.fit_loop.setup_data()
        epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup = min(self.warmup_epochs * epoch, int(steps))
        groups = self.network.parameter_groups(self.lr, self.head_lr)
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        # Where gradients are scaled the fused optimizer undoes that itself, too late for clipping them.
        scaled_and_clipped = self.trainer.precision == "16-mixed" and self.trainer.gradient_clip_val
        fused = self.trainer.strategy.root_device.type == "cuda" and not scaled_and_clipped
        optimizer = torch.optim.Adam(groups, betas=(0.95, 0.999), weight_decay=self.weight_decay, fused=fused)
        factors = []
        for group in groups:
            rates = learning_rates(group["lr"], self.min_lr, warmup, int(steps))
            # The scheduler asks for the rate of a step that does not come, too.
            factors.append(lambda step, rates=rates, lr=group["lr"]: rates[min(step, len(rates) - 1)] / lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        accumulated = self.trainer.accumulate_grad_batches > 1
        optimizer.zero_grad(set_to_none=not accumulated)
        if accumulated:
            # A CUDA graph's gradients are gone with its next run: what is summed over several needs memory of its own.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def forward(self, audio: Tensor, video: Tensor, *more: Tensor | None, **options: bool) -> Any:
        """The model's outputs; see `FastSTGCMA`."""
        return self.network(audio, video, *more, **options)

    def _run(self, batch: dict[str, Any], negative: Tensor | None, **options: bool) -> Any:
        more = (negative, batch["question"]) if self.config.task == "avqa" else ()
        return self(batch["audio"], batch["video"], *more, **options)

    def loss(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """The published loss of the task, of what the model gave for a batch."""
        if self.config.task == "ave":
            return F.cross_entropy(output, batch["label"].flatten(0, 1))
        if self.config.task == "avs":
            return avs_loss(output[0], batch["mask"], **self.loss_options)
        return avqa_loss(*output, batch["label"], **self.loss_options)

    def on_fit_start(self) -> None:
        self._bad_step = torch.full((), -1, dtype=torch.long, device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A step's draws come from its place alone, so that a run that is resumed has those of one that is not.
        place = f"{self.seed} {self.trainer.current_epoch} {batch_idx} {self.trainer.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little", signed=True))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        options = {}
        if self.config.task == "avs" and not self.loss_options["all_frames"]:
            # Nobody looks at the other frames' logits, which cost as much.
            options, batch = {"first_frame": True}, {**batch, "mask": batch["mask"][:, :1]}
        loss = self.loss(self._run(batch, batch.get("negative"), **options), batch)
        size = len(batch["audio"])
        self.log("train/loss", loss.detach(), batch_size=size)
        # Asked on the device, and looked at now and then: a look waits for the device.
        bad = (self._bad_step < 0) & ~loss.detach().isfinite()
        self._bad_step = torch.where(bad, self.trainer.global_step, self._bad_step)
        if self.device.type == "cpu" or self.trainer.global_step % (self.trainer.log_every_n_steps or 50) == 0:
            self._check_finite()
        return loss

    def _check_finite(self) -> None:
        if self._bad_step is None or (step := int(self._bad_step)) < 0:
            return
        raise self._not_finite(f"the loss of step {step} (epoch {self.trainer.current_epoch}) is not finite")

    def _not_finite(self, what: str) -> ValueError:
        return ValueError(
            f"{what}. Training stops here; the checkpoints in {self.trainer.default_root_dir} are from before. Lower lr, now "
            f"{self.lr}, or train in bf16-mixed or 32-true, now {self.trainer.precision}"
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Any]) -> None:
        output = self._run(batch, None)
        # No negatives are looked at: answers do not depend on them.
        loss = avqa_loss(*output, batch["label"], match_weight=0) if self.config.task == "avqa" else self.loss(output, batch)
        # Once for each clip: without a look for NaN, which would wait for the device, torchmetrics forgets weights.
        self.mean_loss.update(loss.expand(len(batch["audio"])))
        self.metrics.update(output, batch)

    def on_validation_epoch_end(self) -> None:
        self._end("val")

    def on_test_epoch_end(self) -> None:
        self._end("test")

    def _end(self, stage: str) -> None:
        values = {"loss": self.mean_loss.compute(), **self.metrics.compute()}
        self.mean_loss.reset()
        self.metrics.reset()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})

    def _settings(self) -> dict[str, Any]:
        """What a run can not change in its middle."""
        trainer, data = self.trainer, self.trainer.datamodule
        return {
            **{name: getattr(self, name) for name in ("lr", "min_lr", "head_lr", "warmup_epochs", "weight_decay", "seed")},
            **self.loss_options,
            **{f"trainer.{name}": getattr(trainer, name) for name in ("max_epochs", "max_steps", "accumulate_grad_batches")},
            "save": self.weights,
            **{
                f"trainer.{name}": getattr(trainer, name)
                for name in ("limit_train_batches", "gradient_clip_val", "gradient_clip_algorithm")
            },
            "trainer.precision": trainer.precision,
            "trainer.devices": trainer.world_size,
            **{f"data.{name}": getattr(data, name) for name in ("batch_size", "selection", "train_clips")},
            **{f"data.{name}": value for name, value in data.options[self.config.task].items()},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()
        saved = {PREFIX + key for key in saved_state(self.network, self.weights)}
        state = {key: value for key, value in checkpoint["state_dict"].items() if key in saved}
        # A loss that is finite may have a gradient that is not.
        if broken := [key.removeprefix(PREFIX) for key, value in state.items() if not value.isfinite().all()]:
            raise self._not_finite(f"step {self.trainer.global_step - 1} left {named('weights that are not finite', broken)}")
        checkpoint["state_dict"] = state
        description = Description(
            self.config.to_dict(), self.weights, self.pretrained, self.classes, self.words, self._backbone
        )
        checkpoint[DESCRIPTION], checkpoint[SETTINGS] = description.to_dict(), self._settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = self.trainer.ckpt_path
        state = {key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items()}
        if DESCRIPTION not in checkpoint:  # a published one
            check_state(self.network, state, Description(self.config.to_dict(), "full", None), path)
            return
        description = Description.from_dict(checkpoint[DESCRIPTION])
        check_state(self.network, state, description, path)
        check_backbone(self._backbone, self.pretrained, description, path)
        if (description.classes, description.words) != (self.classes, self.words):
            raise ValueError(f"{path} is of other data: its classes or words are not those of {self.trainer.datamodule.root}")
        if self.trainer.state.fn == "fit":
            there, here = checkpoint[SETTINGS], self._settings()
            differing = [f"{key} {there.get(key)!r} (here {here[key]!r})" for key in here if there.get(key) != here[key]]
            if differing:
                raise ValueError(
                    f"{path} was begun with other settings: {'; '.join(differing)}. Give them again to go on, or another "
                    "folder (--trainer.default_root_dir) to begin anew"
                )


def draw_weights(network: FastSTGCMA) -> None:
    """Weights for a backbone that comes from no file, and for AVQA's head on it: of a linear layer with variance 1 / (inputs),
    of Swin's tables of relative positions so large that its heads look at different places.

    The published start is a standard deviation of 0.02 everywhere. At the head's published width, 1536, it is nearly the same;
    through a small network it lets nothing, and nothing mends what is frozen.
    """
    for name, layer in network.named_modules():
        drawn = not is_trainable(f"{name}.weight") or name.startswith("avqatask_")
        if isinstance(layer, nn.Linear) and drawn:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    for name, table in network.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(table, std=2.0)


def unreached_parameters(config: ModelConfig, matches: bool = True) -> set[str]:
    """Names of the parameters that the paper trains, but no gradient reaches: gates of a direction that is off, the tables of
    an absent stream, the first residual unit of AVS's coarsest path; and AVQA's match layers, if the loss has no matches.

    It asks the reference model's graph, on tensors without memory.
    """
    with torch.device("meta"):
        model = ReferenceSTGCMA(config)
        frames, size = config.num_frames, config.backbone.image_size
        audio = torch.empty(1, frames, *config.backbone.audio_shape)
        video = torch.empty((1, 3, frames, size, size) if config.task == "ave" else (1, frames, 3, size, size))
        more = (video, torch.zeros(1, 14, dtype=torch.long)) if config.task == "avqa" else ()
        output = model(audio, video, *more)
        # AVS's loss reads the first of its outputs.
        outputs = {"ave": (output,), "avs": output[:1], "avqa": output if matches else output[:1]}[config.task]
        sum(item.sum() for item in outputs).backward()
    return {name for name, parameter in model.named_parameters() if is_trainable(name) and parameter.grad is None}

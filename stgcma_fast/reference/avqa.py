"""The head that answers questions (AVQA), as published: question encoder, grounding of sound in frames, matching, attention.

Shapes: B clips, T frames, N tokens of a frame, C channels of the backbone, d of the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import ModelConfig

DROPOUT = 0.1
# Layers that `load_grounding` fills from a file of the match task's pretraining.
GROUNDING = ("fc_a1", "fc_a2", "fc_gl", "fc1", "fc2", "fc3", "fc4")


class QuestionEncoder(nn.Module):
    """One vector for a question: the last state of an LSTM. Padding is read like words, as published."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.word2vec = nn.Embedding(vocabulary, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.fc = nn.Linear(2 * dim, dim)

    def forward(self, question: Tensor) -> Tensor:
        """Words ``[B, L]`` to ``[B, d]``."""
        _, (hidden, cell) = self.lstm(self.word2vec(question).tanh())
        return self.fc(torch.cat([hidden[0], cell[0]], -1).tanh())


def build_avqa(model: nn.Module, config: ModelConfig) -> None:
    """Register the published parameters of the head on ``model``."""
    channels = config.backbone.width(config.backbone.stages - 1)
    dim = channels if config.head == "dgsct1536" else 512
    layers = {
        "fc_a2": (dim, dim),
        "fc_gl": (2 * dim, dim),
        "fc1": (2 * dim, 512),
        "fc2": (512, 256),
        "fc3": (256, 128),
        "fc4": (128, 2),
        "linear11": (dim, dim),
        "linear12": (dim, dim),
        "linear21": (dim, dim),
        "linear22": (dim, dim),
        "fc_fusion": (2 * dim, dim),
        "fc_ans": (dim, config.num_classes),
    }
    if config.head != "dgsct1536":
        layers["yb_fc_v"] = layers["yb_fc_a"] = (channels, dim)
    if config.head == "shipped512_128":
        layers |= {"yb_fc_a": (channels, 128), "fc_a1": (128, dim)}
    for name, sizes in layers.items():
        setattr(model, f"avqatask_{name}", nn.Linear(*sizes))
    for name in ("attn_a", "attn_v"):
        setattr(model, f"avqatask_{name}", nn.MultiheadAttention(dim, 4, dropout=DROPOUT, batch_first=True))
    for name in ("norm1", "norm2"):
        setattr(model, f"avqatask_{name}", nn.LayerNorm(dim))
    model.avqatask_question_encoder = QuestionEncoder(config.vocabulary, dim)


def hear(model: nn.Module, audio: Tensor) -> Tensor:
    """Tokens ``[B, T, N, C]`` to the audio feature A, ``[B, T, d]``."""
    x = audio.mean(2)
    if model.config.head != "dgsct1536":
        x = model.avqatask_yb_fc_a(x)
    if model.config.head == "shipped512_128":
        x = model.avqatask_fc_a1(x)
    return model.avqatask_fc_a2(x.relu())


def ground(model: nn.Module, visual: Tensor, heard: Tensor) -> Tensor:
    """What of a frame goes with its sound: tokens ``[B, T, N, C]`` and ``[B, T, d]`` to ``[B, T, d]``."""
    if model.config.head != "dgsct1536":
        visual = model.avqatask_yb_fc_v(visual)
    directions = F.normalize(visual, dim=-1)
    weights = (directions @ F.normalize(heard, dim=-1)[..., None]).softmax(2)
    found = (weights.mT @ directions).squeeze(2)
    return model.avqatask_fc_gl(torch.cat([visual.mean(2), found], -1).tanh())


def match(model: nn.Module, heard: Tensor, grounded: Tensor) -> Tensor:
    """Logits ``[B * T, 2]``: sound and frame belong together, class 1, or not."""
    x = torch.cat([heard, grounded], -1).flatten(0, 1)
    for name in ("fc1", "fc2", "fc3"):
        x = getattr(model, f"avqatask_{name}")(x).relu()
    return model.avqatask_fc4(x)


def attend(model: nn.Module, query: Tensor, frames: Tensor, modality: str) -> Tensor:
    """What of the frames ``[B, T, d]`` the question ``[B, d]`` asks for: ``[B, d]``."""
    attention, first, second, norm = (
        getattr(model, f"avqatask_{name}")
        for name in {
            "visual": ("attn_v", "linear11", "linear12", "norm1"),
            "audio": ("attn_a", "linear21", "linear22", "norm2"),
        }[modality]
    )
    x = attention(query[:, None], frames, frames, need_weights=False)[0].squeeze(1)
    hidden = F.dropout(first(x).relu(), DROPOUT, model.training)
    return norm(x + F.dropout(second(hidden), DROPOUT, model.training))


def avqa_head(
    model: nn.Module, visual: Tensor, audio: Tensor, negative: Tensor | None, question: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The outputs of the model.

    Args:
        model: has the parameters of `build_avqa`.
        visual, audio, negative: normalized tokens ``[B, T, N, C]``; ``negative`` may be None.
        question: words ``[B, L]``.

    Returns:
        Logits of the answers ``[B, answers]``; of the match of sound and frames, ``[B * T, 2]``; and of sound and negative
        frames, or None.
    """
    heard = hear(model, audio)
    grounded = ground(model, visual, heard)
    match_negative = None if negative is None else match(model, heard, ground(model, negative, heard))
    query = model.avqatask_question_encoder(question)
    seen = attend(model, query, grounded, "visual") + grounded.mean(1)
    listened = attend(model, query, heard, "audio") + heard.mean(1)
    fused = model.avqatask_fc_fusion(torch.cat([listened, seen], -1).tanh())
    return model.avqatask_fc_ans((fused * query).tanh()), match(model, heard, grounded), match_negative

"""What one item of a data set is made of: files and draws, before anything is read. Every backend makes tensors of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .augment import Augmentation


@dataclass(frozen=True)
class Frames:
    """Frames of a video, chosen uniformly: the n it has are counted 1 to n, and ``linspace(1, n, of)`` is truncated.

    Args:
        source: a container, or the files of the frames in their order.
        slots: which of the ``of`` places are taken.
        of: places.
    """

    source: Path | tuple[Path, ...]
    slots: tuple[int, ...]
    of: int

    @property
    def name(self) -> Path:
        """What messages call it: the container, or the folder of the frames."""
        return self.source if isinstance(self.source, Path) else self.source[0].parent


@dataclass(frozen=True)
class Mix:
    """A second clip's waveform w2 that is mixed in: ``lam * w1 + (1 - lam) * w2``, a lam for each chunk.

    Args:
        audio: the file of w2, an audio file or a container.
        lams: weights of the first clip.
    """

    audio: Path
    lams: tuple[float, ...]


@dataclass(frozen=True)
class Sample:
    """Everything that is to be read and done for one item.

    Args:
        id: names the clip.
        video: its frames.
        audio: an audio file, or the container whose track it is.
        target: tensors that need no reading: "label" [T, classes] for AVE; "question" [14] and "label" [] for AVQA.
        meta: words that go with it, "type" of the question for AVQA.
        masks: files of the masks, for AVS.
        negatives: frames of other clips, one for each of the own, for AVQA.
        augmentation: draws of the visual augmentation; None: none.
        mix: draws of the audio's; None: none.
    """

    id: str
    video: Frames
    audio: Path
    target: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)
    masks: tuple[Path, ...] = ()
    negatives: tuple[Frames, ...] = ()
    augmentation: Augmentation | None = None
    mix: Mix | None = None

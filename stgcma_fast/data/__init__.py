"""From media files to tensors: data sets in their published layouts, and batches that DALI or PyAV decodes."""

from typing import TYPE_CHECKING

from .config import MediaConfig, media_config
from .errors import MediaError

if TYPE_CHECKING:
    from .audio import read_audio
    from .ave import AVEDataset
    from .avqa import AVQADataset
    from .avs import AVSDataset
    from .dataset import open_dataset
    from .fbank import filterbanks, kaldi_fbank
    from .pipeline import AVPipeline
    from .read import read_sample
    from .sample import Frames, Mix, Sample
    from .shards import ShardDataset, stream_shards
    from .synth import synthesize
    from .video import read_frames

# Where names are that need the extra `data`: they are imported when they are first used.
_HOMES = {
    "AVEDataset": "ave",
    "AVPipeline": "pipeline",
    "AVQADataset": "avqa",
    "AVSDataset": "avs",
    "Frames": "sample",
    "Mix": "sample",
    "Sample": "sample",
    "ShardDataset": "shards",
    "filterbanks": "fbank",
    "kaldi_fbank": "fbank",
    "open_dataset": "dataset",
    "read_audio": "audio",
    "read_frames": "video",
    "read_sample": "read",
    "stream_shards": "shards",
    "synthesize": "synth",
}
__all__ = [
    "AVEDataset",
    "AVPipeline",
    "AVQADataset",
    "AVSDataset",
    "Frames",
    "MediaConfig",
    "MediaError",
    "Mix",
    "Sample",
    "ShardDataset",
    "filterbanks",
    "kaldi_fbank",
    "media_config",
    "open_dataset",
    "read_audio",
    "read_frames",
    "read_sample",
    "stream_shards",
    "synthesize",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)

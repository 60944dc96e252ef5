"""Weights of the frozen backbones, from the files that CLIP and Swin are published in, and of AVQA's grounding."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from .checkpoint import checked_state, named, read_state_dict
from .config import ClipConfig, SwinConfig
from .reference.avqa import GROUNDING
from .reference.model import is_trainable

_HUB = "hf://"
_HEAD_DIM = 64  # of every CLIP vision transformer


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` or `load_grounding` did.

    Attributes:
        source: the file or hub id, and its format.
        loaded: keys of the model that were filled, those derived for audio included. All others are unchanged.
        missing: backbone keys of the model that the file lacks. All of them are buffers, which the model computes itself.
        ignored: keys of the file that the model has no use for: classifiers, projections, text towers.
        notes: what deserves attention.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded, all others of the model are unchanged"]
        if self.missing:
            lines.append(named(f"{len(self.missing)} missing, computed by the model", self.missing))
        if self.ignored:
            lines.append(named(f"{len(self.ignored)} ignored", self.ignored))
        return "\n".join([*lines, *self.notes])


_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


class _Node:
    """Stands for a module of a TorchScript archive: its attributes, none of its code."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


class _TensorReader(pickle.Unpickler):
    """The attributes of a TorchScript archive as tensors and plain values.

    `torch.jit.load` would compile the archive's code and run the ``__setstate__`` of its classes. Here a class of the archive
    becomes an empty `_Node`, and any other name but those of tensors is refused.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
        self._record = lambda key: archive.read(f"{root}data/{key}")

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Node
        if module == "torch.jit._pickle":  # typed lists: (values, type)
            return lambda values, *_: values
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {"torch._utils._rebuild_tensor_v2": _strided, "collections.OrderedDict": OrderedDict}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> Tensor:
        _, dtype, key, _, _ = pid
        return torch.frombuffer(bytearray(self._record(key)), dtype=dtype)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Node) and isinstance(value.state, dict):
        for child, inner in value.state.items():
            yield from _flatten(inner, f"{name}.{child}" if name else child)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("/constants.pkl"):  # written by TorchScript and not by torch.save
                        return dict(_flatten(_TensorReader(archive, name.removesuffix("constants.pkl")).load()))
    except Exception as error:
        raise ValueError(f"{path} is damaged or is no archive of weights: {error}") from error
    return read_state_dict(path, nested=("model", "state_dict"))


def _locate(source: str | Path) -> Path:
    """A path as it is; ``hf://owner/name/file`` as the downloaded file."""
    if not str(source).startswith(_HUB):
        return Path(source)
    parts = re.fullmatch(f"{_HUB}([^/]+/[^/]+)/(.+)", str(source))
    if parts is None:
        raise ValueError(f"got {source!r}, expected a hub id of the form {_HUB}owner/name/file")
    return Path(hf_hub_download(parts[1], parts[2]))


# The `_*_names` functions take a file's keys and give {key of the file: key of the model}; what they leave out is ignored.


def _swin_names(keys: Iterable[str]) -> dict[str, str]:
    # timm counts a patch merging to the stage after it, Microsoft and the published model to the stage before.
    keys = list(keys)
    late = not any(key.startswith("layers.0.downsample.") for key in keys)

    def own(key: str) -> str:
        return re.sub(r"^layers\.(\d+)(?=\.downsample\.)", lambda stage: f"layers.{int(stage[1]) - late}", key)

    return {key: own(key) for key in keys if not key.startswith("head.")}


def _openai_names(keys: Iterable[str]) -> dict[str, str]:
    return {key: key.removeprefix("visual.") for key in keys if key.startswith("visual.") and key != "visual.proj"}


_TRANSFORMERS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm": ".ln_",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".self_attn.q_proj.": ".attn.in_proj_",
    ".self_attn.k_proj.": ".attn.in_proj_",
    ".self_attn.v_proj.": ".attn.in_proj_",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def _transformers_names(keys: Iterable[str]) -> dict[str, str]:
    # in_proj stacks query, key and value, so they are visited in this order.
    keys = sorted(keys, key=lambda key: (".k_proj." in key) + 2 * (".v_proj." in key))
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in keys) else ""
    names = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix) and not key.endswith(".position_ids")}
    for theirs, own in _TRANSFORMERS.items():
        names = {key: name.replace(theirs, own) for key, name in names.items()}
    return names


class _Format(NamedTuple):
    title: str
    backbone: type
    marks: tuple[str, ...]  # a file of this format has one of these keys
    names: Callable[[Iterable[str]], dict[str, str]]


_FORMATS = (
    _Format("Swin", SwinConfig, ("layers.0.blocks.0.attn.relative_position_bias_table",), _swin_names),
    _Format("OpenAI CLIP", ClipConfig, ("visual.class_embedding",), _openai_names),
    _Format(
        "transformers CLIP",
        ClipConfig,
        ("vision_model.embeddings.class_embedding", "embeddings.class_embedding"),
        _transformers_names,
    ),
)


def _audio_positions(table: Tensor, side: int, config: ClipConfig) -> Tensor:
    """Audio's position table ``[N_a, D]`` from CLIP's ``[side * side + 1, D]``: the middle of its grid, or all of it stretched.

    Rows are laid out frequency-major, as published, although audio tokens come out time-major: token k takes row k + 1.
    """
    time, mel = config.audio_grid
    grid = table[1:].T.reshape(1, -1, side, side)
    start = side // 2 - time // 2
    grid = grid[..., start : start + time] if time <= side else F.interpolate(grid, (side, time), mode="bilinear")
    start = side // 2 - mel // 2
    grid = grid[:, :, start : start + mel] if mel <= side else F.interpolate(grid, (mel, time), mode="bilinear")
    return torch.cat([table[:1], grid[0].flatten(1).T])


def _audio_state(state: dict[str, Tensor], backbone: SwinConfig | ClipConfig) -> dict[str, Tensor]:
    """The audio side of the patch embedding: the RGB weights' mean for Swin, their sum for CLIP, both as published."""
    if isinstance(backbone, ClipConfig):
        side = backbone.image_size // backbone.patch_size
        return {
            "conv1_audio.weight": state["conv1.weight"].sum(1, keepdim=True),
            "positional_embedding_audio": _audio_positions(state["positional_embedding"], side, backbone),
        }
    shared = {f"patch_embed_audio.{name}": state[f"patch_embed.{name}"] for name in ("proj.bias", "norm.weight", "norm.bias")}
    return {"patch_embed_audio.proj.weight": state["patch_embed.proj.weight"].mean(1, keepdim=True), **shared}


def _widen(x: Tensor) -> Tensor:
    # Half precision becomes float32 before the audio weights are summed up.
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _check(
    state: dict[str, Tensor], expected: dict[str, Tensor], optional: Iterable[str], backbone: SwinConfig | ClipConfig
) -> None:
    """Raise unless ``state`` has the keys and shapes of ``expected``, all but the ``optional`` ones."""
    table = state.get("positional_embedding")
    if isinstance(backbone, ClipConfig) and table is not None and len(table) != backbone.visual_tokens:
        raise ValueError(
            f"got a position table of {len(table)} tokens, expected {backbone.visual_tokens} "
            f"for image_size {backbone.image_size} and patch_size {backbone.patch_size}"
        )
    shared = [key for key in expected if key in state]
    problems = {
        "missing": expected.keys() - state.keys() - set(optional),
        "unexpected": state.keys() - expected.keys(),
        "misshapen": [
            f"{key} {list(state[key].shape)}, expected {list(expected[key].shape)}"
            for key in shared
            if state[key].shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        raise ValueError("; ".join(named(title, sorted(keys)) for title, keys in problems.items() if keys))


def load_pretrained(model: nn.Module, source: str | Path) -> LoadReport:
    """Fill the frozen backbone from a published CLIP or Swin file, and CLIP's ``ln_post``, which training starts from.

    Adapters, gates, temporal tables and head keep their values, so a new model then equals the frozen transformer, frame by
    frame. Nothing is changed where an error is raised. Code in a file is never run, not even in TorchScript archives.

    Args:
        model: a `FastSTGCMA` or `ReferenceSTGCMA`.
        source: a file: OpenAI's CLIP archive or its state dictionary, Microsoft's Swin ``.pth``, or ``.safetensors`` of timm's
            Swin or of transformers' CLIP. Or ``hf://owner/name/file`` on the Hugging Face hub; nothing else uses the network.

    Returns:
        A report of what was loaded, missing and ignored; print it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of no known format; or its backbone is not the model's: missing, unexpected or
            misshapen keys, buffers of another geometry, weights that are not finite, all named.
    """
    backbone = model.config.backbone
    tensors = _read(_locate(source))
    fmt = next((fmt for fmt in _FORMATS if any(mark in tensors for mark in fmt.marks)), None)
    if fmt is None:
        raise ValueError(
            named(f"{source}: got keys of no known backbone (load_checkpoint reads those of STG-CMA itself)", sorted(tensors))
        )
    if not isinstance(backbone, fmt.backbone):
        kind = {SwinConfig: "Swin", ClipConfig: "CLIP"}[type(backbone)]
        raise ValueError(f"{source}: got {fmt.title} weights, expected those of a {kind} backbone")

    names = fmt.names(tensors)
    parts: dict[str, list[Tensor]] = {}
    for key, name in names.items():
        parts.setdefault(name, []).append(_widen(tensors[key]))
    state = {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in parts.items()}
    if "patch_embed.proj.weight" in state:
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)  # a 3-D convolution over one frame

    own = {key: value for key, value in model.state_dict().items() if not is_trainable(key) or key.startswith("ln_post.")}
    buffers = dict(model.named_buffers())
    try:
        _check(state, {key: value for key, value in own.items() if "_audio" not in key}, buffers, backbone)
        state = checked_state(model, state | _audio_state(state, backbone))
    except ValueError as error:
        raise ValueError(f"{source} does not fit the model: {error}") from error

    notes = []
    if isinstance(backbone, ClipConfig) and backbone.heads * _HEAD_DIM != backbone.embed_dim:
        notes.append(
            f"CLIP was trained with {backbone.embed_dim // _HEAD_DIM} heads, the model has {backbone.heads}: "
            "its frozen attention is not CLIP's"
        )
        warnings.warn(notes[0], stacklevel=2)
    nn.Module.load_state_dict(model, state, strict=False)
    return LoadReport(
        source=f"{source} ({fmt.title})",
        loaded=tuple(key for key in own if key in state),
        missing=tuple(key for key in own if key not in state),
        ignored=tuple(key for key in tensors if key not in names),
        notes=tuple(notes),
    )


def load_grounding(model: nn.Module, source: str | Path) -> LoadReport:
    """Fill AVQA's grounding and match layers from a file of the match task's pretraining, from which training starts.

    Nothing is changed where an error is raised. Code in a file is never run.

    Args:
        model: a `FastSTGCMA` or `ReferenceSTGCMA` for AVQA.
        source: the file, or ``hf://owner/name/file``; layers ``fc_a1``, ``fc_a2``, ``fc_gl`` and ``fc1`` to ``fc4``, keys with
            or without ``module.``. Those that the model's head lacks are ignored.

    Returns:
        A report of what was loaded and ignored; print it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a model of another task; a damaged file; or missing or misshapen layers, or weights that are not finite,
            all named.
    """
    if model.config.task != "avqa":
        raise ValueError(f"model: got one for task {model.config.task!r}, expected one for 'avqa'")
    tensors = read_state_dict(_locate(source))
    names = {key: f"avqatask_{key.removeprefix('module.')}" for key in tensors}
    layers = [f"avqatask_{name}" for name in GROUNDING]
    own = {key: value for key, value in model.state_dict().items() if key.partition(".")[0] in layers}
    state = {name: _widen(tensors[key]) for key, name in names.items() if name in own}
    try:
        _check(state, own, (), model.config.backbone)
        state = checked_state(model, state)
    except ValueError as error:
        raise ValueError(f"{source} does not fit the model: {error}") from error
    nn.Module.load_state_dict(model, state, strict=False)
    ignored = tuple(key for key, name in names.items() if name not in own)
    return LoadReport(f"{source} (grounding)", tuple(state), (), ignored, ())

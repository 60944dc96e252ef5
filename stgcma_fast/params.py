"""Parameter counts of the presets beside those of the paper's Tables 2 to 5 and 7."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from .config import ModelConfig, preset
from .reference.model import ReferenceSTGCMA

NAMES = {"clip_b16": "ViT-B/16", "clip_l14": "ViT-L/14", "swin_b": "Swin-B", "swin_l": "Swin-L"}


class Row(NamedTuple):
    """A row of a table: our counts, and the paper's in millions where it prints them."""

    name: str
    trainable: int
    total: int | None
    paper_trainable: float
    paper_total: float | None = None
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both numbers of the paper are ours, rounded."""
        pairs = ((self.trainable, self.paper_trainable), (self.total, self.paper_total))
        return all(paper is None or abs(count / 1e6 - paper) <= 0.05 for count, paper in pairs)


@lru_cache
def _model(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return ReferenceSTGCMA(config)


def count(config: ModelConfig) -> tuple[int, int]:
    """Trainable and total parameters of a model. No memory is taken for them."""
    parameters = list(_model(config).parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def table2() -> list[Row]:
    """Every row of Table 2 (AVE), and the ratios of Table 1 that do not give its numbers."""
    typo = "the paper's total seems to be a misprint of 314.1"
    rows = [
        Row(f"tiny {NAMES[arch]}", *count(preset(arch, "tiny")), *paper, note)
        for arch, paper, note in (
            ("clip_b16", (3.5, 89.6), ""),
            ("clip_l14", (10.7, 324.1), typo),
            ("swin_b", (5.6, 92.3), ""),
            ("swin_l", (11.7, 206.7), ""),
        )
    ]
    differs = "the paper's Table 1 prints {}, which does not give its numbers; the preset has {}"
    for arch, paper, table1, note in (
        ("clip_b16", (11.5, 97.5), 1 / 16, differs.format("1/16", "1/8")),
        ("clip_l14", (20.1, 323.6), None, ""),
        ("swin_b", (10.1, 96.8), (1 / 2, 1 / 4, 1 / 8, 1 / 16), differs.format("1/2, 1/4, 1/8, 1/16", "1/4, 1/4, 1/8, 1/8")),
        ("swin_l", (19.0, 214.0), None, ""),
    ):
        rows.append(Row(f"base {NAMES[arch]}", *count(preset(arch, "base")), *paper))
        if table1 is not None:
            printed = count(preset(arch, "base", adapter_ratio=table1))
            rows.append(Row(f"base {NAMES[arch]}, Table 1", *printed, *paper, note))
    return rows


def table3() -> list[Row]:
    """Table 3 (AVS), and the ratios of Table 1 that do not give its numbers."""
    paper = (29.7, 116.5)
    printed = preset("swin_b", task="avs", adapter_ratio=(1 / 2, 1 / 4, 1 / 8, 1 / 16))
    note = "the paper's Table 1 prints 1/2, 1/4, 1/8, 1/16, which does not give its numbers; the preset has 1/4, 1/4, 1/8, 1/8"
    return [
        Row("base Swin-B", *count(preset("swin_b", task="avs")), *paper),
        Row("base Swin-B, Table 1", *count(printed), *paper, note),
        Row("base Swin-L", *count(preset("swin_l", task="avs")), 38.6, 233.6),
    ]


def table4() -> list[Row]:
    """Table 4 (AVQA, Swin-L base): the heads."""
    large, small = (83.1, 278.1), (26.9, 221.9)
    shipped = "the head of STG-CMA-B as its code was published does not give the paper's numbers"
    lavish = "audio is projected as wide as vision; 66,048 more in an unused fc_a1 would agree, too"
    return [
        Row(name, *count(preset("swin_l", task="avqa", head=head)), *paper, note)
        for name, head, paper, note in (
            ("STG-CMA-L, dgsct1536", "dgsct1536", large, ""),
            ("STG-CMA-B, shipped512_128", "shipped512_128", small, shipped),
            ("STG-CMA-B, lavish512", "lavish512", small, lavish),
        )
    ]


def table5() -> list[Row]:
    """Table 5 (AVE, ViT-L/14, ratio 1/16): streams, directions of the exchange, full fine-tuning."""
    settings = (
        ("audio only", 9.6, {"modalities": ("audio",), "fusion": "none"}),
        ("visual only", 9.6, {"modalities": ("visual",), "fusion": "none"}),
        ("two streams, audio adapters", 10.6, {"adapt": ("audio",), "fusion": "none"}),
        ("two streams, visual adapters", 10.6, {"adapt": ("visual",), "fusion": "none"}),
        ("no interaction", 20.1, {"fusion": "none"}),
        ("audio to visual", 20.1, {"fusion": "a2v"}),
        ("visual to audio", 20.1, {"fusion": "v2a"}),
        ("both directions", 20.1, {}),
    )
    rows = [Row(name, *count(preset("clip_l14", **switches)), paper) for name, paper, switches in settings]
    # Parameters are shared by the streams; two towers of their own hold the transformer's frozen blocks twice.
    named = [(name, p.numel()) for name, p in _model(preset("clip_l14")).named_parameters() if "dapter" not in name]
    shared = sum(n for _, n in named)
    towers = shared + sum(n for name, n in named if "resblocks" in name and "gate_" not in name)
    return [
        *rows,
        Row(
            "full fine-tuning, shared",
            shared,
            shared,
            606.8,
            None,
            "the transformer that both streams share, without adapters; no model of ours",
        ),
        Row(
            "full fine-tuning, two towers",
            towers,
            towers,
            606.8,
            None,
            "only a transformer for each stream gives the paper's number; no model of ours",
        ),
    ]


def table7() -> list[Row]:
    """Table 7 (AVS, Swin-L base): every combination of adapters."""
    papers = {"000": 21.2, "100": 24.7, "010": 28.1, "001": 28.1, "110": 31.6, "011": 35.1, "101": 31.6, "111": 38.6}

    def trainable(used: str) -> int:
        temporal, spatial, global_ = (letter == "1" for letter in used)
        config = preset("swin_l", task="avs", use_temporal=temporal, use_spatial=spatial, use_global=global_)
        return count(config)[0]

    return [Row(" ".join(used), trainable(used), None, paper) for used, paper in papers.items()]


TABLES = (
    ("Table 2: AVE", table2, ""),
    ("Table 3: AVS", table3, ""),
    ("Table 4: AVQA, Swin-L base", table4, ""),
    ("Table 5: AVE, ViT-L/14, ratio 1/16", table5, "The paper prints no totals here."),
    (
        "Table 7: AVS, Swin-L base; temporal, spatial and global adapters",
        table7,
        "The paper prints no totals here. Temporal tables and gates are counted in every row.",
    ),
)


def main() -> int:
    """Print the tables. Returns the command's exit status."""
    console = Console()
    for title, make_rows, remark in TABLES:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("model", no_wrap=True)
        for column in ("trainable", "total", "paper, M"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("agrees")
        rows = make_rows()
        for row in rows:
            paper = " / ".join(f"{number:.1f}" for number in (row.paper_trainable, row.paper_total) if number is not None)
            total = "" if row.total is None else f"{row.total:,}"
            table.add_row(row.name, f"{row.trainable:,}", total, paper, "yes" if row.agrees else "no")
        console.print(table)
        for note in (*(f"{row.name}: {row.note}" for row in rows if row.note), remark):
            if note:
                console.print(note, highlight=False)
        console.print()
    return 0

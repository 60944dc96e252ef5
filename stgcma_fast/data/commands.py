"""Make a synthetic data set, check one of your own, or pack it into shards."""

from __future__ import annotations

from importlib import import_module

from jsonargparse import ArgumentParser, Namespace

# Each is a module with `parser` and `main`.
COMMANDS = {
    "synth": "make a synthetic data set of real media files",
    "check": "find what is missing or broken in a data set",
    "pack": "write a data set into tar shards",
}


def parser() -> ArgumentParser:
    """The command line of ``stgcma-fast data``, still without its subcommands."""
    return ArgumentParser(
        description="Data sets of AVE, AVSBench S4 and MUSIC-AVQA in their published layouts. A first try needs no download: "
        "`stgcma-fast data synth --task ave --out toy --clips 100` makes clips that teach the task; "
        "`stgcma-fast data check --task ave --root toy` says whether a folder can be trained on.",
    )


def add_subcommands(p: ArgumentParser) -> None:
    """Give `parser` its subcommands, after it became a subcommand itself: jsonargparse wants this order."""
    subcommands = p.add_subcommands()
    for name, title in COMMANDS.items():
        subcommands.add_subcommand(name, import_module(f".{name}", __package__).parser(), help=title)


def main(args: Namespace) -> int:
    """Run the subcommand that was parsed. Returns its exit status."""
    return import_module(f".{args.subcommand}", __package__).main(args[args.subcommand])

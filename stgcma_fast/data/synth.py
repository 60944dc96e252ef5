"""A synthetic data set: clips in which what is seen and what is heard belong together."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace


def parser() -> ArgumentParser:
    """The command line of ``stgcma-fast data synth``."""
    return ArgumentParser(description=__doc__)


def main(args: Namespace) -> int:
    """Run the command. Returns its exit status."""
    return 0

"""The console command ``stgcma-fast``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from . import params, report

# Subcommand -> module with `main` and a docstring that explains it.
COMMANDS = {"params": params, "report": report}


def parser() -> ArgumentParser:
    """The command line."""
    p = ArgumentParser(prog="stgcma-fast", description="STG-CMA, an audio-visual model on one frozen vision transformer.")
    subcommands = p.add_subcommands()
    for name, module in COMMANDS.items():
        subcommands.add_subcommand(name, ArgumentParser(description=module.__doc__), help=module.__doc__)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns the command's exit status."""
    return COMMANDS[parser().parse_args(argv).subcommand].main()


if __name__ == "__main__":
    raise SystemExit(main())

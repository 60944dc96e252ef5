"""The console command ``stgcma-fast``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from . import params, report
from .data import commands as data
from .data.errors import MediaError

# Subcommand -> module with `main` and a docstring that explains it. One with `parser` takes arguments.
COMMANDS = {"params": params, "report": report, "data": data}

# Top-level packages of the extra `data`.
DATA_PACKAGES = {"av", "PIL", "torchvision", "torchaudio", "h5py", "webdataset"}


def parser(argv: Sequence[str] = ()) -> ArgumentParser:
    """The command line, complete as far as ``argv`` needs it: data's own commands need the extra `data`."""
    p = ArgumentParser(prog="stgcma-fast", description="STG-CMA, an audio-visual model on one frozen vision transformer.")
    subcommands = p.add_subcommands()
    for name, module in COMMANDS.items():
        inner = module.parser() if hasattr(module, "parser") else ArgumentParser(description=module.__doc__)
        subcommands.add_subcommand(name, inner, help=module.__doc__)
        if module is data and argv[:1] == [name]:
            data.add_subcommands(inner)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The command's exit status: 1 where it failed at what it was given, which is then said in a line; 130 after ^C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser(argv).parse_args(argv)
        module = COMMANDS[args.subcommand]
        return module.main(args[args.subcommand]) if hasattr(module, "parser") else module.main()
    except KeyboardInterrupt:
        return 130
    except (MediaError, ValueError, OSError) as error:
        cause = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DATA_PACKAGES:
            raise
        cause = f'{error.name} is not installed; pip install "stgcma-fast[data]"'
    print(f"stgcma-fast: error: {cause}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())

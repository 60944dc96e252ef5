"""The console command ``stgcma-fast``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

from .data.errors import MediaError

# Subcommand -> module with `main` and a docstring that explains it. One with `parser` takes arguments. They are not imported
# before Lightning: with rich there first, typing gives Lightning `float | int` for its `int | float`, and a limit of 1 batch
# becomes 1.0, all of them.
COMMANDS = {"params": ".params", "report": ".report", "data": ".data.commands"}
# Those of tasks, which need the extra `train` and are imported when one of them is asked for.
TRAINING = {
    "fit": "Train on a data set.",
    "validate": "Evaluate a trained model on the split it was selected by.",
    "test": "Evaluate a trained model on the test split.",
}
PREDICT = "Tell what is heard and seen in media files of one's own."

# Top-level packages that come with an extra.
EXTRAS = {
    **dict.fromkeys(("av", "PIL", "torchvision", "torchaudio", "h5py", "webdataset"), "data"),
    **dict.fromkeys(("lightning", "torchmetrics", "tensorboard", "matplotlib"), "data,train"),
}


def parser(argv: Sequence[str] = ()) -> ArgumentParser:
    """The command line, complete as far as ``argv`` needs it: data's own commands need the extra `data`."""
    p = ArgumentParser(prog="stgcma-fast", description="STG-CMA, an audio-visual model on one frozen vision transformer.")
    subcommands = p.add_subcommands()
    for name, home in COMMANDS.items():
        module = import_module(home, __package__)
        inner = module.parser() if hasattr(module, "parser") else ArgumentParser(description=module.__doc__)
        subcommands.add_subcommand(name, inner, help=module.__doc__)
        if name == "data" and argv[:1] == [name]:
            module.add_subcommands(inner)
    for name, title in TRAINING.items():
        # For the list of commands; Lightning's command line has their arguments.
        subcommands.add_subcommand(name, ArgumentParser(description=title), help=title)
    if argv[:1] == ["predict"]:
        from .tasks import predict

        subcommands.add_subcommand("predict", predict.parser(), help=PREDICT)
    else:
        subcommands.add_subcommand("predict", ArgumentParser(description=PREDICT), help=PREDICT)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The command's exit status: 1 where it failed at what it was given, which is then said in a line; 130 after ^C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in TRAINING:
            from .tasks import training

            return training.main(argv[0], argv[1:])
        args = parser(argv).parse_args(argv)
        if args.subcommand == "predict":
            from .tasks import predict

            return predict.main(args.predict)
        module = import_module(COMMANDS[args.subcommand], __package__)
        return module.main(args[args.subcommand]) if hasattr(module, "parser") else module.main()
    except KeyboardInterrupt:
        return 130
    except (MediaError, ValueError, OSError) as error:
        cause = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        cause = f'{error.name} is not installed; pip install "stgcma-fast[{EXTRAS[package]}]"'
    print(f"stgcma-fast: error: {cause}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())

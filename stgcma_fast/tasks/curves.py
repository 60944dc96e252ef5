"""The curves of a training, drawn from its logs."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Of Lightning's loggers in a run's folder: a version for each time that it was started.
LOGS = "logs"


def read_logs(folder: Path) -> dict[str, dict[int, float]]:
    """What was logged in a run's folder: values by name and step. Of a step that was done twice the later one counts."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob(f"{LOGS}/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name not in ("step", "epoch") and value:
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


def draw_curves(folder: Path) -> Path | None:
    """Write ``curves.png`` into a run's folder: losses, scores, learning rates. None where nothing was logged yet."""
    curves = read_logs(folder)
    panels = {
        "loss": [name for name in curves if name.endswith("/loss")],
        "score on the validation split": [name for name in curves if name.startswith("val/") and not name.endswith("/loss")],
        "learning rate": [name for name in curves if name.startswith("lr-")],
    }
    panels = {title: sorted(names) for title, names in panels.items() if names}
    if not panels:
        return None
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    for place, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(len(panels), 1, place)
        for name in names:
            steps = sorted(curves[name])
            axes.plot(steps, [curves[name][step] for step in steps], marker="." if len(steps) < 50 else "", label=name)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
    axes.set_xlabel("step")
    path = folder / "curves.png"
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
    return path


class Curves(Callback):
    """Draws a run's curves after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.loggers:
            for logger in trainer.loggers:
                logger.save()
            draw_curves(self.folder)

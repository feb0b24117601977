"""nnU-Net's local logger, extended by named loss terms and a plot of them."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from nnunetv2.training.logging.nnunet_logger import LocalLogger

PLOT_EVERY_SECONDS = 60.0
SHARE_OF_PLOTS = 0.01  # of a training's time, at most
TERM_PREFIX = "loss_"


class TermLogger(LocalLogger):
    """Accepts keys that start with ``loss_`` and adds a panel of them to ``progress.png``.

    nnU-Net draws its plot at the end of every epoch, which takes seconds: with short epochs that is most of the time.
    It is drawn once a minute here, from the first minute on, and less often where that takes more than a hundredth of
    the time; and by ``draw`` at the end of training.
    """

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self._last_plot, self._seconds_of_plot = monotonic(), 0.0

    def log(self, key: str, value: float, epoch: int) -> None:
        if key.startswith(TERM_PREFIX):
            history = self.my_fantastic_logging.setdefault(key, [])
            history.extend([float("nan")] * (epoch - len(history)))
        super().log(key, value, epoch)

    def plot_progress_png(self, output_folder: str) -> None:
        started = monotonic()
        if started - self._last_plot >= max(PLOT_EVERY_SECONDS, self._seconds_of_plot / SHARE_OF_PLOTS):
            self.draw(output_folder)
            self._last_plot = monotonic()
            self._seconds_of_plot = self._last_plot - started

    def draw(self, output_folder: str) -> None:
        """Write ``progress.png``: nnU-Net's panels and, below them, the named loss terms by epoch."""
        super().plot_progress_png(output_folder)
        terms = {key: values for key, values in self.my_fantastic_logging.items() if key.startswith(TERM_PREFIX)}
        if terms:
            _append_panel(Path(output_folder) / "progress.png", terms)


def _append_panel(path: Path, terms: dict[str, list[float]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with Image.open(path) as opened:
        progress = opened.convert("RGB")
    figure = Figure(figsize=(30, 18), layout="tight")
    axes = figure.subplots()
    for name, values in terms.items():
        axes.plot(range(len(values)), values, linewidth=4, label=name.removeprefix(TERM_PREFIX))
    axes.set_xlabel("epoch", fontsize=28)
    axes.set_ylabel("weighted loss term", fontsize=28)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.tick_params(labelsize=24)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=24)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    panel = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    panel = panel.resize((progress.width, round(panel.height * progress.width / panel.width)))
    both = Image.new("RGB", (progress.width, progress.height + panel.height), "white")
    both.paste(progress, (0, 0))
    both.paste(panel, (0, progress.height))
    both.save(path)

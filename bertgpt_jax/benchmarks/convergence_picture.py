"""The picture of benchmark `convergence`: each technique's learning curve less the plain one, in the seeds' band."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bertgpt_jax.benchmarks.harness import require


def draw(found: dict[str, dict[str, Any]], block: int, path: Path) -> None:
    """Draws a row of panels for each model, a panel a technique, to a PNG.

    Args:
        found: model -> technique -> what `Trainer.compared` gives.
        block: steps of a point.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require("matplotlib", extra="viz", purpose="a picture of benchmark convergence")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 6
    rows = {name: -(-len(techniques) // columns) for name, techniques in found.items()}
    figure, panels = plt.subplots(
        sum(rows.values()), columns, figsize=(3 * columns, 2.1 * sum(rows.values())), squeeze=False
    )
    first = 0
    for model, techniques in found.items():
        mine = list(panels[first : first + rows[model]].flat)
        first += rows[model]
        for panel, (name, tree) in zip(mine, techniques.items(), strict=False):
            _panel(panel, f"{model}: {name}", tree, block)
        for panel in mine[len(techniques) :]:
            panel.set_axis_off()
    figure.suptitle("Training loss beside the plain run's of the same seed, %; grey: one standard deviation over seeds")
    figure.supxlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(panel: Any, title: str, tree: dict[str, Any], block: int) -> None:
    """The seeds' differences in per cent, and the band in which plain seeds lie."""
    plain, mine = (np.array([seed["losses"] for seed in tree[side]]) for side in ("plain", "technique"))
    steps = block * (1 + np.arange(plain.shape[1]))
    band = 100 * plain.std(0, ddof=1) / plain.mean(0)
    panel.fill_between(steps, -band, band, color="0.85")
    for difference in 100 * (mine / plain - 1):
        panel.plot(steps, difference, linewidth=0.8)
    panel.set_title(title, fontsize=8)
    panel.tick_params(labelsize=7)
    panel.set_ylim(*(1.5 * float(np.quantile(band, 0.9)) * np.array([-1, 1])))

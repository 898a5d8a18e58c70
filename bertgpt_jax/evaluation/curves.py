"""Learning curves of finished or running workdirs, as a picture and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.training import storage

_PAIR_LOSSES = ("train/nsp_loss", "eval/nsp_loss", "train/sop_loss", "eval/sop_loss")
_ACCURACIES = ("accuracy", "mlm_accuracy", "nsp_accuracy", "sop_accuracy")
PANELS = (
    ("loss (nats)", ("train/loss", "eval/loss", "train/mlm_loss", "eval/mlm_loss", *_PAIR_LOSSES)),
    ("accuracy", ("train/accuracy", "train/mlm_accuracy", *(f"eval/{name}" for name in _ACCURACIES))),
)
"""Title of each panel and the metrics it shows."""


def read_rows(workdir_text: str) -> list[dict[str, Any]]:
    """The rows of a workdir's `metrics.jsonl`, in order of steps; a torn last line is left out.

    Raises:
        DataError: there are none.
    """
    workdir = storage.workdir_path(workdir_text)
    rows = []
    for line in (storage.read_text(workdir / "metrics.jsonl") or "").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    if not rows:
        raise DataError(
            f"'{workdir}' has no metrics.jsonl with rows; give the workdir of a run that has evaluated once"
        )
    return rows


def curves(workdirs: list[str]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Workdir name -> metric -> (step, value) points."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for text in workdirs:
        metrics: dict[str, list[tuple[int, float]]] = {}
        for row in read_rows(text):
            for name, value in row.items():
                if name != "step" and value is not None:
                    metrics.setdefault(name, []).append((row["step"], value))
        found[Path(text).name] = metrics
    return found


def draw(found: dict[str, dict[str, list[tuple[int, float]]]], path: Path, lines: dict[str, float]) -> None:
    """Draws the panels that have data to a PNG.

    Args:
        lines: name -> height of a dashed reference line in the loss panel.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib; run: pip install 'bertgpt_jax[viz]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = [(title, [m for m in names if any(m in run for run in found.values())]) for title, names in PANELS]
    wanted = [(title, names) for title, names in wanted if names]
    figure, panels = plt.subplots(1, len(wanted), figsize=(6.5 * len(wanted), 4.2), squeeze=False)
    for panel, (title, names) in zip(panels[0], wanted, strict=True):
        for run, metrics in found.items():
            for name in (n for n in names if n in metrics):
                steps, values = zip(*metrics[name], strict=True)
                held_out = name.startswith("eval/")
                label = f"{run} {name}" if len(found) > 1 else name
                panel.plot(
                    steps, values, label=label, linewidth=2 if held_out else 0.8, marker="o" if held_out else "",
                    markersize=3, alpha=1 if held_out else 0.6,
                )  # fmt: skip
        for name, height in lines.items() if title.startswith("loss") else ():
            panel.axhline(height, linestyle="--", color="grey", linewidth=1, label=f"{name} {height:.2f}")
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""A plan as text, JSON and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bertgpt_jax.planning.places import Place
from bertgpt_jax.planning.plan import Plan, StagePlan, fits, mfu
from bertgpt_jax.planning.published import calibration_error, known_chips
from bertgpt_jax.training.metrics import duration, short_number

GIB = 2**30


def text(plan: Plan) -> str:
    """The whole plan as a table."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.sizes.items())
    halved, full = plan.main.flops_per_token
    lines = [
        f"place        {plan.place.describe()}",
        f"mesh         {mesh}",
        f"model        {plan.config.model.kind}, {plan.parameters:,} parameters; {halved / 1e9:.4g} GFLOP a token "
        f"(attention in full: {full / 1e9:.4g})",
        *(f"note         {note}" for note in plan.notes),
    ]
    for stage in plan.stages:
        lines += _stage(plan, stage)
    days = f"days         {plan.days:.2f} for the configured steps"
    lines.append(days if plan.cost is None else f"{days}; cost {plan.cost:,.0f} at {plan.price:g} a chip and hour")
    return "\n".join(lines)


def _stage(plan: Plan, stage: StagePlan) -> list[str]:
    work, compute = stage.work, plan.config.execution.compute
    lines = [
        f"stage        {stage.name}: batch {work.rows:,} x {work.length:,} in {work.microbatches} parts, "
        f"{compute.dtype}, remat {work.remat}, {'fused' if work.fused_attention else 'reference'} attention",
        *_memory(plan, stage),
        *_kernels(stage),
        *_collectives(stage),
        *_time(plan, stage),
    ]
    if len(stage.shapes) > 1:
        for shape in stage.shapes:
            filled = f" (computed as {shape.computed:,})" if shape.computed != shape.rows else ""
            lines.append(
                f"             from step {shape.first:,}: {shape.steps:,} steps of {shape.rows:,} x {shape.length:,}"
                f"{filled}, {shape.seconds:.3g} s each"
            )
    return lines


def _memory(plan: Plan, stage: StagePlan) -> list[str]:
    m, has = stage.model, plan.place.chip.usable_bytes
    verdict = "fits" if fits(stage, plan.place) else "DOES NOT FIT"
    how = "by the model"
    temporaries = m.temporaries
    if stage.compiled:
        c = stage.compiled
        how = f"compiled in {c.trace_seconds + c.compile_seconds:.0f} s (model: {m.total / GIB:.2f})"
        temporaries = c.temporaries or max(c.needed - m.params - m.optimizer - m.batch, 0)
    parts = {"params": m.params, "optimizer": m.optimizer, "batch": m.batch, "temp": temporaries}
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    inside = {"gradients": m.gradients, "activations": m.activations, "working set": m.working}
    shares = ", ".join(f"{name} {size / GIB:.2f}" for name, size in inside.items())
    return [
        f"bytes        {verdict}: {stage.bytes_per_device / GIB:.2f} GiB a device of {has / GIB:.2f}, {how}",
        f"             {listed}; of temp, by the model: {shares}",
    ]


def _kernels(stage: StagePlan) -> list[str]:
    forward, backward = stage.compiled.attention if stage.compiled else (0, 0)
    return [f"kernels      of fused attention: {forward} forward, {backward} backward a step"] if forward else []


def _collectives(stage: StagePlan) -> list[str]:
    if stage.compiled is None:
        return []
    rows = [c for c in stage.compiled.collectives if c.sent >= 1e6][:8]
    return [
        f"{'collectives' if i == 0 else '':12} {c.kind} over {'+'.join(c.axes) or '?'}"
        f"{' between slices' if c.network else ''}: {c.count:,} a step, "
        f"{c.sent / 1e9:.3g} GB sent a device"
        for i, c in enumerate(rows)
    ] or [f"collectives  {'less than 1 MB of each kind' if stage.compiled.collectives else 'none'}"]


def _time(plan: Plan, stage: StagePlan) -> list[str]:
    t, place = stage.time, plan.place
    if place.chip.platform == "cpu":
        return ["time         none: CPU devices stand for no machine"]
    terms = {"matmul": t.matmul, "hbm": t.hbm, "ici": t.ici, "dcn": t.dcn, "bubble": t.bubble}
    listed = ", ".join(f"{name} {seconds:.3g}" for name, seconds in terms.items() if seconds)
    rate = stage.work.positions / t.total
    return [
        f"time         {t.total:.4g} s a step, {t.binding} binds ({listed} s; collectives run beside); "
        f"{error_text(place)}",
        f"             {short_number(rate)} tokens/s, {short_number(rate / place.chips)} a chip, "
        f"MFU {mfu(stage, place, halved=True):.1%} (attention in full: {mfu(stage, place, halved=False):.1%}), "
        f"{duration(stage.days * 86_400)} for its steps",
    ]


def error_text(*places: Place) -> str:
    """How far the time model is off: `within 12% on published runs, none of them on v6e`."""
    unknown = sorted({place.chip.name for place in places} - set(known_chips()))
    return f"within {math.ceil(100 * calibration_error())}% on published runs" + (
        f", none of them on {' or '.join(unknown)}" if unknown else ""
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """JSON tree of a plan; what is asked of the run as a whole is that of the stage that takes longest."""
    main = plan.main
    return {
        "chips": plan.place.chips,
        "hosts": plan.place.hosts,
        "topology": plan.place.name,
        "slices": plan.place.slices,
        "mesh": dict(plan.sizes),
        "parameters": plan.parameters,
        "fits": plan.fits,
        "hbm_bytes": plan.place.chip.usable_bytes,
        **_stage_json(plan, main),
        "days": plan.days,
        "cost": plan.cost,
        "calibration_error": calibration_error(),
        "notes": list(plan.notes),
        "stages": [
            {"name": stage.name, "fits": fits(stage, plan.place), **_stage_json(plan, stage)} for stage in plan.stages
        ],
    }


def _stage_json(plan: Plan, stage: StagePlan) -> dict[str, Any]:
    m, t, c = stage.model, stage.time, stage.compiled
    return {
        "bytes_per_device": stage.bytes_per_device,
        "compile_seconds": c and c.trace_seconds + c.compile_seconds,
        "predicted_step_seconds": t.total,
        "predicted_mfu": mfu(stage, plan.place, halved=True),
        "predicted_mfu_full_attention": mfu(stage, plan.place, halved=False),
        "tokens_per_second": stage.work.positions / t.total,
        "flops_per_token": stage.flops_per_token[0],
        "binding": t.binding,
        "terms_seconds": {"matmul": t.matmul, "hbm": t.hbm, "ici": t.ici, "dcn": t.dcn, "bubble": t.bubble},
        "bytes": {
            "params": m.params,
            "optimizer": m.optimizer,
            "batch": m.batch,
            "temp": c.temporaries if c else m.temporaries,
            "gradients": m.gradients,
            "activations": m.activations,
            "working": m.working,
            "model_total": m.total,
        },
        "collectives": [
            {"kind": one.kind, "axes": list(one.axes), "network": one.network, "count": one.count, "bytes": one.sent}
            for one in (c.collectives if c else ())
        ],
        "attention_kernels": list(c.attention) if c else None,
        "batch": [stage.work.rows, stage.work.length],
        "microbatches": stage.work.microbatches,
        "remat": stage.work.remat,
        "days": stage.days,
        "ramp": [vars(shape) for shape in stage.shapes],
    }


def markdown(plans: list[tuple[str, dict[str, Any]]]) -> str:
    """A table of plans, one row each; see `draw` for the argument."""
    rows = [
        "| run | place | mesh | batch, parts, remat | fits | GiB | model | compiled | step | MFU | binds | days |",
        "|" + "---|" * 12,
    ]
    for label, tree in plans:
        mesh = ", ".join(f"{axis} {size}" for axis, size in tree["mesh"].items() if size > 1) or "1"
        slices = f"{tree['slices']} x " if tree["slices"] > 1 else ""
        has, needs, model = (
            n / GIB for n in (tree["hbm_bytes"], tree["bytes_per_device"], tree["bytes"]["model_total"])
        )
        seconds = tree["compile_seconds"]
        cells = [
            label,
            f"{slices}{tree['topology']} ({tree['chips']:,} chips)",
            mesh,
            f"{tree['batch'][0]:,} x {tree['batch'][1]:,}, {tree['microbatches']}, {tree['remat']}",
            "yes" if tree["fits"] else "**no**",
            f"{needs:.1f} of {has:.1f}",
            f"{model:.1f}",
            "-" if seconds is None else f"{seconds:.0f} s",
            f"{tree['predicted_step_seconds']:.3g} s",
            f"{tree['predicted_mfu']:.1%}",
            tree["binding"],
            f"{tree['days']:.2f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(plans: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Bytes of each plan against the chip's memory, and where its step's time goes.

    Args:
        plans: (label, `as_json`) of each.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        from bertgpt_jax.errors import ConfigError

        raise ConfigError("a picture needs matplotlib; run: pip install 'bertgpt_jax[viz]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.42 * len(plans)), sharey=True)
    labels = [label for label, _ in plans]
    for axes, parts, scale in (
        (left, ("params", "optimizer", "gradients", "rest of temp"), 1 / GIB),
        (right, ("matmul", "hbm", "ici", "dcn", "bubble"), 1.0),
    ):
        start = [0.0] * len(plans)
        for part in parts:
            values = [_value(tree, part) * scale for _, tree in plans]
            if axes is right:
                values = [v / tree["predicted_step_seconds"] for v, (_, tree) in zip(values, plans, strict=True)]
            axes.barh(labels, values, left=start, label=part)
            start = [a + b for a, b in zip(start, values, strict=True)]
    left.plot([tree["hbm_bytes"] / GIB for _, tree in plans], labels, "k|", markersize=14, label="memory of the chip")
    left.set_xlabel("GiB a device")
    right.axvline(1.0, color="black", linewidth=1)
    right.set_xlabel("share of the predicted step (collectives run beside computation)")
    left.invert_yaxis()
    for axes in (left, right):
        axes.legend(fontsize=7, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _value(tree: dict[str, Any], part: str) -> float:
    if part == "rest of temp":
        return max(tree["bytes"]["temp"] - tree["bytes"]["gradients"], 0)
    return tree["bytes"].get(part, tree["terms_seconds"].get(part, 0.0))

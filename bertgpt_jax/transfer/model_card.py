"""README.md of an export: what the model is, what it was trained on and how well it does, as far as that is known."""

from __future__ import annotations

from typing import Any

from bertgpt_jax.transfer.source import Source
from bertgpt_jax.transfer.trained_on import Totals

_TAGS = {
    "BertForPreTraining": "fill-mask",
    "BertForMaskedLM": "fill-mask",
    "RobertaForMaskedLM": "fill-mask",
    "GPT2LMHeadModel": "text-generation",
    "OpenAIGPTLMHeadModel": "text-generation",
}
"""Class -> the hub's pipeline tag."""


def model_card(
    source: Source, config: dict[str, Any], proof: dict[str, Any], licence: str, data: Totals, notes: list[str]
) -> str:
    """The text of the card.

    Args:
        config: the tree of config.json.
        proof: the tree of export_proof.json.
        licence: an identifier of the hub's list, or `unknown`.
        data: what the corpora hold, from their manifests; {} where that is not known.
        notes: what a user has to know, a sentence each.
    """
    name, architecture = config["model_type"], config["architectures"][0]
    sizes = source.model_config
    lines = [
        "---",
        f"license: {licence}",
        "library_name: transformers",
        f"pipeline_tag: {_TAGS[architecture]}",
        "tags:",
        f"- {name}",
        "- bertgpt_jax",
        "---",
        "",
        f"# {architecture}, {sizes.num_layers} layers, width {sizes.hidden_size}",
        "",
        f"Trained with bertgpt_jax; exported from step {source.step:,}."
        if source.step is not None
        else "Exported with bertgpt_jax.",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {architecture}",
        f'model = {architecture}.from_pretrained("DIRECTORY")',
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")',
        "```",
        "",
        *_training(source.meta, data),
        "## Export",
        "",
        "Every tensor was read back and compared bit for bit with the checkpoint. On a fixed batch the logits of "
        f"{proof['reference']} and bertgpt_jax differ by {proof['outputs']['logits']:.1e} at most "
        f"({proof['layers']} of {sizes.num_layers} layers compared). `export_proof.json` has the numbers, "
        "`manifest.json` the sha256 of every file.",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _training(meta: dict[str, Any], data: Totals) -> list[str]:
    if not meta:
        return []
    run = meta.get("config", {})
    lines = ["## Training", ""]
    objective = run.get("objective", {}).get("kind")
    if objective:
        lines.append(f"- objective: {objective}")
    corpus = run.get("corpus", {})
    if corpus.get("path"):
        paths = [corpus["path"]] if isinstance(corpus["path"], str) else corpus["path"]
        names = [last_part(path) for path in paths]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"- text: {', '.join(names[:3])}{more}; tokenizer: {corpus.get('tokenizer', {}).get('kind')}")
    for name, totals in data.items():
        held_out = totals["documents"] - totals["train_documents"]
        lines.append(
            f"- {f'corpus {name}' if name else 'data'}: {totals['train_documents']:,} documents with "
            f"{totals['train_tokens']:,} tokens ({totals['train_bytes']:,} bytes) to train on, {held_out:,} held out"
        )
    lines.append(f"- data fingerprint: `{meta.get('data_fingerprint')}`")
    for stage in run.get("stages", ()):
        lines.append(
            f"- stage {stage['name']}: {stage['steps']} steps of {stage['batch_size']} x {stage['sequence_length']} "
            f"tokens, {stage['optimizer']['kind']}"
        )
    metrics = {name: value for name, value in (meta.get("metrics") or {}).items() if value is not None}
    if metrics:
        lines += ["", "| held out | value |", "|---|---|"]
        lines += [f"| {name.removeprefix('eval/')} | {value:.4f} |" for name, value in metrics.items()]
    return [*lines, ""]


def redacted(value: Any, key: str = "") -> Any:
    """A JSON tree for others to see: of paths only the last part, of addresses no user information."""
    if isinstance(value, dict):
        return {name: redacted(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in ("path", "init_from", "general_text"):
        return last_part(value)
    head, mark, tail = value.partition("://")
    user, at, rest = tail.partition("@")
    return f"{head}://***@{rest}" if mark and at and "/" not in user else value


def last_part(path: str) -> str:
    """`wiki_00.gz` of `/data/wiki_00.gz`."""
    return path.rstrip("/").rpartition("/")[2]

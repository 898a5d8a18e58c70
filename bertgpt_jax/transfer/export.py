"""Exports: a Hugging Face directory, proven before it has its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil

import bertgpt_jax
from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.transfer import proof as proving
from bertgpt_jax.transfer.families import family_of
from bertgpt_jax.transfer.family import Family
from bertgpt_jax.transfer.hf_directory import expected_shapes
from bertgpt_jax.transfer.hf_tokenizer import roles_of, write_tokenizer
from bertgpt_jax.transfer.model_card import last_part, model_card, redacted
from bertgpt_jax.transfer.names import Name
from bertgpt_jax.transfer.source import Source, check_vocabulary
from bertgpt_jax.transfer.target import building, write_json
from bertgpt_jax.transfer.tensors import TensorFiles
from bertgpt_jax.transfer.trained_on import Totals
from bertgpt_jax.transfer.writer import DEFAULT_SHARD_BYTES, TensorWriter

PROOF = "export_proof.json"


def export_hf(
    source: Source,
    out: str,
    dtype: str = "float32",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    reference: proving.Reference = "auto",
    layers: int | None = None,
    licence: str = "unknown",
    data: Totals | None = None,
) -> dict[str, Any]:
    """Writes a directory that transformers loads without flags; returns its proof.

    Args:
        source: whose parameters; read one array at a time.
        out: the directory; must not exist.
        dtype: of the tensors, `float32` or `bfloat16`.
        shard_bytes: tensors in a file, at most.
        reference: what the outputs are compared with.
        layers: how many layers of the outputs are compared, at most; None: as many as the memory holds.
        licence, data: for the model card; what the corpora hold.

    Raises:
        ConfigError: transformers cannot express the model (the message lists why), or `out` cannot be.
        ProofFailed: what was written differs; nothing is left at `out`. StorageError: no space.
    """
    config = source.model_config
    family = family_of(config)
    check_vocabulary(config, source.tokenizer, source.label)
    special = SpecialIds() if source.tokenizer is None else source.tokenizer.special
    rows = family.names(config, special)
    shapes = all_shapes(source, family, rows)
    size = sum(math.prod(shape) for shape in shapes.values()) * (2 if dtype == "bfloat16" else 4)
    kind = proving.choose_reference(reference)
    with building(out, source.label.partition(", step")[0], size + (64 << 20)) as work:
        tree = {**family.to_config(config, special), "dtype": dtype, "torch_dtype": dtype}
        write_json(work / "config.json", tree)
        write_tensors(source, family, rows, TensorWriter(work, shapes, dtype, shard_bytes))
        if source.tokenizer is not None:
            write_tokenizer(source.tokenizer, work, config.max_positions, encoder=config.kind == "bert")
        if config.kind == "gpt":
            write_json(work / "generation_config.json", _generation(special))
        write_json(work / "training_args.json", _training_args(source, data or {}))
        compared = min(layers or layers_in_memory(source, kind), config.num_layers)
        proof = prove(source, family, rows, work, dtype, kind, compared)
        write_json(work / PROOF, proof)
        card = model_card(source, tree, proof, licence, data or {}, _notes(source))
        (work / "README.md").write_text(card, "utf-8")
    return proof


def all_shapes(source: Source, family: Family, rows: list[Name]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the export, repeated and zero ones included, with its shape."""
    shapes = expected_shapes(source.model_config, rows, source.leaves)
    shared = {copy: shapes[original] for copy, original in family.shared(source.model_config).items()}
    return shapes | shared | family.zeros(source.model_config)


def write_tensors(source: Source, family: Family, rows: list[Name], writer: TensorWriter) -> None:
    """Reads one of our arrays after the other and writes it into its places."""
    copies: dict[str, list[str]] = {}
    for copy, original in family.shared(source.model_config).items():
        copies.setdefault(original, []).append(copy)
    for row in rows:
        _write_row(source, row, copies, writer)
    writer.finish()


def _write_row(source: Source, row: Name, copies: dict[str, list[str]], writer: TensorWriter) -> None:
    """One array of ours; a function of its own, at whose end no view keeps it while the next is read."""
    array = source.read([row.ours])[row.ours]
    for i in range(len(array)) if row.stacked else (None,):
        part = array if i is None else array[i]
        name = row.theirs.format(i=i)
        for target in (name, *copies.get(name, ())):
            writer.put(target, row.region(part.shape), row.to_theirs(part))


def prove(
    source: Source, family: Family, rows: list[Name], directory: Path, dtype: str, kind: str, layers: int
) -> dict[str, Any]:
    """The tree of export_proof.json.

    Raises:
        ProofFailed: naming the first difference.
    """
    files = TensorFiles(directory)
    tensors = proving.compare_bits(source, family, rows, files, dtype)
    texts = 0 if source.tokenizer is None else proving.compare_tokenizers(directory, source.tokenizer)
    batch = proving.make_batch(source.model_config, source.tokenizer)
    theirs = proving.run_reference(directory, batch, kind, layers)
    ours = proving.our_outputs(source, rows, files, batch, layers)
    return {
        "format_version": 1,
        "source": last_part(source.label),
        "step": source.step,
        "state_fingerprint": source.meta.get("state_fingerprint"),
        "bertgpt_jax": bertgpt_jax.__version__,
        "dtype": dtype,
        "tensors_equal": tensors,
        "texts_cut_alike": texts,
        "reference": kind,
        "versions": proving.versions(kind),
        "layers": layers,
        "layers_of_model": source.model_config.num_layers,
        "batch": list(batch["tokens"].shape),
        "tolerance": proving.TOLERANCE,
        "outputs": proving.compare_outputs(ours, theirs, batch["attention"], kind),
    }


def layers_in_memory(source: Source, kind: str) -> int:
    """How many layers the reference can hold in half of the free memory: all of them, but for the largest models."""
    depth = source.model_config.num_layers
    if kind == "numpy":  # holds one at a time
        return depth
    sizes = {path: 4 * math.prod(shape) for path, (_, shape) in source.leaves.items()}
    layer = sum(size for path, size in sizes.items() if path.startswith("layers/")) // depth
    rest = sum(size for path, size in sizes.items() if not path.startswith("layers/"))
    return max(1, min(depth, (psutil.virtual_memory().available // 2 - rest) // layer))


def _generation(special: SpecialIds) -> dict[str, Any]:
    ids = {f"{role}_token_id": i for role, i in roles_of(special, encoder=False).items() if role in ("bos", "eos")}
    if special.eot is not None:
        ids["pad_token_id"] = special.eot if special.pad is None else special.pad
    return {"_from_model_config": False, "do_sample": False, **ids}


def _training_args(source: Source, data: Totals) -> dict[str, Any]:
    """What the model was trained with: the run's config, its corpora and where its checkpoint stood."""
    names = ("step", "stage", "metrics", "data_fingerprint", "tokenizer_sha256", "versions", "mesh", "config")
    known = {n: redacted(source.meta[n]) for n in names if n in source.meta}
    return {"trained_with": "bertgpt_jax", **known, **({"data": data} if data else {})}


def _notes(source: Source) -> list[str]:
    notes = []
    tokenizer, rows = source.tokenizer, source.model_config.vocab_size
    if tokenizer is None:
        notes.append("There is no tokenizer: inputs are ids.")
    else:
        notes.append(
            "Names of special tokens in a text (`[MASK]`, `<|endoftext|>`) become those tokens here; in training they "
            "were ordinary text."
        )
        if rows > tokenizer.vocab_size:
            notes.append(f"The last {rows - tokenizer.vocab_size} rows of the vocabulary belong to no token (padding).")
    if source.model_config.tied_head:
        notes.append("The head repeats the token table; both are in the file, as one (`tie_word_embeddings`).")
    return notes

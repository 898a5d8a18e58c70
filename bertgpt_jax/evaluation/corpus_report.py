"""A corpus, or the corpora of a config with the examples made of them, in numbers: as a tree, as text, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.mixture import parts_of
from bertgpt_jax.batches.packing import PackedDocuments, PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.batches.statistics import example_statistics
from bertgpt_jax.batches.windows import FullDocuments, Windows
from bertgpt_jax.corpus.mixture import CorpusMixture, open_any
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.statistics import corpus_statistics
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.training.data import make_train
from bertgpt_jax.training.run_config import RunConfig

KINDS = (Windows(), FullDocuments(), SentencePairs(), PackedDocuments(), PackedPairs())
"""What examples of a corpus without a config are shown as."""


def corpus_report(path: Path, sequence_length: int, rows: int, top: int) -> dict[str, Any]:
    """The report of a prepared corpus, with the usual kinds of example at one length.

    Args:
        rows: examples counted of each kind; `top`: tokens and sources listed.

    Returns:
        `corpora`: name -> `corpus_statistics`; `examples`: a list of `example_statistics` with the `corpus`'s name, or
        with `left_out`, the reason why the corpus cannot make them.
    """
    reader = CorpusReader(path)
    name, examples = path.resolve().name, []
    for kind in KINDS:
        masking = None if isinstance(kind, Windows) else Masking()
        try:
            dataset = Dataset(reader, kind, masking, sequence_length=sequence_length, batch_size=1)
            found = example_statistics(dataset, rows)
        except (ConfigError, DataError) as error:
            found = {"examples": kind.kind, "sequence_length": sequence_length, "left_out": str(error)}
        examples.append({"corpus": name} | found)
    return {"corpora": {name: corpus_statistics(reader, top)}, "examples": examples}


def config_report(config: RunConfig, corpora: Path, rows: int, top: int) -> dict[str, Any]:
    """The report of a config's corpora, prepared below `corpora`, with the examples of each of its stages.

    Returns:
        as `corpus_report`; examples also name their `stage`.
    """
    opened = open_any(config.corpus, corpora)
    readers = opened.readers if isinstance(opened, CorpusMixture) else {opened.path.name: opened}
    examples = []
    for index, stage in enumerate(config.stages):
        for data in make_train(config, index, 0, opened, corpora).data.values():
            for name, part in parts_of(data).items():
                label = {"stage": stage.name, "corpus": name or next(iter(readers))}
                examples.append(label | example_statistics(part, rows))
    return {
        "corpora": {name: corpus_statistics(reader, top) for name, reader in readers.items()},
        "examples": examples,
    }


# ---------------------------------------------------------------- text


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    out = []
    for name, found in report["corpora"].items():
        out += [f"corpus {name}", *_corpus_lines(found)]
    out.append("examples")
    return out + [_example_line(found) for found in report["examples"]]


def _corpus_lines(found: dict[str, Any]) -> list[str]:
    unknown = "none in the vocabulary" if found["unknown_share"] is None else f"{found['unknown_share']:.3%} of tokens"
    out = [
        f"  documents   {found['documents']:,}, {found['held_out_documents']:,} of them held out",
        f"  tokens      {found['tokens']:,} of {found['bytes']:,} bytes",
        f"  lengths     {_spread_text(found['document_tokens'])} tokens a document",
        f"  sentences   {found['sentences']:,}; {_spread_text(found['sentence_tokens'])} tokens each",
        f"  unknown     {unknown}",
        f"  duplicates  {found['duplicate_share']:.3%} of documents",
    ]
    if found["languages"]:
        out.append(f"  languages   {_shares(found['languages'])}")
    out.append(f"  sources     {_shares(found['sources'])}")
    tokens = ", ".join(f"{row['token']} {row['share']:.2%}" for row in found["top_tokens"])
    out.append(f"  top tokens  {tokens}")
    widest = max(found["document_tokens"]["histogram"].values(), default=1)
    for edge, count in found["document_tokens"]["histogram"].items():
        out.append(f"  {edge:>8,}+ {count:>10,} {'#' * round(40 * count / widest)}")
    return out


def _spread_text(found: dict[str, Any]) -> str:
    return f"{found['median']:,} (p10 {found['p10']:,}, p90 {found['p90']:,}, max {found['max']:,})"


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def _example_line(found: dict[str, Any]) -> str:
    stage = f"stage {found['stage']}, " if "stage" in found else ""
    begin = f"  {stage}{found['corpus']}: {found['examples']} of {found['sequence_length']}"
    if "left_out" in found:
        return f"{begin}: not possible: {found['left_out']}"
    parts = [
        f"{found['rows_per_epoch']:,} rows an epoch",
        f"padding {found['padding_share']:.2%}",
        f"efficiency {found['packing_efficiency']:.2%}",
    ]
    if "masked_share" in found:
        split = "/".join(f"{share:.3f}" for share in found["masks"].values())
        parts.append(f"masked {found['masked_share']:.2%} (mask/random/kept {split})")
    if "random_next_share" in found:
        why = f"{found['one_sentence_share']:.2%} of the pairs are of one sentence, which nothing follows"
        parts.append(f"random next {found['random_next_share']:.2%} ({why})")
    if "swapped_share" in found:
        parts.append(f"swapped {found['swapped_share']:.2%}")
    if found.get("segments_per_row", 1) > 1:
        parts.append(f"{found['segments_per_row']:.2f} segments a row")
    return f"{begin}: {', '.join(parts)}"


# ---------------------------------------------------------------- picture


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws lengths, frequent tokens and the shares of the examples to a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib; run: pip install 'bertgpt_jax[viz]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (lengths, tokens, shares) = plt.subplots(1, 3, figsize=(18, 4.8))
    for name, found in report["corpora"].items():
        for what, style in (("document_tokens", "-o"), ("sentence_tokens", "--s")):
            histogram = found[what]["histogram"]
            label = f"{name}: {what.removesuffix('_tokens')}s"
            lengths.plot([max(int(edge), 0.5) for edge in histogram], list(histogram.values()), style, label=label)
        rows = found["top_tokens"]
        tokens.plot([row["token"].replace("$", r"\$") for row in rows], [row["share"] for row in rows], "o", label=name)
    lengths.set(xscale="log", yscale="log", xlabel="tokens (lower edge)", ylabel="count", title="lengths")
    tokens.set(yscale="log", title="share of the most frequent tokens")
    tokens.tick_params(axis="x", rotation=90)
    made = [found for found in report["examples"] if "left_out" not in found]
    for offset, name in enumerate(("padding_share", "masked_share", "random_next_share", "swapped_share")):
        places = [i + 0.27 * (min(offset, 2) - 1) for i, found in enumerate(made) if name in found]
        shares.barh(places, [found[name] for found in made if name in found], 0.25, label=name.replace("_", " "))
    labels = [" ".join(filter(None, (f.get("stage"), f["corpus"], f["examples"]))) for f in made]
    shares.set_yticks(range(len(made)), labels, fontsize=8)
    shares.set(title="examples", xlim=(0, 1))
    for panel in (lengths, tokens, shares):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

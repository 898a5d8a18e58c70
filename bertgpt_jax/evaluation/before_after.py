"""What continued pretraining changed: held-out losses before and after, on the run's own text and on a general one."""

from __future__ import annotations

import math

import jax

from bertgpt_jax.corpus.kinds import load_tokenizer
from bertgpt_jax.corpus.mixture import CorpusMixture
from bertgpt_jax.evaluation.parameters import corpus_for, evaluate_params, source_params
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import setup, storage
from bertgpt_jax.training.run_config import execution_here, with_changes
from bertgpt_jax.training.workdir import cache_root, open_run_corpus
from bertgpt_jax.transfer.initial import Initial, begun_config
from bertgpt_jax.transfer.load import open_source

FILE = "before_after.json"


def compare(workdir_text: str, initial: Initial) -> list[str]:
    """Evaluates the parameters a run began from and its best ones; the lines of a table, also kept as JSON.

    The general text is `execution.general_text`; without one there is the run's own text only.
    """
    workdir = storage.workdir_path(workdir_text)
    config = begun_config(workdir_text)
    mesh = make_mesh(MeshConfig())
    execution = execution_here(config)
    program = setup.make_program(with_changes(config, {"execution": execution}), mesh)
    after = open_source(workdir_text, "best")
    params = {
        "before": jax.device_get(initial.place(program.init()["params"])),
        "after": source_params(after),
    }
    own = open_run_corpus(config, workdir)
    corpora = {"domain": own.first if isinstance(own, CorpusMixture) else own}
    if config.execution.general_text:
        tokenizer = load_tokenizer(str(workdir / "tokenizer"))
        corpora["general"] = corpus_for(tokenizer, config.execution.general_text, cache_root(workdir), str(workdir))
    stage, limit = config.stages[-1].name, config.execution.eval_batches
    table = {
        text: {when: evaluate_params(config, stage, tree, corpus, limit)[0] for when, tree in params.items()}
        for text, corpus in corpora.items()
    }
    tree = {"from": initial.label, "to": after.label, "stage": stage, "losses": table}
    storage.write_json(workdir / FILE, tree)
    lines = [f"held out, before ({initial.label}) and after (step {after.step:,}):"]
    lines.append(f"  {'text':10} {'metric':16} {'before':>12} {'after':>12}")
    for text, both in table.items():
        for name, value in both["before"].items():
            if math.isfinite(value):
                lines.append(f"  {text:10} {name:16} {value:>12.4f} {both['after'][name]:>12.4f}")
    return [*lines, f"  kept in {workdir / FILE}"]

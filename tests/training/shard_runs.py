"""One process of several: saves a state that is split over all of them, restores it, and counts the bytes of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import tensorstore
from etils import epath

from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel import distributed
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.parallel.sharding import flatten
from bertgpt_jax.training.checkpoint import Checkpoints, restore
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig
from bertgpt_jax.training.setup import make_program

FILES = "/tensorstore/kvstore/file/"


def run_config(mesh: dict[str, int]) -> RunConfig:
    """A GPT of 1.7M parameters: a state of 21 MB with the moments."""
    model = GptConfig(
        vocab_size=512, max_positions=64, num_layers=2, hidden_size=256, num_heads=8, intermediate_size=1024
    )
    return RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=model,
        objective=CausalLM(),
        stages=(StageConfig(steps=1, sequence_length=64, batch_size=8),),
        execution=ExecutionConfig(mesh=MeshConfig(**{"data": 1} | mesh)),
    )


def counted() -> dict[str, int]:
    """Bytes of files that TensorStore has read and written in this process, and all that the process has read."""
    found = dict.fromkeys(("bytes_read", "bytes_written"), 0)
    for metric in tensorstore.experimental_collect_matching_metrics(FILES):
        name = metric["name"].removeprefix(FILES)
        if name in found:
            found[name] += sum(value["value"] for value in metric["values"])
    lines = Path("/proc/self/io").read_text().splitlines()
    return found | {"all_read": next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))}


def since(before: dict[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in counted().items()}


def held(state: dict) -> dict[str, list[np.ndarray]]:
    return {path: [np.asarray(shard.data) for shard in x.addressable_shards] for path, x in flatten(state).items()}


def main(mesh: str, workdir: str, results: str) -> None:
    """Args: JSON of the mesh, where to save, a directory for this process's counts."""
    distributed.initialize(distributed.from_environment(distributed.DistributedConfig()), {})
    config = run_config(json.loads(mesh))
    program = make_program(config, make_mesh(config.execution.mesh))
    state = program.init()
    checkpoints = Checkpoints(epath.Path(workdir), 1)

    before = counted()
    assert checkpoints.save(state, 1, {"metrics": {}})
    checkpoints.wait()
    saved = since(before)

    before = counted()
    found, _ = restore(epath.Path(workdir), program.abstract_state, 1)
    restored = since(before)
    checkpoints.close()

    pairs = zip(jax.tree.leaves(held(state)), jax.tree.leaves(held(found)), strict=True)
    counts = {
        "state": sum(x.nbytes for x in flatten(state).values()),
        "saved": saved,
        "restored": restored,
        "same": all(np.array_equal(one, other) for one, other in pairs),
    }
    (Path(results) / f"{jax.process_index()}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])

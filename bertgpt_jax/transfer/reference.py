"""Runs another implementation over an exported directory, in a process of its own: `python -m ... DIR IN OUT KIND N`.

IN is an npz with the batch, OUT gets hidden states, logits and loss. KIND is `transformers` (needs torch) or `numpy`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bertgpt_jax.errors import DataError, UserError
from bertgpt_jax.transfer import numpy_reference
from bertgpt_jax.transfer.numpy_reference import Outputs
from bertgpt_jax.transfer.tensors import TensorFiles, read_json


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    directory, batch_file, out, kind, layers = Path(argv[0]), argv[1], argv[2], argv[3], int(argv[4])
    with np.load(batch_file, allow_pickle=False) as data:
        batch = {name: data[name] for name in data.files}
    run = with_transformers if kind == "transformers" else with_numpy
    try:
        outputs = run(directory, batch, layers)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    save_outputs(outputs, Path(out))
    return 0


def with_numpy(directory: Path, batch: dict[str, np.ndarray], layers: int) -> Outputs:
    """The NumPy reference."""
    files = TensorFiles(directory)
    return numpy_reference.forward(read_json(directory / "config.json"), files.read, batch, layers)


def with_transformers(directory: Path, batch: dict[str, np.ndarray], layers: int) -> Outputs:
    """The class that config.json names, loaded offline and without flags.

    Raises:
        DataError: it reports missing, unexpected or mismatched keys.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(directory)
    depth = config.num_hidden_layers
    settings: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if layers < depth:
        config.num_hidden_layers = layers
        settings["config"] = config
    model, report = getattr(transformers, config.architectures[0]).from_pretrained(directory, **settings)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if layers < depth:  # the layers left out are then unexpected
        wrong.pop("unexpected_keys", None)
    if wrong:
        raise DataError(f"transformers {transformers.__version__} loads '{directory}' with {wrong}")
    ids = {name: torch.tensor(array.astype(np.int64)) for name, array in batch.items()}
    inputs: dict[str, Any] = {"input_ids": ids["tokens"], "labels": ids["labels"], "output_hidden_states": True}
    if "types" in batch:
        inputs |= {"attention_mask": ids["attention"], "token_type_ids": ids["types"]}
    pairs = config.architectures[0] == "BertForPreTraining"
    if pairs:
        inputs["next_sentence_label"] = ids["next_labels"]
    with torch.no_grad():
        out = model.eval()(**inputs)
    logits = out.prediction_logits if pairs else out.logits
    return Outputs(
        [state.numpy() for state in out.hidden_states],
        logits.numpy(),
        out.seq_relationship_logits.numpy() if pairs else None,
        float(out.loss),
    )


def save_outputs(outputs: Outputs, path: Path) -> None:
    """Writes them as an npz."""
    arrays = {f"hidden_{i}": array for i, array in enumerate(outputs.hidden)}
    if outputs.next_logits is not None:
        arrays["next_logits"] = outputs.next_logits
    np.savez(path, logits=outputs.logits, loss=np.float64(outputs.loss), **arrays)


def load_outputs(path: Path) -> Outputs:
    """What `save_outputs` wrote."""
    with np.load(path, allow_pickle=False) as data:
        hidden = [data[f"hidden_{i}"] for i in range(sum(name.startswith("hidden_") for name in data.files))]
        next_logits = data["next_logits"] if "next_logits" in data.files else None
        return Outputs(hidden, data["logits"], next_logits, float(data["loss"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

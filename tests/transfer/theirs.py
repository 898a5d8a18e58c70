"""What transformers says of an exported directory, in a process that imports nothing of ours: DIR BATCHES.npz -> JSON.

BATCHES.npz holds the held-out batches of an evaluation (`kind`, and `N/name` arrays) and perhaps `prompt` ids.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

IGNORED = -100


def main(directory: str, batches_file: str) -> None:
    torch.set_num_threads(2)
    config = transformers.AutoConfig.from_pretrained(directory)
    cls = getattr(transformers, config.architectures[0])
    model, report = cls.from_pretrained(directory, output_loading_info=True)
    model.eval()
    data = np.load(batches_file)
    count = 1 + max(int(name.partition("/")[0]) for name in data.files if "/" in name)
    batches = [{n.partition("/")[2]: data[n] for n in data.files if n.startswith(f"{i}/")} for i in range(count)]
    losses = decoder_loss(model, batches) if "targets" in batches[0] else encoder_loss(model, batches)
    result = {"losses": losses, "report": {kind: len(keys) for kind, keys in report.items()}}
    if "prompt" in data.files:
        prompt = torch.tensor(data["prompt"].astype(np.int64))[None]
        settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        result["continuation"] = out[0, prompt.shape[1] :].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    result["tokens"] = tokenizer("To be, or not to be", add_special_tokens=False)["input_ids"]
    print(json.dumps(result))


def summed(logits, labels) -> float:
    return float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))


def decoder_loss(model, batches) -> dict[str, float]:
    total = weight = 0.0
    for batch in batches:
        with torch.no_grad():
            logits = model(torch.tensor(batch["tokens"].astype(np.int64))).logits
        scored = torch.tensor(batch["weights"] > 0)
        total += summed(logits[scored], torch.tensor(batch["targets"].astype(np.int64))[scored])
        weight += int(scored.sum())
    return {"loss": total / weight}


def encoder_loss(model, batches) -> dict[str, float]:
    sums = {"mlm": [0.0, 0], "nsp": [0.0, 0]}
    for batch in batches:
        ids = {n: torch.tensor(batch[n].astype(np.int64)) for n in batch if not n.endswith("weights")}
        with torch.no_grad():
            out = model(ids["tokens"], attention_mask=ids["segments"], token_type_ids=ids["types"])
        rows = torch.arange(len(ids["tokens"]))[:, None]
        scored, real = torch.tensor(batch["mask_weights"] > 0), torch.tensor(batch["next_weights"] > 0)
        logits = out.prediction_logits[rows, ids["mask_positions"]]
        for name, more, count in (
            ("mlm", summed(logits[scored], ids["mask_labels"][scored]), int(scored.sum())),
            ("nsp", summed(out.seq_relationship_logits[real], ids["next_labels"][real]), int(real.sum())),
        ):
            sums[name] = [sums[name][0] + more, sums[name][1] + count]
    parts = {f"{name}_loss": total / count for name, (total, count) in sums.items()}
    return {"loss": sum(parts.values()), **parts}


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Copies random weights of the transformers models into ours: layout only, no numbers change."""

from __future__ import annotations

import numpy as np
import pytest


class Names:
    """Reads a torch state dict (or gradients) by name, as float32 NumPy arrays, and knows what was never read."""

    def __init__(self, tensors: dict) -> None:
        self.arrays = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in tensors.items()}
        self.unread = set(self.arrays)

    def __call__(self, name: str) -> np.ndarray:
        self.unread.discard(name)
        return self.arrays[name]

    def linear(self, name: str) -> dict:
        """torch.nn.Linear: weight [out, in]."""
        return {"kernel": self(name + ".weight").T, "bias": self(name + ".bias")}

    def norm(self, name: str) -> dict:
        return {"scale": self(name + ".weight"), "bias": self(name + ".bias")}


def stacked(layers: list[dict]) -> dict:
    import jax

    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def split_heads(kernel: np.ndarray, bias: np.ndarray, heads: int) -> dict:
    """[D, D] -> [D, N, H] and [D] -> [N, H]."""
    return {"kernel": kernel.reshape(len(kernel), heads, -1), "bias": bias.reshape(heads, -1)}


def join_heads(kernel: np.ndarray, bias: np.ndarray, heads: int) -> dict:
    """[D, D] -> [N, H, D]."""
    return {"kernel": kernel.reshape(heads, -1, kernel.shape[1]), "bias": bias}


def bert_params(names: Names, layers: int, heads: int) -> dict:
    """Our parameter tree of a `BertForPreTraining`."""

    def layer(i: int) -> dict:
        prefix = f"bert.encoder.layer.{i}."
        attention = {
            part: split_heads(**names.linear(f"{prefix}attention.self.{part}"), heads=heads)
            for part in ("query", "key", "value")
        }
        return {
            "attention": attention
            | {"output": join_heads(**names.linear(f"{prefix}attention.output.dense"), heads=heads)},
            "attention_norm": names.norm(f"{prefix}attention.output.LayerNorm"),
            "feed_forward": {
                "up": names.linear(f"{prefix}intermediate.dense"),
                "down": names.linear(f"{prefix}output.dense"),
            },
            "feed_forward_norm": names.norm(f"{prefix}output.LayerNorm"),
        }

    embeddings = "bert.embeddings."
    return {
        "token_embedding": {"table": names(embeddings + "word_embeddings.weight")},
        "position_embedding": {"table": names(embeddings + "position_embeddings.weight")},
        "type_embedding": {"table": names(embeddings + "token_type_embeddings.weight")},
        "embedding_norm": names.norm(embeddings + "LayerNorm"),
        "layers": stacked([layer(i) for i in range(layers)]),
        "masked_transform": names.linear("cls.predictions.transform.dense"),
        "masked_norm": names.norm("cls.predictions.transform.LayerNorm"),
        "masked_bias": names("cls.predictions.bias"),
        "pooler": names.linear("bert.pooler.dense"),
        "next_sentence": names.linear("cls.seq_relationship"),
    }


def gpt_params(names: Names, layers: int, heads: int) -> dict:
    """Our tree of a `GPT2LMHeadModel`: its Conv1D weights are [in, out], its q, k and v are one matrix."""

    def layer(i: int) -> dict:
        prefix = f"transformer.h.{i}."

        def conv(name: str) -> dict:
            return {"kernel": names(f"{prefix}{name}.weight"), "bias": names(f"{prefix}{name}.bias")}

        fused = conv("attn.c_attn")
        kernels, biases = np.split(fused["kernel"], 3, axis=1), np.split(fused["bias"], 3)
        attention = {
            part: split_heads(kernel, bias, heads)
            for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        return {
            "attention": attention | {"output": join_heads(**conv("attn.c_proj"), heads=heads)},
            "attention_norm": names.norm(prefix + "ln_1"),
            "feed_forward": {"up": conv("mlp.c_fc"), "down": conv("mlp.c_proj")},
            "feed_forward_norm": names.norm(prefix + "ln_2"),
        }

    return {
        "token_embedding": {"table": names("transformer.wte.weight")},
        "position_embedding": {"table": names("transformer.wpe.weight")},
        "layers": stacked([layer(i) for i in range(layers)]),
        "final_norm": names.norm("transformer.ln_f"),
    }


class Parity:
    """What the tests of this folder share."""

    Names = Names
    bert_params = staticmethod(bert_params)
    gpt_params = staticmethod(gpt_params)

    @staticmethod
    def randomize(module, seed: int) -> None:
        """Every parameter random, norms and biases included: zeros and ones would hide a wrong place."""
        import torch

        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                is_scale = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if is_scale else 0.0))

    @staticmethod
    def assert_gradients(ours: dict, theirs: dict) -> float:
        """|a - b| <= 1e-4 max(|b|, 1e-3 of the global norm) in L2, per tensor; returns the worst ratio to the bound."""
        from bertgpt_jax.parallel.sharding import flatten

        ours, theirs = flatten(ours), flatten(theirs)
        assert ours.keys() == theirs.keys()
        total = np.sqrt(sum(np.sum(np.square(b, dtype=np.float64)) for b in theirs.values()))
        worst = 0.0
        for name, b in theirs.items():
            error = np.linalg.norm(np.asarray(ours[name], np.float64) - b)
            bound = 1e-4 * max(np.linalg.norm(b), 1e-3 * total)
            assert error <= bound, f"{name}: {error} > {bound}"
            worst = max(worst, error / bound)
        return worst


@pytest.fixture(scope="session")
def parity() -> type[Parity]:
    return Parity

"""Pretraining of BERT- and GPT-family models in JAX: raw text in, checkpoints out, on one device or a pod."""

__version__ = "0.1.0"

"""Pretrains a model; the code is bertgpt_jax/commands/train.py."""

from bertgpt_jax.commands.common import leave
from bertgpt_jax.commands.train import main

if __name__ == "__main__":
    leave(main())

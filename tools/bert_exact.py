"""Writes BERT's original training instances; the code is bertgpt_jax/commands/bert_exact.py."""

import sys

from bertgpt_jax.commands.bert_exact import main

if __name__ == "__main__":
    sys.exit(main())

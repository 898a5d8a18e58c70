"""The commands: each module has `main(argv) -> exit code`, imports jax only when it runs, and is called by tools/ and cli."""

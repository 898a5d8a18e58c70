"""The commands: each module has `main(argv) -> exit code` and imports jax only when it runs."""

"""From a config to a trained state: optimizers, the step, checkpoints, metrics, the loop."""

"""Numbers about a model: held-out loss and what follows from it."""

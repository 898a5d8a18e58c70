"""Whether a run fits and how fast it would be, on chips that need not be here: the real step compiled, and a model."""

"""From a tokenised corpus to batch n: a pure function of (config, corpus, seed, n), in NumPy."""

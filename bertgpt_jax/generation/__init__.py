"""Text from trained models: decoders with a cache, sampling, beam search; filling masks and what it cannot do."""

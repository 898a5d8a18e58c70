"""Parameters that leave and come in: Hugging Face directories, npz, StableHLO; each export proves itself."""

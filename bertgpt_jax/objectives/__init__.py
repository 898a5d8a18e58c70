"""Training objectives: each names the host half that makes its examples and holds the device half, its loss."""

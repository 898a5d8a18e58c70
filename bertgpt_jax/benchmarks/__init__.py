"""Speeds, each measured beside a peer in the same process: one harness, one file a benchmark."""

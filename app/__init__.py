"""The HTTP service: predict, attack and evaluate with one checkpoint."""

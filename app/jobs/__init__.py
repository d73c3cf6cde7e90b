"""Evaluation jobs: the records, where they are stored, and who runs them."""

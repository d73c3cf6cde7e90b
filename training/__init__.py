"""The two-phase training pipeline."""

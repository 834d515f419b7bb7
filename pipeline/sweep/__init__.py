"""Hyperparameter sweeps: `python -m pipeline.sweep FILE` runs a W&B sweep file without W&B. Imports training/ and lower rooms."""

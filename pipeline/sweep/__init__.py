"""Hyper-parameter sweeps, `python -m pipeline.sweep FILE`: a W&B sweep file run without W&B. It imports training and below."""

"""Benchmarks, `python -m pipeline.benchmark COMMAND`: what the parts of a run cost, beside the bare loop and the peers."""

"""Benchmarks: `python -m pipeline.benchmark COMMAND` times the parts of a run and compares them with a bare loop and peers."""

"""The report on runs, `python -m pipeline.report`: curves, comparisons, sweeps, efficiency. It imports inference and below."""

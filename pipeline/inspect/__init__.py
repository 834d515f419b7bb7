"""Inspection of a dataset before training: `python -m pipeline.inspect`. Imports inference/, pages/ and lower rooms."""

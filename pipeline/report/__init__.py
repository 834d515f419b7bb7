"""Reports on runs: `python -m pipeline.report` writes tables and figures. Imports inference/, pages/ and lower rooms."""

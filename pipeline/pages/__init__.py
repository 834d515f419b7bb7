"""Self-contained pages: blocks, figures in one style, contact sheets, rendering as HTML and Markdown. Imports common only."""

"""Draws the figures of a page and collects their files."""

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.pages.blocks import Figure
from pipeline.pages.figure_style import STYLE, png_and_svg
from pipeline.pages.fonts import families_for


class Drawing:
    """Draws figures in the pages' style, with the font families for the texts, and collects their files."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.families = families_for(texts)
        self.files: dict[str, bytes] = {}

    def figure(self, stem: str, alt: str, draw: Callable[[], Any]) -> Figure | str | None:
        """Saves the figure that draw returns as files with this stem; a sentence or None is returned unchanged."""
        import matplotlib

        with matplotlib.rc_context(STYLE | {"font.family": self.families}):
            drawn = draw()
            if drawn is None or isinstance(drawn, str):
                return drawn
            contents = png_and_svg(drawn)
        self.files |= {f"{stem}.{ending}": content for ending, content in contents.items()}
        return Figure(stem, alt, contents["svg"])

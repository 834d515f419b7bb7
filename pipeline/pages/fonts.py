"""Fonts of the figures: installed fonts for characters that the default font lacks, and escapes for those that none has."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = "DejaVu Sans"  # matplotlib contains it
NO_TEXT_FONTS = ("Last Resort", "cm", "STIXNonUni", "STIXSize")  # placeholders, and mathematical symbols in their own order

# a family without bold letters draws bold text with its normal ones, which matplotlib reports for each text
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


def families_for(texts: Iterable[str]) -> list[str]:
    """The font families for the texts: the default, then installed ones that have characters that it lacks.

    matplotlib draws each character with the first family that has it
    (https://matplotlib.org/stable/users/explain/text/fonts.html#font-fallback).
    """
    from matplotlib.font_manager import fontManager

    families = [DEFAULT]
    missing = undrawable("".join(texts), families)
    if missing:
        add_new_fonts()
        names = sorted({entry.name for entry in fontManager.ttflist if not entry.name.startswith(NO_TEXT_FONTS)})
        available = {name: missing & characters_of(name) for name in names}
        while missing:
            best = max(names, key=lambda name: (len(missing & available[name]), "Sans" in name))
            if not missing & available[best]:
                break
            families.append(best)
            missing -= available[best]
    return families


def undrawable(text: str, families: Sequence[str]) -> set[str]:
    """The characters of the text that none of the font families has."""
    found = {character for character in text if not character.isspace()}
    for family in families:
        if found:
            found -= characters_of(family)
    return found


def characters_of(family: str) -> frozenset[str]:
    """The characters of a font family, normal and bold; empty if it is not installed or its file is damaged."""
    from matplotlib.font_manager import FontProperties, findfont

    try:
        properties = [FontProperties(family=[family], weight=weight) for weight in ("normal", "bold")]
        normal, bold = (characters_in(findfont(each, fallback_to_default=False)) for each in properties)
        return normal & bold
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.lru_cache(maxsize=None)
def characters_in(font_path: Any) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    return frozenset(map(chr, get_font(font_path).get_charmap()))


def add_new_fonts() -> None:
    """Adds the fonts that were installed since matplotlib wrote its list of fonts."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        try:
            fontManager.addfont(path)
        except (OSError, RuntimeError, NotImplementedError):  # damaged, or a bitmap font
            continue


def escape_undrawable(figure: Figure) -> None:
    """Replaces characters of the figure's texts that their font families lack, which are drawn as equal boxes, by escapes."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        locator = axis.get_major_locator()
        if isinstance(locator, FixedLocator):  # the formatter sets the texts again when they are drawn
            texts = axis.get_major_formatter().format_ticks(list(locator()))
            shown = [escaped(text, label.get_fontfamily()) for text, label in zip(texts, axis.get_ticklabels())]
            if shown != texts:
                axis.set_ticklabels(shown)
    for text in figure.findobj(Text):
        text.set_text(escaped(text.get_text(), text.get_fontfamily()))


def escaped(text: str, families: Sequence[str]) -> str:
    """The text with escapes for the characters that none of the font families has."""
    return text.translate({ord(each): each.encode("unicode_escape").decode() for each in undrawable(text, families)})

"""Names in any script in the figures of a report: an installed font draws them, or the figures show numbers or escapes."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import font_manager, rc_context
from matplotlib.font_manager import fontManager
from test_report import write_run, write_summary

from pipeline.pages.blocks import Figure
from pipeline.pages.figure_style import STYLE, new_figure, png_and_svg
from pipeline.pages.fonts import DEFAULT, families_for, undrawable
from pipeline.report import content
from pipeline.report.read_runs import RunRecord, read_run

CAT, DOG = "\u732b", "\u72d7"
ADVANCE = 1000  # units of the font's em


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without other fonts."""
    monkeypatch.setattr(fontManager, "ttflist", [entry for entry in fontManager.ttflist if entry.name == DEFAULT])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


def make_font(path: Path, characters: str) -> str:
    """A font in which each of the characters is a full square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = [".notdef", *(f"uni{ord(each):04X}" for each in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(ADVANCE, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(each): name for each, name in zip(characters, names[1:])})
    font.setupGlyf({name: square for name in names})
    font.setupHorizontalMetrics({name: (ADVANCE, 0) for name in names})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular", "psName": "Squares"})
    font.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    font.setupPost()
    font.save(path)
    return str(path)


def chinese_run(folder: Path) -> RunRecord:
    write_run(folder, (0.9,))
    test = {
        "accuracy": 0.75, "num_samples": 4, "confusion_matrix": [[2, 0], [1, 1]],
        "per_class_accuracy": {CAT: 1.0, DOG: 0.5},
    }  # fmt: skip
    write_summary(folder, (0.9,), test=test)
    assert json.loads((folder / "summary.json").read_text())["test"] == test
    return read_run(folder)


def shown_section(folder: Path) -> tuple[content.Drawing, list[str], list[str]]:
    """The section on the test of a run with Chinese classes: its drawing, the stems of its figures, its sentences."""
    run = chinese_run(folder)
    drawing = content.Drawing(content.shown_texts([run], run))
    blocks = content.test_section(run, drawing).blocks
    return (
        drawing, [block.stem for block in blocks if isinstance(block, Figure)], [each for each in blocks if isinstance(each, str)]
    )  # fmt: skip


@pytest.mark.filterwarnings("error:.*[Gg]lyph")
def test_without_a_font_for_chinese_classes_the_figures_show_numbers_and_a_list_below(only_dejavu, tmp_path: Path):
    drawing, figures, sentences = shown_section(tmp_path / "run")
    assert drawing.families == [DEFAULT] and figures == ["confusion_matrix", "classes"]
    assert [sentence.split(".")[0] for sentence in sentences] == [f"Classes by number: 0 {CAT}, 1 {DOG}"]
    assert "no installed font has the characters" in sentences[0]


@pytest.mark.filterwarnings("error:.*[Gg]lyph")
def test_an_installed_font_that_has_the_characters_is_used(only_dejavu, monkeypatch, tmp_path: Path):
    """The font was installed after matplotlib wrote its list of fonts."""
    font = make_font(tmp_path / "squares.ttf", CAT + DOG)
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "damaged.ttf"), font])
    drawing, figures, sentences = shown_section(tmp_path / "run")
    assert drawing.families == [DEFAULT, "Squares"] and figures == ["confusion_matrix", "classes"]
    assert sentences == []
    assert all(b'id="Squares-' in drawing.files[f"{stem}.svg"] for stem in figures)


def test_axes_that_show_numbers_for_many_classes_have_a_list_of_the_names_below(tmp_path: Path):
    names = [f"class-{place:02d}" for place in range(41)]
    matrix = [[int(row == column) + (row == 0) for column in range(41)] for row in range(41)]
    write_run(tmp_path / "run", (0.9,))
    test: dict[str, Any] = {"accuracy": 0.5, "num_samples": 82}
    for count, listed in ((41, True), (40, False)):
        test["confusion_matrix"] = [row[:count] for row in matrix[:count]]
        test["per_class_accuracy"] = dict.fromkeys(names[:count], 0.5)
        write_summary(tmp_path / "run", (0.9,), test=test)
        run = read_run(tmp_path / "run")
        blocks = content.test_section(run, content.Drawing(content.shown_texts([run], run))).blocks
        sentences = [each for each in blocks if isinstance(each, str) and each.startswith("Classes by number")]
        assert sentences == [f"Classes by number: {', '.join(f'{n} {name}' for n, name in enumerate(names))}."] * listed


def test_fonts_are_added_only_for_characters_that_the_default_lacks(only_dejavu):
    assert families_for(["cat", "\u00e9\u0436", "x\ty\n"]) == [DEFAULT]
    assert undrawable(f"a {CAT}\n", [DEFAULT]) == {CAT} and undrawable("a", ["no such font"]) == {"a"}


@pytest.mark.filterwarnings("error:.*[Gg]lyph")
def test_other_texts_are_escaped_where_no_font_has_their_characters(only_dejavu):
    with rc_context(STYLE):
        figure, axes = new_figure(f"Test of {CAT}-1")
        axes.set_yticks([0, 1], [CAT, "dog"])
        png_and_svg(figure)
    assert figure.get_suptitle() == "Test of \\u732b-1"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["\\u732b", "dog"]

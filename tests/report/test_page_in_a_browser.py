"""The report's page in Chromium: tables sort, the switch changes the axis, a run lights up; nothing is fetched, no error."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import HOSTILE, write_run

from pipeline.report.__main__ import main

pytest.importorskip("selenium.webdriver")
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

pytestmark = pytest.mark.slow

RANKED = ["adamw-0", "sgd-0", "muon-0", HOSTILE]  # the last one has not ended
AXES = ["epoch", "step", "time"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report on four runs: their times sort otherwise by their words ("1 min 15 s", "4.0 s", "50 s") than by their length."""
    folder = tmp_path_factory.mktemp("some") / "runs"
    write_run(folder / "sgd-0", (0.5, 0.8))
    write_run(folder / "adamw-0", (0.4, 0.6, 0.95), optimizer="adamw", lr=1e-3)
    write_run(folder / "muon-0", (0.4, 0.6, 0.7, 0.75), optimizer="muon", lr=1e-5)
    write_run(folder / HOSTILE, (0.3,), summary=False, epochs=10)
    assert main([str(folder), "--output", str(folder.parent / "report")]) == 0
    return Path(folder.parent / "report" / "report.html").as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, just loaded; after the test, the browser's console holds no message."""
    browser.get("about:blank")
    browser.get_log("browser")  # late messages of another page
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []


def ranking(page: Any, heading: str = "run") -> list[str]:
    """The texts of a column of the ranking, from top to bottom."""
    table = page.find_element(By.ID, "table-ranking")
    headings = [cell.text for cell in table.find_elements(By.TAG_NAME, "th")]
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [row.find_elements(By.TAG_NAME, "td")[headings.index(heading)].text for row in rows]


def heading(page: Any, text: str) -> Any:
    (button,) = page.find_elements(By.XPATH, f"//table[@id='table-ranking']//th/button[normalize-space()='{text}']")
    return button


def sort_by(page: Any, text: str) -> str | None:
    """Clicks on a heading of the ranking; returns the order that it then announces."""
    heading(page, text).click()
    announced = page.find_elements(By.CSS_SELECTOR, "#table-ranking th[aria-sort]")
    assert [cell.text for cell in announced] == [text]
    return announced[0].get_attribute("aria-sort")


def test_a_click_on_a_heading_sorts_by_value_and_another_the_other_way(page):
    assert ranking(page) == RANKED
    assert sort_by(page, "time") == "descending"
    assert ranking(page, "time") == ["1 min 40 s", "1 min 15 s", "50 s", "4.0 s"]
    assert ranking(page) == ["muon-0", "adamw-0", "sgd-0", HOSTILE]
    assert sort_by(page, "time") == "ascending"
    assert ranking(page, "time") == ["4.0 s", "50 s", "1 min 15 s", "1 min 40 s"]
    assert sort_by(page, "lr") == "descending"
    assert [float(text) for text in ranking(page, "lr")] == [0.1, 0.1, 1e-3, 1e-5]
    assert sort_by(page, "lr") == "ascending"
    assert [float(text) for text in ranking(page, "lr")] == [1e-5, 1e-3, 0.1, 0.1]
    assert sort_by(page, "run") == "ascending"
    assert ranking(page) == sorted(RANKED)


def test_rows_without_a_value_stay_last_both_ways(page):
    assert [sort_by(page, "rank"), ranking(page, "rank")] == ["descending", ["3", "2", "1", "-"]]
    assert [sort_by(page, "rank"), ranking(page, "rank")] == ["ascending", ["1", "2", "3", "-"]]


def test_a_heading_is_sorted_by_the_keyboard_too(page):
    heading(page, "validation accuracy").send_keys(Keys.ENTER)
    assert ranking(page, "validation accuracy") == ["95.00 %", "80.00 %", "75.00 %", "30.00 %"]
    heading(page, "validation accuracy").send_keys(Keys.ENTER)
    assert ranking(page) == [HOSTILE, "muon-0", "sgd-0", "adamw-0"]


def test_the_switch_shows_the_curves_over_the_axis_that_is_chosen_and_hides_the_others(page):
    (switch,) = page.find_elements(By.CSS_SELECTOR, ".switch")
    assert switch.is_displayed()
    choices = {each.get_attribute("value"): each for each in switch.find_elements(By.TAG_NAME, "input")}
    assert list(choices) == AXES and choices["epoch"].is_selected()
    for axis in ["epoch", "step", "time", "epoch"]:
        choices[axis].click()
        shown = {each: page.find_elements(By.CSS_SELECTOR, f"[data-axis={each}] svg") for each in AXES}
        assert {len(figures) for figures in shown.values()} == {3}  # accuracy, loss, learning rate
        assert {each: {figure.is_displayed() for figure in figures} for each, figures in shown.items()} == {
            each: {each == axis} for each in AXES
        }


def row_of(page: Any, run: str) -> Any:
    return page.find_elements(By.CSS_SELECTOR, "#table-ranking tbody tr")[ranking(page).index(run)]


def opacities(page: Any) -> dict[str, set[str]]:
    """How strongly the lines of each run are drawn in the figures, by the run's name."""
    names = {row_of(page, run).get_attribute("data-run"): run for run in RANKED}
    drawn: dict[str, set[str]] = {run: set() for run in RANKED}
    for number, opacity in page.execute_script(
        "return Array.from(document.querySelectorAll('svg [data-run]'))"
        ".map(line => [line.dataset.run, getComputedStyle(line).opacity])"
    ):
        drawn[names[number]].add(opacity)
    return drawn


def lit(page: Any) -> set[str]:
    """The runs whose lines are drawn in full while all others are faint; none where all are drawn alike."""
    drawn = opacities(page)
    assert all(len(strengths) == 1 for strengths in drawn.values()), drawn
    strong = {run for run, strengths in drawn.items() if strengths == {"1"}}
    return set() if strong == set(RANKED) else strong


def test_pointing_at_a_run_lights_it_up_in_every_figure(page):
    assert lit(page) == set()
    pointer = ActionChains(page, duration=0)
    for run in ("muon-0", HOSTILE):
        pointer.move_to_element(row_of(page, run)).perform()
        assert lit(page) == {run}
        plain, hot = (row_of(page, each).value_of_css_property("background-color") for each in ("sgd-0", run))
        assert plain != hot
    pointer.move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert lit(page) == set()


def test_a_line_of_a_figure_lights_its_run_up(page):
    number = row_of(page, "muon-0").get_attribute("data-run")
    line = page.find_element(By.CSS_SELECTOR, f"[data-axis=epoch] svg [data-run='{number}']")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", line)
    page.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", line)
    assert lit(page) == {"muon-0"} and "hot" in row_of(page, "muon-0").get_attribute("class")


def test_a_click_keeps_a_run_lit_and_a_second_one_or_escape_lets_it_go(page):
    away = page.find_element(By.TAG_NAME, "h1")
    pointer = ActionChains(page, duration=0)
    for let_go in (lambda: row_of(page, "sgd-0").click(), lambda: pointer.send_keys(Keys.ESCAPE).perform()):
        row_of(page, "sgd-0").click()
        pointer.move_to_element(away).perform()
        assert lit(page) == {"sgd-0"}
        let_go()
        pointer.move_to_element(away).perform()
        assert lit(page) == set()


def test_the_accuracies_of_the_comparison_are_visible_without_scrolling(page):
    table = page.find_element(By.ID, "table-comparison")
    places = {" ".join(cell.text.split()): cell.rect for cell in table.find_elements(By.TAG_NAME, "th")}
    frame = table.find_element(By.XPATH, "..").rect
    assert places["test accuracy"]["x"] + places["test accuracy"]["width"] <= frame["x"] + frame["width"]

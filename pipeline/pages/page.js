// Script of the report page: sorts tables by their headings, switches the axis of curves, highlights a run in all figures.
"use strict";

(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

  // Rows without a value stay last in both directions.
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  };

  const keyOf = (row, column) => {
    const { key, kind } = row.cells[column].dataset;
    if (key === undefined) return null;
    return kind === "number" ? Number(key) : key;
  };

  const sortBy = (heading) => {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const rows = all("tbody tr", table);
    const numeric = rows.some((row) => row.cells[column].dataset.kind === "number");
    const before = heading.getAttribute("aria-sort");
    const direction = before === "ascending" ? "descending" : before === "descending" ? "ascending" : numeric ? "descending" : "ascending";
    all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    rows
      .map((row, place) => ({ row, place, key: keyOf(row, column) }))
      .sort((a, b) => compare(a.key, b.key, sign) || a.place - b.place)
      .forEach(({ row }) => table.tBodies[0].append(row));
  };

  let pinned = null;

  const light = (run) => {
    const shown = run ?? pinned;
    document.body.classList.toggle("dim", shown !== null);
    all("[data-run]").forEach((element) => element.classList.toggle("hot", shown !== null && element.dataset.run === shown));
  };

  const runAt = (event) => event.target.closest?.("[data-run]")?.dataset.run ?? null;

  const showAxis = (axis) => all("[data-axis]").forEach((view) => { view.hidden = view.dataset.axis !== axis; });

  all("th button").forEach((button) => button.addEventListener("click", () => sortBy(button.closest("th"))));
  all(".switch input").forEach((input) => input.addEventListener("change", () => showAxis(input.value)));
  all(".switch").forEach((element) => { element.hidden = false; });
  all("input:checked", document).forEach((input) => showAxis(input.value)); // a reloaded page keeps its choice
  document.addEventListener("pointerover", (event) => light(runAt(event)));
  document.addEventListener("click", (event) => {
    const run = runAt(event);
    if (run === null) return;
    pinned = pinned === run ? null : run;
    light(run);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    pinned = null;
    light(null);
  });
})();

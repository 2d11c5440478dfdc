// Sorts the table of all runs by a click on a header and filters it by text; `fill` replaces rows that changed.
// `seen` is told the names of the rows that the filter leaves, where it is set.
function runsTable(root, seen = () => {}) {
  const head = [...root.querySelectorAll("thead th")], body = root.querySelector("tbody");
  const filter = root.querySelector(".udon-runs-filter"), count = root.querySelector(".udon-runs-count");
  const archived = root.querySelector(".udon-runs-show-archived"), drawn = new Map();
  const value = (row, at) => row.cells[at].dataset.v ?? "";
  function arrange() {
    const at = head.findIndex((cell) => (cell.getAttribute("aria-sort") ?? "none") !== "none");
    const sign = at >= 0 && head[at].getAttribute("aria-sort") === "descending" ? -1 : 1;
    const number = at >= 0 && "number" in head[at].dataset;
    const focused = document.activeElement, rows = [...body.rows];
    const sorted = at < 0 ? rows : [...rows].sort((one, other) => {
      const a = value(one, at), b = value(other, at);
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (number ? a - b : a.localeCompare(b, "en", { numeric: true }));
    });
    if (sorted.some((row, i) => row !== rows[i])) {
      body.append(...sorted);
      if (body.contains(focused)) focused.focus();
    }
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      const away = row.classList.contains("udon-runs-archived") && !archived.checked;
      row.hidden = away || !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    const all = body.rows.length, away = [...body.rows].filter((row) => row.matches(".udon-runs-archived")).length;
    const kept = archived.checked ? all : all - away;
    count.textContent = words.length ? `${shown} of ${kept} runs` : `${kept} run${kept === 1 ? "" : "s"}`;
    archived.parentElement.hidden = away === 0;
    archived.nextSibling.textContent = `archived runs (${away})`;
    seen(words.length ? [...body.rows].filter((row) => !row.hidden).map((row) => row.dataset.run) : []);
  }
  for (const cell of head) {
    cell.querySelector("button")?.addEventListener("click", () => {
      const first = "number" in cell.dataset ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      const next = cell.getAttribute("aria-sort") === first ? second : first;
      for (const other of head) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", next);
      arrange();
    });
  }
  filter.addEventListener("input", arrange);
  archived.addEventListener("change", arrange);
  arrange();
  return {
    fill(rows) {
      const known = new Map([...body.rows].map((row) => [row.dataset.run, row]));
      for (const [name, row] of known) if (!(name in rows)) { row.remove(); drawn.delete(name); }
      for (const [name, text] of Object.entries(rows)) {
        if (drawn.get(name) === text || known.get(name)?.querySelector(".udon-runs-editor")) continue;
        const made = document.createElement("template");
        made.innerHTML = text;
        const row = made.content.firstElementChild;
        known.has(name) ? known.get(name).replaceWith(row) : body.append(row);
        drawn.set(name, text);
      }
      arrange();
    },
  };
}

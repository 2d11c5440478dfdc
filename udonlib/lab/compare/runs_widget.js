// The live table, behind runs_table.js: Python sends rows and what is shown, a person chooses a and b, filters, notes.
function editNote(button, save) {
  const cell = button.closest("td"), row = cell.parentElement, note = JSON.parse(button.dataset.note);
  const before = [...cell.childNodes], editor = document.createElement("form"), parts = {};
  editor.className = "udon-runs-editor";
  for (const [name, hint] of [["text", "a note"], ["tags", "tags, with commas"]]) {
    parts[name] = Object.assign(document.createElement("input"), { value: note[name], placeholder: hint });
    parts[name].setAttribute("aria-label", hint);
  }
  const gone = row.classList.contains("udon-runs-archived");
  const act = (text, type, how) => {
    const made = Object.assign(document.createElement("button"), { textContent: text, type });
    made.addEventListener("click", how);
    return made;
  };
  const end = () => cell.replaceChildren(...before);
  const kept = () => ({ text: parts.text.value, tags: parts.tags.value });
  editor.addEventListener("submit", (event) => { event.preventDefault(); save(row, kept()); end(); });
  editor.addEventListener("keydown", (event) => { event.stopPropagation(); if (event.key === "Escape") end(); });
  editor.append(...Object.values(parts), act("save", "submit", () => {}),
    act(gone ? "put back" : "archive", "button", () => { save(row, { ...kept(), archived: !gone }); end(); }),
    act("cancel", "button", end));
  cell.replaceChildren(editor);
  parts.text.focus();
}
export default {
  render({ model, el }) {
    el.innerHTML = model.get("html");
    let told = "[]", timer;
    const seen = (names) => {  // what is left of the filter, when the typing has stopped for a moment
      clearTimeout(timer);
      timer = setTimeout(() => {
        if (JSON.stringify(names) === told) return;
        told = JSON.stringify(names);
        model.set("seen", names);
        model.save_changes();
      }, 500);
    };
    const own = Math.random().toString(36).slice(2), table = runsTable(el, seen);
    const draw = () => {
      table.fill(model.get("rows"));
      for (const letter of ["a", "b"]) {
        const chosen = model.get(letter) || model.get("shown")[letter];
        for (const button of el.querySelectorAll(`.udon-runs-${letter}`)) {
          button.name = `udon-runs-${letter}-${own}`;
          button.checked = button.closest("tr").dataset.run === chosen;
        }
      }
    };
    el.addEventListener("change", (event) => {
      const letter = ["a", "b"].find((one) => event.target.classList.contains(`udon-runs-${one}`));
      if (letter) { model.set(letter, event.target.closest("tr").dataset.run); model.save_changes(); }
    });
    el.addEventListener("click", (event) => {
      const button = event.target.closest(".udon-runs-edit");
      if (button) editNote(button, (row, note) => model.send({ note: { run: row.dataset.run, ...note } }));
    });
    model.on("change:rows change:shown", draw);
    draw();
    model.send({ views: 1 });
    return () => { model.off("change:rows change:shown", draw); model.send({ views: -1 }); };
  },
};

// The live table, behind runs_table.js: Python sends rows and what is shown, a person chooses a and b.
export default {
  render({ model, el }) {
    el.innerHTML = model.get("html");
    const own = Math.random().toString(36).slice(2), table = runsTable(el);
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
    model.on("change:rows change:shown", draw);
    draw();
    model.send({ views: 1 });
    return () => { model.off("change:rows change:shown", draw); model.send({ views: -1 }); };
  },
};

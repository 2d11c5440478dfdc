// Tiles of images in sections: Python sends what is shown; a click goes back as {row} or {turn}.
const MARKS = { tick: "✓", cross: "✗" };

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

export default {
  render({ model, el }) {
    const box = element("div", "udon-gallery");
    el.append(box);

    function turner(text, by, allowed, name) {
      const button = element("button", name, text);
      button.disabled = !allowed;
      button.onclick = () => model.send({ turn: by });
      return button;
    }
    function tile(spec) {
      const made = element("button", `udon-gallery-tile ${spec.mark}`);
      made.disabled = spec.row < 0;
      made.title = `${spec.name}, ${spec.note}`;
      made.dataset.row = spec.row;
      made.classList.toggle("chosen", spec.row >= 0 && spec.row === model.get("chosen"));
      made.onclick = () => model.send({ row: spec.row });
      const image = element("img", "");
      image.src = spec.src;
      image.alt = spec.name;
      made.append(image, element("div", "", spec.name), element("div", "", spec.note));
      if (MARKS[spec.mark]) made.append(element("span", "udon-gallery-mark", MARKS[spec.mark]));
      return made;
    }
    function draw() {
      const [page, pages] = [model.get("page"), model.get("pages")];
      box.replaceChildren();
      model.get("sections").forEach((section, number) => {
        const head = element("div", "udon-gallery-head"), tiles = element("div", "udon-gallery-tiles");
        head.append(element("span", "", section.title));
        if (!number && pages > 1)
          head.append(
            turner("‹ back", -1, page > 0, "udon-gallery-back"),
            turner("on ›", 1, page < pages - 1, "udon-gallery-on"),
            element("span", "", `page ${page + 1} of ${pages}`),
          );
        tiles.append(...section.tiles.map(tile));
        box.append(head, tiles);
      });
    }
    for (const name of ["sections", "page", "pages"]) model.on(`change:${name}`, draw);
    model.on("change:chosen", () => box.querySelectorAll(".udon-gallery-tile").forEach((each) =>
      each.classList.toggle("chosen", Number(each.dataset.row) >= 0 && Number(each.dataset.row) === model.get("chosen"))));
    draw();
  },
};

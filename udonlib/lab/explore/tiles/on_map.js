// Images on the map of jupyter-scatter that stands in the same box: those of the points in view that find room.
// They stand on their points and move with them; which ones is decided anew when the map has come to rest.
const SIDE = 34; // pixels of an image
const CLOSE = 4, APART = 30, FEW = 120; // pixels between two images while FEW points are in view, and else
const MOST = 100; // images on a map
const REST = 120; // milliseconds
const MARGIN = 0.1; // around all points, of their extent

// The same order of points always: an image stays where it is while the map is moved.
const rank = (row) => Math.imul(row + 1, 2654435761) >>> 0;

function chosen(plot) {
  const region = new Set(plot.get("selectedPoints")), inView = plot.get("pointsInView");
  const rows = region.size > 1 ? inView.filter((row) => region.has(row)) : inView;
  const reach = SIDE + (rows.length > FEW ? APART : CLOSE), taken = [];
  for (const row of [...rows].sort((one, other) => rank(one) - rank(other))) {
    const [x, y] = plot.getScreenPosition(row);
    if (taken.every((other) => Math.abs(other.x - x) >= reach || Math.abs(other.y - y) >= reach)) taken.push({ row, x, y });
    if (taken.length === MOST) break;
  }
  return taken.map((each) => each.row);
}

export default {
  render({ model, el }) {
    const layer = document.createElement("div");
    layer.className = "udon-on-map";
    const images = new Map(), sources = {}, colours = {}, asked = new Set(); // row → element, address, colour
    let plot = null, resting = 0, pending = 0, fitted = false;

    function place() {
      if (!plot.get("isPointsDrawn")) return;
      for (const [row, image] of images) {
        const [x, y] = plot.getScreenPosition(row);
        image.style.transform = `translate(${x - SIDE / 2}px, ${y - SIDE / 2}px)`;
      }
    }
    function show(row) {
      if (!images.has(row)) {
        const image = document.createElement("img");
        image.src = sources[row];
        image.alt = "";
        image.dataset.row = row;
        images.set(row, image);
        layer.append(image);
      }
      images.get(row).style.borderColor = colours[row];
    }
    function choose() {
      const rows = model.get("shown") && plot.get("isPointsDrawn") ? chosen(plot) : [];
      for (const [row, image] of images)
        if (!rows.includes(row)) {
          image.remove();
          images.delete(row);
        }
      const wanted = rows.filter((row) => !asked.has(row));
      wanted.forEach((row) => asked.add(row));
      if (wanted.length) model.send({ wanted });
      rows.filter((row) => sources[row]).forEach(show);
      place();
    }
    function moved() {
      if (!fitted && plot.get("isPointsDrawn")) {
        fitted = true; // all points are in view, however narrow the map is
        plot.zoomToPoints(plot.get("filteredPoints"), { padding: MARGIN });
      }
      place();
      clearTimeout(resting);
      resting = setTimeout(choose, REST);
    }
    function told(content) {
      Object.assign(colours, content.colours);
      Object.assign(sources, content.images);
      if (plot) choose();
    }
    model.on("msg:custom", told);
    model.on("change:shown", () => plot && choose());
    // The plot is made after this, in a frame of its own.
    function attach() {
      const map = [...(el.closest(".udon-with-images")?.querySelectorAll("div") ?? [])].find((each) => each.api);
      if (!map) {
        pending = setTimeout(attach, 100);
        return;
      }
      plot = map.api;
      map.firstElementChild.after(layer); // above the points, below what is said at the pointer
      plot.subscribe("draw", moved);
      moved();
    }
    attach();
    return () => {
      clearTimeout(pending);
      clearTimeout(resting);
      model.off("msg:custom", told);
      layer.remove();
      plot?.unsubscribe?.("draw", moved);
      plot = null;
    };
  },
};

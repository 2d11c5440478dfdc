// The search panel: Python sends what is shown, a person's acts go back as messages {do: ...}.
const LARGE = 6e6; // bytes of a file beyond which the browser makes it smaller before it is sent
const SIDE = 2048; // pixels of its longer side then

async function bytesOf(file) {
  if (file.size <= LARGE) return await file.arrayBuffer();
  const image = await createImageBitmap(file), scale = Math.min(1, SIDE / Math.max(image.width, image.height));
  const canvas = new OffscreenCanvas(Math.round(image.width * scale), Math.round(image.height * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return await (await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 })).arrayBuffer();
}

export default {
  render({ model, el }) {
    el.innerHTML = model.get("html");
    const find = (name) => el.querySelector(`.udon-find-${name}`), drawn = {};
    const [stage, picture, crop] = ["stage", "picture", "crop"].map(find);
    const say = (what) => model.send(what);

    function place(box) { // where the picture lies within the stage, or a part of it
      const width = stage.clientWidth, height = stage.clientHeight;
      const scale = Math.min(width / (picture.naturalWidth || 1), height / (picture.naturalHeight || 1));
      const w = scale * (picture.naturalWidth || 1), h = scale * (picture.naturalHeight || 1);
      const [x, y] = [(width - w) / 2, (height - h) / 2], [l, t, r, b] = box;
      return [x + l * w, y + t * h, (r - l) * w, (b - t) * h];
    }
    function showCrop(box) {
      const part = box.some((side, i) => Math.abs(side - [0, 0, 1, 1][i]) > 1e-6);
      crop.hidden = !part;
      if (part) [crop.style.left, crop.style.top, crop.style.width, crop.style.height] = place(box).map((n) => `${n}px`);
    }
    function draw() {
      const view = model.get("view");
      for (const name of ["said", "results", "strip", "note"])
        if (drawn[name] !== view[name]) { find(name).innerHTML = view[name]; drawn[name] = view[name]; }
      if (drawn.picture !== view.picture) {
        picture.src = view.picture;
        picture.alt = view.name;
        drawn.picture = view.picture;
        find("results").scrollTop = 0;
      }
      picture.decode().catch(() => {}).then(() => showCrop(view.crop));
      find("back").disabled = !view.can_back;
      find("whole").disabled = view.crop.join() === "0,0,1,1";
      if (document.activeElement !== find("label")) find("label").value = told = view.label;
      find("domain").value = view.domain;
      find("misses").checked = view.misses;
    }
    async function take(file) {
      if (!file) return;
      try {
        model.send({ do: "picture", name: file.name || "pasted image" }, undefined, [await bytesOf(file)]);
      } catch (error) {
        say({ do: "problem", text: `${file.name}: the browser cannot read it as an image` });
      }
    }
    el.addEventListener("click", (event) => {
      const tile = event.target.closest("[data-row]");
      if (tile) say({ do: "row", row: Number(tile.dataset.row) });
    });
    find("file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
    find("choose").addEventListener("click", () => find("file").click());
    for (const name of ["back", "whole", "save"]) find(name).addEventListener("click", () => say({ do: name }));
    let told = null;
    const tell = () => {
      if (find("label").value !== told) say({ do: "label", label: (told = find("label").value) });
    };
    find("label").addEventListener("change", tell);
    find("label").addEventListener("keydown", (event) => { if (event.key === "Enter") tell(); });
    const browse = () => say({ do: "browse", domain: find("domain").value, misses: find("misses").checked });
    for (const name of ["domain", "misses"]) find(name).addEventListener("change", browse);
    find("others").addEventListener("click", browse);

    stage.addEventListener("dragover", (event) => { event.preventDefault(); stage.classList.add("udon-over"); });
    stage.addEventListener("dragleave", () => stage.classList.remove("udon-over"));
    stage.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      stage.classList.remove("udon-over");
      take(event.dataTransfer.files[0]);
    });
    const paste = (event) => {
      const inside = el.contains(document.activeElement) || el.contains(event.target);
      const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
      if (!inside || !file) return;
      event.preventDefault();
      event.stopPropagation();
      take(file);
    };
    document.addEventListener("paste", paste, true);

    let from = null; // where a crop was begun, as shares of the picture
    const share = (event) => {
      const [x, y, w, h] = place([0, 0, 1, 1]), corner = stage.getBoundingClientRect();
      const cut = (value) => Math.min(1, Math.max(0, value));
      return [cut((event.clientX - corner.left - stage.clientLeft - x) / w), cut((event.clientY - corner.top - stage.clientTop - y) / h)];
    };
    const boxTo = ([x, y]) => [Math.min(from[0], x), Math.min(from[1], y), Math.max(from[0], x), Math.max(from[1], y)];
    stage.addEventListener("pointerdown", (event) => {
      from = share(event);
      stage.focus();
      stage.setPointerCapture(event.pointerId);
    });
    stage.addEventListener("pointermove", (event) => { if (from) showCrop(boxTo(share(event))); });
    stage.addEventListener("pointerup", (event) => {
      if (!from) return;
      const box = boxTo(share(event));
      from = null;
      if (box[2] - box[0] > 0.03 && box[3] - box[1] > 0.03) say({ do: "crop", box });
      else showCrop(model.get("view").crop);
    });
    model.on("change:view", draw);
    draw();
    return () => { model.off("change:view", draw); document.removeEventListener("paste", paste, true); };
  },
};

"""Icon sets of the package @iconify/json: loading with a check of the licence, and drawing an icon as pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import Any

from PIL import Image

from udonlib.data.miniuned.artwork import Drawing, trim
from udonlib.data.miniuned.sources import ALLOWED_LICENCES, BuildError, Credit, Downloads

RENDER_SIDE = 128  # pixels of the longer side


class IconSets:
    """The icon sets asked for. Every one is held against the licences that MiniUnED takes before it is read."""

    def __init__(self, downloads: Downloads) -> None:
        self.downloads = downloads
        (self.package,) = downloads.of("icons")
        self.collections: dict[str, dict[str, Any]] = json.loads(downloads.member(self.package, "collections.json"))
        self.sets: dict[str, dict[str, Any]] = {}

    def licensed(self) -> list[str]:
        """Names of all sets under an allowed licence, sorted."""
        return sorted(n for n, about in self.collections.items() if about["license"].get("spdx") in ALLOWED_LICENCES)

    def load(self, names: Iterable[str]) -> None:
        """Read the sets (those not yet read); one pass through the package."""
        missing = {name for name in names if name not in self.sets}
        unknown = sorted(missing - set(self.collections))
        if unknown:
            raise BuildError(f"{self.package.label}: no icon set named {', '.join(unknown)}")
        for name in sorted(missing):
            self.credit(name)
        paths = {f"json/{name}.json" for name in missing}
        for path, content in self.downloads.members(self.package, paths.__contains__).items():
            self.sets[path.removeprefix("json/").removesuffix(".json")] = json.loads(content)

    def credit(self, name: str) -> Credit:
        """The set's author and licence. Raises BuildError where the licence is not allowed."""
        about = self.collections[name]
        author = about["author"]
        return Credit(
            package=self.package.label,
            title=about["name"],
            author=author["name"],
            licence=about["license"].get("spdx", about["license"]["title"]),
            url=author.get("url", ""),
        )

    def icons(self, name: str) -> list[str]:
        return sorted(self.sets[name]["icons"])

    def aliases(self, name: str) -> dict[str, dict[str, Any]]:
        """Other names of the set's icons that are the same drawing (neither turned nor mirrored), sorted."""
        turned = ("hFlip", "vFlip", "rotate")
        found = self.sets[name].get("aliases", {})
        return {alias: e for alias, e in sorted(found.items()) if not any(e.get(key) for key in turned)}

    def draw(self, name: str, icon: str) -> Drawing | None:
        """The icon, trimmed, longer side about RENDER_SIDE; None for hidden, animated, very long or empty ones."""
        icon_set = self.sets[name]
        entry = icon_set["icons"].get(icon)
        if entry is None:
            entry = icon_set["icons"][icon_set["aliases"][icon]["parent"]]
        width = entry.get("width", icon_set.get("width", 16))
        height = entry.get("height", icon_set.get("height", 16))
        left, top = (entry.get(side, icon_set.get(side, 0)) for side in ("left", "top"))
        if entry.get("hidden") or "<animate" in entry["body"] or max(width, height) > 4 * min(width, height):
            return None
        zoom = RENDER_SIDE / max(width, height)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{width * zoom:.2f}" height="{height * zoom:.2f}" viewBox="{left} {top} {width} {height}">'
            f"{entry['body']}</svg>"
        )
        image = rasterise(svg)
        image = None if image is None else trim(image)
        return None if image is None else Drawing(image, f"{name}:{icon}")


def rasterise(svg: str) -> Image.Image | None:
    """An SVG as RGBA pixels; None where it is not well-formed, as a handful of icons are not."""
    try:
        import resvg_py  # type: ignore[import-not-found, unused-ignore]  # only the builder needs it
    except ImportError:
        raise BuildError(
            "resvg_py, which draws the icons, is missing: install the dependency group 'miniuned'"
        ) from None
    try:
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))).convert(
            "RGBA"
        )
    except ValueError:
        return None

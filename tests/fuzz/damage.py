"""Ways to damage a file: of its bytes, of what its words say, and of the members of an archive."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

WORDS = (
    *("null", "true", "-1", "0", "1e999", "-0.0", "NaN", "Infinity", "9" * 400, "0x7fffffff", "1_000", "\u0661\u0662"),
    *("[]", "{}", '""', "''", '"\\ud800"', "\x00", "\ufeff", "../../evil", "/etc/passwd", "C:\\x", "~", "%s"),
    *("&a [*a, *a]", "!!python/name:os", "[" * 2000, "{" * 300, '{"a":' * 300, "a" * 70_000, "e\u0301\u202e", "=1+1"),
    *(",,,,", '"', "\n\n", "\r", "- - -", "? :"),
)
NAMES = ("../../evil", "/{name}", "{name}/", "{name}{name}", "a" * 300, "")  # of an archive's member


def damaged(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """The content after one to four of the ways to damage it; one in twenty stays whole."""
    if rng.random() < 0.05:
        return content
    for _ in range(rng.integers(1, 5)):
        inside = OF_ARCHIVES if content[:2] == b"PK" else OF_TEXT if _is_text(content) else ()
        ways = (*OF_BYTES, *inside, *inside)
        content = ways[rng.integers(len(ways))](content, others, rng)
    return content


def _is_text(content: bytes) -> bool:
    return b"\x00" not in content[:2000] and not content.startswith((b"\x89PNG", b"\xff\xd8", b"PK"))


def _place(content: bytes, rng: np.random.Generator) -> slice:
    """A piece of the content, short more often than long."""
    start = int(rng.integers(len(content) + 1))
    return slice(start, start + int(2 ** rng.uniform(0, 10)))


def _flip(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    made = bytearray(content)
    for place in rng.integers(len(made), size=rng.integers(1, 9)) if made else ():
        made[place] ^= 1 << rng.integers(8)
    return bytes(made)


def _set(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    where = _place(content, rng)
    n = len(content[where])
    value = (b"\x00", b"\xff", b"\x7f", rng.bytes(max(1, n)))[rng.integers(4)]
    return content[: where.start] + (value * n)[:n] + content[where.start + n :]


def _cut(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content) + 1)]


def _lose(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    where = _place(content, rng)
    return content[: where.start] + content[where.stop :]


def _repeat(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    where = _place(content, rng)
    return content[: where.stop] + content[where] * int(rng.integers(1, 20)) + content[where.stop :]


def _graft(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    other = others[rng.integers(len(others))]
    return content[: rng.integers(len(content) + 1)] + other[rng.integers(len(other) + 1) :]


def _word(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Put something unlikely in the place of a word, number or string."""
    found = list(re.finditer(rb'"[^"\n]*"|[\w.+-]+', content))
    put = WORDS[rng.integers(len(WORDS))].encode()
    if not found:
        return put
    word = found[rng.integers(len(found))]
    return content[: word.start()] + put + content[word.end() :]


def _swap(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Exchange two lines."""
    lines = content.split(b"\n")
    a, b = rng.integers(len(lines), size=2)
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _member(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Damage what an archive holds, or a member's name, and write the archive anew, so that its checksums agree."""
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged before, in whatever way
        return content
    if not members:
        return content
    number = int(rng.integers(len(members)))
    name, held = members[number]
    what = rng.integers(6)
    if what < 3:
        members[number] = name, damaged(held, others, rng)
    elif what == 3:
        members[number] = NAMES[rng.integers(len(NAMES))].format(name=name), held
    elif what == 4:
        del members[number]
    else:
        members.insert(int(rng.integers(len(members) + 1)), members[number])
    with zipfile.ZipFile(made, "w", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[rng.integers(2)]) as archive:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that stand there twice
            for name, held in members:
                archive.writestr(zipfile.ZipInfo(name.replace("\x00", "")), held)
    return made.getvalue()


Way = Callable[[bytes, Sequence[bytes], np.random.Generator], bytes]
OF_BYTES: tuple[Way, ...] = (_flip, _set, _cut, _lose, _repeat, _graft)
OF_TEXT: tuple[Way, ...] = (_word, _word, _swap)
OF_ARCHIVES: tuple[Way, ...] = (_member, _member)

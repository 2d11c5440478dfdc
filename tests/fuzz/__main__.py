"""`python -m tests.fuzz`: search all kinds, and say what was found, each place of the code once."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import tests.fuzz
from tests.fuzz.cases import content_of, run, search
from tests.fuzz.kinds import kinds


def main() -> int:
    names = list(kinds(Path()))
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=tests.fuzz.__doc__, formatter_class=raw)
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="KIND", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, and show its traceback")
    options = parser.parse_args()
    if options.case is not None:
        return _one(options.only[0], options.case, options.seed)
    n_bad = 0
    for kind in options.only:
        began, last = time.monotonic(), [0.0]

        def progress(number: int, kind: str = kind, began: float = began, last: list[float] = last) -> None:
            now = time.monotonic()
            if now - last[0] > 5 and number:
                left = (now - began) / number * (options.cases - number)
                print(f"{kind}: {number:,} of {options.cases:,}, {left:.0f} s left", file=sys.stderr, flush=True)
                last[0] = now

        found = search(kind, options.cases, options.seed, progress=progress)
        n_bad += len(found)
        print(f"{kind:12} {options.cases:,} cases in {time.monotonic() - began:.0f} s: {len(found)} bad", flush=True)
        places: dict[str, list[int]] = {}
        for finding in found:
            places.setdefault(finding.what.split(": ")[0], []).append(finding.number)
        for numbers in places.values():
            example = next(finding for finding in found if finding.number == numbers[0])
            print(f"    {len(numbers)} x {example.what} ({example.file}, case {numbers[0]})", flush=True)
    return int(n_bad > 0)


def _one(kind: str, number: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "made").mkdir()
        made = kinds(Path(root) / "made")[kind]()
        name, content = content_of(made, kind, number, seed)
        finding = run(made, kind, number, name, content, Path(root))
    print(f"{kind}, case {number}: {name}, {len(content):,} bytes, beginning with {content[:200]!r}")
    print(finding.trace or finding.what if finding else "a value, or one clear message")
    return int(finding is not None)


if __name__ == "__main__":
    sys.exit(main())

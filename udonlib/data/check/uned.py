"""The UnED benchmark as it was published: what each of its eight domains holds, to compare a catalog with.

Source: UnED (ICCV 2023), the info files of its project page.
"""

from dataclasses import astuple, dataclass, fields

import pandas as pd

from udonlib.data.catalog import Catalog, Domain


@dataclass(frozen=True)
class Counts:
    """Images of each split of a domain, and classes of its train split; 0: there is no such split."""

    train: int
    train_classes: int
    val: int
    test: int
    index: int = 0
    small_index: int = 0

    @property
    def test_index(self) -> int:
        """Images that test queries are searched in: `index`, or the queries themselves."""
        return self.index or self.test

    @property
    def val_index(self) -> int:
        """Images that val queries are searched in: `small_index`, or the queries themselves."""
        return self.small_index or self.val


# In the order of domains of the published recipe.
OFFICIAL = {
    "food2k": Counts(train=472_349, train_classes=900, val=49_323, test=9_979),
    "cars": Counts(train=6_346, train_classes=78, val=1_708, test=8_131),
    "sop": Counts(train=48_942, train_classes=9_054, val=10_609, test=60_502),
    "inshop": Counts(train=20_897, train_classes=3_198, val=4_982, test=14_218, index=12_612),
    "inat": Counts(train=273_929, train_classes=4_552, val=51_917, test=136_093),
    "met": Counts(train=397_121, train_classes=224_408, val=129, test=1_003, index=397_121, small_index=38_307),
    "gldv2": Counts(train=1_422_914, train_classes=73_182, val=157_556, test=1_129, index=761_757),
    "rp2k": Counts(train=188_724, train_classes=1_074, val=17_185, test=10_931),
}


def count(domain: Domain) -> Counts:
    """Count what a domain holds."""
    sizes = {name: n for name, n in domain.sizes.items() if n}
    return Counts(train_classes=domain.n_classes, **sizes)


def check_counts(catalog: Catalog) -> pd.DataFrame | None:
    """Compare a catalog with UnED as it was published; None where no domain has a name of UnED's.

    A cell says what was found and, where that is something else, what is official: "96 of 6,346". Part of the benchmark
    is a fair thing to use, so that a difference is no error; but figures on it are not UnED's.

    Returns: a row for each domain of UnED in the official order and one for their sum; columns for the counts, and
        `verdict`: "as published", "⚠ differs" or "absent".
    """
    found = {domain.name: count(domain) for domain in catalog.domains if domain.name in OFFICIAL}
    if not found:
        return None
    nothing = Counts(0, 0, 0, 0)
    rows = {name: (found.get(name, nothing), official) for name, official in OFFICIAL.items()}
    rows["all"] = (_total(list(found.values())), _total(list(OFFICIAL.values())))
    cells = {
        field.name.replace("train_", "train "): [_cell(*(getattr(c, field.name) for c in row)) for row in rows.values()]
        for field in fields(Counts)
    }
    verdicts = [
        "as published" if here == official else "absent" if here == nothing else "⚠ differs"
        for here, official in rows.values()
    ]
    return pd.DataFrame({**cells, "verdict": verdicts}, index=pd.Index(rows, name="domain"))


def _total(counts: list[Counts]) -> Counts:
    return Counts(*(sum(column) for column in zip(*map(astuple, counts), strict=True)))


def _cell(found: int, official: int) -> str:
    if found != official:
        return f"{found:,} of {official:,}"
    return f"{found:,}" if found else "–"

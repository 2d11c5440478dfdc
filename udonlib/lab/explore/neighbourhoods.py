"""Who is near whom: what a region holds, which items turn up everywhere, which domains are taken for each other.

Tables of the neighbours that a run's evaluation kept: the k nearest of every test query in the merged index. A share
is in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Int64

from udonlib.errors import UserError
from udonlib.evaluation.evaluate import MergedIndex, Neighbours


@dataclass(frozen=True, eq=False)
class Lists:
    """The neighbours of one embedder's queries in the merged index, those of all domains one under the other.

    domain: number of each query's domain among `searched.domains`. position: in the merged index; -1 is no neighbour.
    """

    embedder: str
    searched: MergedIndex
    paths: tuple[str, ...]
    domain: Int64[np.ndarray, "query"]
    position: Int64[np.ndarray, "query rank"]
    similarity: Float[np.ndarray, "query rank"]
    hit: Bool[np.ndarray, "query rank"]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def starts(self) -> Int64[np.ndarray, "domain_and_end"]:
        """Where each domain begins in the merged index, and where that ends."""
        return np.cumsum([0, *map(len, self.searched.paths)])

    @cached_property
    def item_domain(self) -> Int64[np.ndarray, "query rank"]:
        """Number of each neighbour's domain; that of no neighbour is the number of domains."""
        domain = np.searchsorted(self.starts, self.position, side="right") - 1
        return np.where(self.position >= 0, domain, len(self.searched.domains))

    @cached_property
    def astray(self) -> Bool[np.ndarray, "query rank"]:
        """Which neighbours are of another domain than their query's."""
        return (self.item_domain != self.domain[:, None]) & (self.position >= 0)

    def query(self, row: int) -> tuple[str, str]:
        """Return the domain and the path of a query."""
        return self.searched.domains[self.domain[row]], self.paths[row]

    def of(self, row: int) -> list[tuple[tuple[str, str], bool]]:
        """Return the neighbours of a query, nearest first: (domain, path), and whether it is relevant."""
        places = self.position[row]
        return [(self.searched.locate(int(p)), bool(h)) for p, h in zip(places, self.hit[row], strict=True) if p >= 0]


def gather(neighbours: Iterable[Neighbours], embedder: str, k: int, domains: Sequence[str] | None = None) -> Lists:
    """Put the neighbours of one embedder together.

    Args:
        neighbours: in the merged index.
        embedder: whose.
        k: neighbours of each query that are taken.
        domains: whose queries are taken; None: all.

    Raises:
        UserError: k beyond the neighbours that were kept; no neighbours of this embedder.
    """
    parts = [part for part in neighbours if part.embedder == embedder and part.index == "merged"]
    parts = [part for part in parts if domains is None or part.query_domain in domains]
    if not parts:
        raise UserError(f"no neighbours of the {embedder} were kept for {', '.join(domains or ()) or 'any domain'}")
    n_kept = min(part.position.shape[1] for part in parts)
    if k > n_kept:
        raise UserError(f"parameter 'k': found {k}, but {n_kept} neighbours were kept; valid: 1 to {n_kept}")
    number = {name: i for i, name in enumerate(parts[0].searched.domains)}
    return Lists(
        embedder,
        parts[0].searched,
        tuple(path for part in parts for path in part.query_paths),
        np.concatenate([np.full(len(part.query_paths), number[part.query_domain]) for part in parts]),
        np.concatenate([part.position[:, :k] for part in parts]),
        np.concatenate([part.similarity[:, :k] for part in parts]),
        np.concatenate([part.hit[:, :k] for part in parts]),
    )


def hubs(lists: Lists, n: int | None = None) -> pd.DataFrame:
    """Tabulate the items that turn up in the most lists: one row an item, the most frequent first.

    A hub is near to many queries whatever they show. Ties go by position in the index.

    Args:
        lists: whose lists.
        n: rows; None: every item that turns up at all.

    Returns: domain, path, position, n_lists (queries that have the item among their k nearest), n_right (of them, those
        for which it is relevant), n_domains (domains of these queries), percent (of all queries).
    """
    there = lists.position >= 0
    position, right = lists.position[there], lists.hit[there]
    asked = np.broadcast_to(lists.domain[:, None], lists.position.shape)[there]
    n_items, n_domains = int(lists.starts[-1]), len(lists.searched.domains)
    n_lists = np.bincount(position, minlength=n_items)
    pairs = np.unique(position * n_domains + asked)
    spread = np.bincount(pairs // n_domains, minlength=n_items)
    order = np.argsort(-n_lists, kind="stable")[: np.count_nonzero(n_lists)][:n]
    places = [lists.searched.locate(int(item)) for item in order]
    table = {
        "domain": [domain for domain, _ in places],
        "path": [path for _, path in places],
        "position": order,
        "n_lists": n_lists[order],
        "n_right": np.bincount(position[right], minlength=n_items)[order],
        "n_domains": spread[order],
        "percent": 100 * n_lists[order] / max(1, len(lists)),
    }
    return pd.DataFrame(table)


def hubness(lists: Lists) -> pd.DataFrame:
    """Tabulate how unevenly the items of each domain turn up in lists; the last row, "all", is the whole index.

        skewness = mean((N - mean N)^3) / std(N)^3,   N = in how many lists an item stands

    0 where all items turn up alike; above about 2 some items are hubs. Source: Radovanovic et al., JMLR 11 (2010).

    Returns: domain, n_items, percent_never (items that nobody finds), most (lists of the most frequent item), skewness,
        percent_index (share of the index), percent_lists (share of all places in lists): more than its share of the
        index means that the domain draws queries.
    """
    n_lists = np.bincount(lists.position[lists.position >= 0], minlength=int(lists.starts[-1]))
    ends = [*zip(lists.searched.domains, lists.starts[:-1], lists.starts[1:], strict=True)]
    rows = []
    for name, start, end in [*ends, ("all", 0, int(lists.starts[-1]))]:
        counts = n_lists[start:end].astype(float)
        spread = counts.std() if len(counts) else 0.0
        row = {
            "domain": name,
            "n_items": len(counts),
            "percent_never": 100 * float((counts == 0).mean()) if len(counts) else 0.0,
            "most": int(counts.max(initial=0)),
            "skewness": float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread else 0.0,
            "percent_index": 100 * len(counts) / max(1, len(n_lists)),
            "percent_lists": 100 * float(counts.sum()) / max(1, int(n_lists.sum())),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def confusions(lists: Lists) -> pd.DataFrame:
    """Count wrong first neighbours by the domains of query and neighbour: a square of domains, queries down.

    Returns: a column for each domain of the index and a row for each that has queries, in percent of these; on the
        diagonal stands another class of the query's own domain. A row sums to 100 - R@1, but for queries without any
        neighbour.
    """
    names = list(lists.searched.domains)
    wrong = ~lists.hit[:, 0] & (lists.position[:, 0] >= 0)
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (lists.domain[wrong], lists.item_domain[wrong, 0]), 1)
    n_queries = np.bincount(lists.domain, minlength=len(names))
    asked = np.flatnonzero(n_queries)
    table = 100 * counts[asked] / n_queries[asked, None]
    return pd.DataFrame(table, index=pd.Index([names[i] for i in asked], name="query"), columns=names)


@dataclass(frozen=True)
class Purity:
    """What a region holds: how many images, and the share of the most frequent domain and of the most frequent class.

    Shares are in percent of the images. same_class: mean share of relevant items among the k nearest of its queries, in
    percent; NaN where it holds no query.
    """

    n_images: int
    n_queries: int
    domain: str
    percent_domain: float
    label: str
    percent_label: float
    same_class: float


def purity(points: pd.DataFrame, lists: Lists, rows: Int[np.ndarray, "point"]) -> Purity:
    """Describe a region of the map.

    Args:
        points: domain, class and query (row in `lists`, -1 where a point is none) of every point.
        lists: the neighbours of the queries.
        rows: which points the region holds.

    Raises:
        ValueError: no points at all.
    """
    if not len(rows):
        raise ValueError("a region without points has no purity")
    region = points.iloc[rows]
    domains = region["domain"].value_counts()
    labels = region.groupby(["domain", "class"], observed=True, sort=False).size()
    (of_domain, label), n_label = labels.idxmax(), int(labels.max())
    queries = region["query"].to_numpy()
    queries = queries[queries >= 0]
    same = 100 * float(lists.hit[queries].mean()) if len(queries) else float("nan")
    shares = (100 * int(domains.iloc[0]) / len(region), 100 * n_label / len(region))
    return Purity(
        len(region), len(queries), str(domains.index[0]), shares[0], f"{label} ({of_domain})", shares[1], same
    )


def confused_domains(lists: Lists, queries: Int[np.ndarray, "query"]) -> pd.DataFrame:
    """Count which domains' items stand near some queries although they are of another domain, the most frequent first.

    Returns: domain, n_queries (that have such an item among their k nearest), percent (of the queries), best (the
        highest rank at which one stands, 1 upwards).
    """
    astray, item = lists.astray[queries], lists.item_domain[queries]
    rows = []
    for number, name in enumerate(lists.searched.domains):
        here = astray & (item == number)
        if here.any():
            n_queries = int(here.any(axis=1).sum())
            best = int(here.any(axis=0).argmax()) + 1
            rows.append((name, n_queries, 100 * n_queries / len(queries), best))
    table = pd.DataFrame(rows, columns=["domain", "n_queries", "percent", "best"])
    return table.sort_values("n_queries", ascending=False, kind="stable", ignore_index=True)


def nearest_confusions(lists: Lists, queries: Int[np.ndarray, "query"], n: int = 6) -> pd.DataFrame:
    """Tabulate the nearest items of another domain among the neighbours of some queries, one a query, nearest first.

    Returns: query (row in `lists`), rank (1 upwards), position, domain, path, similarity.
    """
    queries = np.asarray(queries, dtype=np.int64)
    astray = lists.astray[queries]
    some, rank = astray.any(axis=1), astray.argmax(axis=1)
    queries, rank = queries[some], rank[some]
    similarity = lists.similarity[queries, rank]
    order = np.argsort(-similarity, kind="stable")[:n]
    places = [
        lists.searched.locate(int(lists.position[q, r])) for q, r in zip(queries[order], rank[order], strict=True)
    ]
    table = {
        "query": queries[order],
        "rank": rank[order] + 1,
        "position": lists.position[queries[order], rank[order]],
        "domain": [domain for domain, _ in places],
        "path": [path for _, path in places],
        "similarity": similarity[order],
    }
    return pd.DataFrame(table)


def found_by(lists: Lists, position: int) -> Int[np.ndarray, "query"]:
    """Return the queries that have an item of the merged index among their k nearest, nearest first."""
    row, rank = np.nonzero(lists.position == position)
    return row[np.argsort(-lists.similarity[row, rank], kind="stable")]

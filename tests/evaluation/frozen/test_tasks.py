"""Tasks of whole images: who is asked for what, and the figures of encoders that know everything or nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from udonlib.data.catalog import Catalog, Domain, Split
from udonlib.data.storage import Store
from udonlib.evaluation.frozen import tasks
from udonlib.evaluation.frozen.tasks import ClassTokens, classification, deal_images, retrieval, together
from udonlib.models.heads import unit


def split(name: str, labels: list[int] | np.ndarray, prefix: str = "") -> Split:
    labels = np.array(labels).reshape(len(labels), -1)
    return Split(name, tuple(f"{prefix or name}{i}" for i in range(len(labels))), labels)


def rows_of(domain: Domain) -> dict[str, int]:
    paths = [path for part in (domain.queries("test"), domain.index("test")) for path in part.paths]
    return {path: row for row, path in enumerate(dict.fromkeys(paths))}


def one_hot(domain: Domain, dim: int = 10) -> torch.Tensor:
    labels = {}
    for part in (domain.index("test"), domain.queries("test")):
        labels |= dict(zip(part.paths, part.labels[:, 0].tolist(), strict=True))
    return torch.eye(dim)[[labels[path] for path in rows_of(domain)]]


def test_half_of_each_class_is_labelled_where_queries_are_their_own_index():
    domain = Domain("a", {"test": split("test", [0] * 8 + [1] * 5 + [2])})
    dealt = deal_images(domain, rows_of(domain), 0)
    assert np.bincount(dealt.labels).tolist() == [4, 2]
    assert np.bincount(dealt.answers[:, 0]).tolist() == [4, 3]  # the only image of class 2 is on neither side
    assert not set(dealt.labelled) & set(dealt.asked)
    assert dealt.paths == tuple(f"test{row}" for row in dealt.asked)
    assert not np.array_equal(dealt.asked, deal_images(domain, rows_of(domain), 1).asked)


def test_an_index_of_its_own_is_labelled_but_for_other_classes_and_what_is_asked_for():
    index = Split("index", ("i0", "i1", "i2", "test0"), np.array([[0], [1], [7], [0]]))
    domain = Domain("a", {"test": split("test", [0, 0, 1, 2]), "index": index})
    dealt = deal_images(domain, rows_of(domain), 0)
    rows = rows_of(domain)
    assert dealt.labelled.tolist() == [rows["i0"], rows["i1"]]
    assert dealt.labels.tolist() == [0, 1]
    assert dealt.paths == ("test0", "test1", "test2")  # of class 2 nothing is labelled


def test_images_that_cannot_be_read_are_neither_labelled_nor_asked_for():
    domain = Domain("a", {"test": split("test", [0] * 4 + [1] * 4)})
    rows = {path: row for path, row in rows_of(domain).items() if path not in ("test1", "test5")}
    dealt = deal_images(domain, rows, 0)
    assert {*dealt.labelled, *dealt.asked} == set(rows.values())


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 0, 1, 2], []])
def test_fewer_than_two_classes_make_no_task(labels):
    domain = Domain(
        "a",
        {"test": Split("test", tuple(map(str, range(len(labels)))), np.array(labels, dtype=np.int64).reshape(-1, 1))},
    )
    assert deal_images(domain, rows_of(domain), 0) is None
    index = split("index", [5, 5, 0])
    domain = Domain("a", {"test": split("test", [0, 1]), "index": index})
    assert deal_images(domain, rows_of(domain), 0) is None


def test_large_domains_are_cut_to_some_classes_and_labelled_images(monkeypatch):
    monkeypatch.setattr(tasks, "MOST_CLASSES", 3)
    monkeypatch.setattr(tasks, "MOST_LABELLED", 2)
    domain = Domain("a", {"test": split("test", np.repeat(np.arange(6), 10))})
    dealt = deal_images(domain, rows_of(domain), 0)
    classes, counts = np.unique(dealt.labels, return_counts=True)
    assert counts.tolist() == [2, 2, 2]
    assert np.unique(dealt.answers).tolist() == classes.tolist()
    assert len(dealt.asked) == 15


def test_an_image_of_several_labels_is_named_rightly_by_any():
    queries = Split("test", ("q0", "q1", "q2"), np.array([[0, 1], [1, -1], [2, 0]]))
    index = Split("index", tuple("abcdef"), np.array([[0], [0], [1], [1], [2], [2]]))
    domain = Domain("a", {"test": queries, "index": index})
    dealt = deal_images(domain, rows_of(domain), 0)
    eye = torch.eye(3)
    vectors = torch.cat([eye[[1, 1, 1]], eye[[0, 0, 1, 1, 2, 2]]])  # every query looks like class 1
    found = {part["metric"][0]: part["score"].tolist() for part in classification("a", dealt, {"e": vectors}, 0)}
    assert found == {"logistic": [1, 1, 0], "knn": [1, 1, 0]}


def test_an_encoder_that_knows_the_classes_is_right_and_one_that_says_the_same_is_right_by_chance():
    domain = Domain("a", {"test": split("test", np.repeat(np.arange(4), 6))})
    vectors = {"knows": one_hot(domain), "constant": torch.ones(24, 10) / 10**0.5}
    dealt = deal_images(domain, rows_of(domain), 0)
    parts = list(classification("a", dealt, vectors, 0))
    means = {(part["encoder"][0], part["metric"][0]): part["score"].mean() for part in parts}
    assert means["knows", "logistic"] == means["knows", "knn"] == 1
    assert means["constant", "logistic"] == means["constant", "knn"] == 0.25
    assert all(part["path"].tolist() == list(dealt.paths) for part in parts)


def catalog_of(tmp_path: Path, *domains: Domain) -> Catalog:
    return Catalog("made up", tmp_path, domains, Store(tmp_path))


def test_retrieval_is_in_the_merged_index_of_all_domains(tmp_path):
    one = Domain("one", {"test": split("test", [0, 0, 1, 1], "one")})
    two = Domain("two", {"test": split("test", [0, 0, 1, 1], "two")})
    catalog = catalog_of(tmp_path, one, two)
    knows = {"one": one_hot(one), "two": one_hot(two)}
    apart = {name: torch.cat([v, torch.full((4, 1), float(name == "two"))], 1) for name, v in knows.items()}
    tokens = {
        d.name: ClassTokens(rows_of(d), {"mixes": knows[d.name], "parts": unit(apart[d.name])}) for d in (one, two)
    }
    parts = list(retrieval(catalog, tokens, ["mixes", "parts"]))
    r = {(p["encoder"][0], p["domain"][0]): p["score"].tolist() for p in parts if p["metric"][0] == "r_at_1"}
    assert r["parts", "one"] == r["parts", "two"] == [1] * 4
    # Equal similarity to images of both domains: the lower position wins, which is of domain one.
    assert (r["mixes", "one"], r["mixes", "two"]) == ([1] * 4, [0] * 4)
    assert {p["metric"][0] for p in parts} == {"r_at_1", "mmp_at_5"}


def test_unread_images_are_neither_queries_nor_found(tmp_path):
    domain = Domain("one", {"test": split("test", [0, 0, 1, 1, 1])})
    rows = {"test0": 0, "test2": 1, "test4": 2}
    tokens = {"one": ClassTokens(rows, {"e": torch.eye(10)[[0, 1, 1]]})}
    found = next(retrieval(catalog_of(tmp_path, domain), tokens, ["e"]))
    assert found["path"].tolist() == ["test0", "test2", "test4"]
    assert found["score"].tolist() == [0, 1, 1]


def test_together_is_the_unit_vectors_side_by_side_so_that_cosines_are_averaged():
    generator = torch.Generator().manual_seed(0)
    a, b = 100 * torch.randn(7, 3, generator=generator), torch.randn(7, 5, generator=generator)
    both = together([a, b])
    expected = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        norms = [sum(v * v for v in z) ** 0.5 for z in (x, y)]
        expected.append([v / n / 2**0.5 for z, n in zip((x, y), norms, strict=True) for v in z])
    torch.testing.assert_close(both, torch.tensor(expected))
    torch.testing.assert_close(both @ both.T, (unit(a) @ unit(a).T + unit(b) @ unit(b).T) / 2)
    torch.testing.assert_close(together([a[:, None].expand(7, 2, 3), b[:, None].expand(7, 2, 5)])[:, 1], both)

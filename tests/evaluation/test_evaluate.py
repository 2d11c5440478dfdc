"""Evaluation of made-up embeddings of made-up catalogs, against loops that follow the definition."""

import inspect
import json
import os
import queue
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from udonlib.data.catalog import Catalog, Domain, Split, load_catalog
from udonlib.data.decoding import ImageError
from udonlib.data.images import ImageReader
from udonlib.data.storage import Store
from udonlib.evaluation.evaluate import evaluate, loading, pixels
from udonlib.evaluation.files import read_table, save_outcomes, save_table
from udonlib.files import DiskError

DIM = 6


def split(name, images):
    """Make a split of (path, labels)."""
    width = max(len(labels) for _, labels in images)
    padded = [[*labels, *[-1] * (width - len(labels))] for _, labels in images]
    return Split(name, tuple(path for path, _ in images), np.array(padded, dtype=np.int64))


def numbered(prefix, labels):
    return [(f"{prefix}_{i}", label if isinstance(label, list) else [label]) for i, label in enumerate(labels)]


@pytest.fixture
def catalog(tmp_path):
    """Three domains that use the same labels and even the same paths: plain, like Met, and like GLDv2."""
    test = numbered("a", [0, 0, 0, 1, 1, 2])
    plain = Domain(
        "plain", {"train": split("train", [("t", [9])]), "val": split("val", test[:4]), "test": split("test", test)}
    )
    train = numbered("x", [0, 0, 1, 2, 2, 2, [1]])
    met = Domain(
        "met",
        {
            "train": split("train", train),
            "val": split("val", numbered("v", [0, 2])),
            "small_index": split("small_index", train[1:5]),
            "test": split("test", [*numbered("q", [0, 1, 7]), train[3]]),  # 7 is not in the index; x_3 is in it
            "index": split("index", train),
        },
    )
    val = numbered("a", [5, 5, 6])
    queries = numbered("q", [[0, 1], [1], [2, 0], [3]])
    gld = Domain(
        "gld",
        {
            "train": split("train", [("t", [9])]),
            "val": split("val", val),
            "test": split("test", queries),
            "index": split("index", [*numbered("i", [[0], [1, 0], [1], [2], [4]]), *val]),
        },
    )
    return Catalog("made up", tmp_path, (plain, met, gld), Store(tmp_path))


class MadeUp:
    """Images that hold their own number, and the random features that belong to it. Counts what is read."""

    def __init__(self, catalog, bad=(), seed=0):
        self.catalog, self.bad, self.read = catalog, set(bad), []
        names = {(d.name, path): None for d in catalog.domains for s in d.splits.values() for path in s.paths}
        self.numbers = {name: i for i, name in enumerate(names)}
        self.features = torch.randn(len(names), DIM, generator=torch.Generator().manual_seed(seed))

    def load(self, domain, split_name, batches):
        paths = self.catalog[domain].splits[split_name].paths
        for batch in batches:
            kept = [i for i in batch if (domain, paths[i]) not in self.bad]
            self.read += [(domain, paths[i]) for i in batch]
            images = torch.zeros(len(kept), 3, 2, 2, dtype=torch.uint8)
            images[:, 0, 0, 0] = torch.tensor([self.numbers[domain, paths[i]] for i in kept], dtype=torch.uint8)
            yield images, kept

    def embed(self, images):
        return self.features[images[:, 0, 0, 0].long()]


def unit(features):
    return torch.nn.functional.normalize(features, dim=1)


def linear(seed):
    weight = torch.randn(DIM, 4, generator=torch.Generator().manual_seed(seed))
    return lambda features: unit(features @ weight)


def loop_evaluation(made_up, subset, head, domain, index_domains, k):
    """R@1, mMP@k and neighbours of each readable query of one domain, by the definition."""
    items = [
        (d, path, set(labels.tolist()) - {-1})
        for d in index_domains
        for path, labels in zip(d.index(subset).paths, d.index(subset).labels, strict=True)
        if (d.name, path) not in made_up.bad
    ]
    results = []
    for path, labels in zip(domain.queries(subset).paths, domain.queries(subset).labels, strict=True):
        if (domain.name, path) in made_up.bad:
            continue
        own = set(labels.tolist()) - {-1}
        vector = {name: head(made_up.features[[number]])[0].double() for name, number in made_up.numbers.items()}
        others = [item for item in items if (item[0].name, item[1]) != (domain.name, path)]
        others.sort(key=lambda item: -float(vector[domain.name, path] @ vector[item[0].name, item[1]]))
        relevant = [d is domain and bool(own & its) for d, _, its in others]
        n = sum(relevant)
        hits = relevant[:k]
        mmp = sum(relevant[: min(k, n)]) / min(k, n) if n else 0.0
        results.append((float(hits[0]), mmp, n, [(d.name, p) for d, p, _ in others[:k]], hits))
    return results, len(items)


@pytest.mark.parametrize("subset", ["val", "test"])
@pytest.mark.parametrize("bad", [(), (("plain", "a_1"), ("met", "x_1"), ("met", "v_0"), ("gld", "i_1"))])
def test_evaluation_equals_a_loop_over_queries_for_every_embedder_index_and_domain(catalog, subset, bad):
    made_up = MadeUp(catalog, bad)
    student, teachers = linear(1), {name: linear(i) for i, name in enumerate(catalog.names, start=2)}
    found = evaluate(
        catalog,
        subset,
        made_up.load,
        made_up.embed,
        {"student": student, "teacher": teachers},
        {"features": lambda images: unit(made_up.embed(images))},
        batch_size=2,
        chunk_size=3,
    )
    table = found.table.set_index(["embedder", "domain", "index"])
    for embedder in ("student", "teacher", "features"):
        for index in ("merged", "separate"):
            means = []
            for domain in catalog.domains:
                head = {"student": student, "teacher": teachers[domain.name], "features": unit}[embedder]
                searched = catalog.domains if index == "merged" else (domain,)
                expected, n_index = loop_evaluation(made_up, subset, head, domain, searched, 5)
                row = table.loc[embedder, domain.name, index]
                assert (row["n_queries"], row["n_index"]) == (len(expected), n_index)
                assert row["n_without_positive"] == sum(n_positives == 0 for _, _, n_positives, _, _ in expected)
                means.append([100 * np.mean([e[i] for e in expected]) for i in (0, 1)])
                assert row[["r_at_1", "mmp_at_5"]].tolist() == pytest.approx(means[-1])
                neighbours = found.neighbours[embedder, domain.name, index]
                for query, (_, _, _, names, hits) in enumerate(expected):
                    assert neighbours.of(query) == names
                    assert neighbours.hit[query, : len(hits)].tolist() == hits
                chosen = found.outcomes.query("embedder == @embedder and domain == @domain.name and index == @index")
                for i, column in enumerate(["r_at_1", "mmp_at_5", "n_positives"]):
                    assert chosen[column].tolist() == pytest.approx([e[i] for e in expected])
            mean = table.loc[embedder, "mean", index]
            rows = [table.loc[embedder, name, index] for name in catalog.names]
            assert mean["n_without_positive"] == sum(row["n_without_positive"] for row in rows)
            assert mean[["r_at_1", "mmp_at_5"]].tolist() == pytest.approx(np.mean(means, axis=0).tolist())
    assert set(zip(found.skipped["domain"], found.skipped["path"], strict=True)) <= set(bad)
    assert len(found.skipped) == len([name for name in bad if name in made_up.read])


def test_neither_batches_nor_chunks_change_the_result(catalog):
    made_up = MadeUp(catalog)
    results = [
        evaluate(catalog, "test", made_up.load, made_up.embed, {"student": linear(1)}, batch_size=b, chunk_size=c)
        for b, c in [(1, 1), (3, 4), (256, 2**16)]
    ]
    for other in results[1:]:
        pd.testing.assert_frame_equal(other.table, results[0].table, check_exact=True)
        pd.testing.assert_frame_equal(other.outcomes, results[0].outcomes, check_exact=True)
        for key, neighbours in other.neighbours.items():
            assert np.array_equal(neighbours.position, results[0].neighbours[key].position)


def test_every_image_is_read_once_and_progress_ends_at_the_number_of_images(catalog):
    made_up, told = MadeUp(catalog), []
    heads = {"student": linear(1), "teacher": {name: linear(2) for name in catalog.names}}
    evaluate(catalog, "test", made_up.load, made_up.embed, heads, progress=lambda done, n: told.append((done, n)))
    assert len(made_up.read) == len(set(made_up.read)) == told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


class Thread:
    """One of several helpers that are threads of this process."""

    def __init__(self, rank, queues):
        self.rank, self.size, self._queues = rank, len(queues), queues

    def send(self, value):
        self._queues[self.rank].put(value)

    def receive(self, rank):
        return self._queues[rank].get(timeout=60)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_share_what_is_read_and_the_first_one_finds_what_one_finds(catalog, size):
    bad = (("plain", "a_1"), ("met", "x_1"), ("gld", "i_1"))
    heads = {"student": linear(1), "teacher": {name: linear(2) for name in catalog.names}}
    alone = MadeUp(catalog, bad)
    wanted = evaluate(catalog, "test", alone.load, alone.embed, heads, batch_size=2, chunk_size=4)
    queues = [queue.Queue() for _ in range(size)]
    readers = [MadeUp(catalog, bad) for _ in range(size)]

    def find(rank):
        it, helpers = readers[rank], Thread(rank, queues)
        return evaluate(catalog, "test", it.load, it.embed, heads, batch_size=2, chunk_size=4, helpers=helpers)

    with ThreadPoolExecutor(size) as pool:
        found, *others = pool.map(find, range(size))
    pd.testing.assert_frame_equal(found.table, wanted.table, check_exact=True)
    pd.testing.assert_frame_equal(found.outcomes, wanted.outcomes, check_exact=True)
    assert found.skipped.equals(wanted.skipped)
    for key, neighbours in wanted.neighbours.items():
        assert np.array_equal(found.neighbours[key].similarity, neighbours.similarity)
    assert all(other.table.empty and not other.neighbours for other in others)
    assert sorted(image for reader in readers for image in reader.read) == sorted(alone.read)
    assert max(len(reader.read) for reader in readers) - min(len(reader.read) for reader in readers) <= 6
    assert all(queue.empty() for queue in queues)


def test_a_query_is_left_out_by_identity_and_its_exact_copy_is_found(catalog):
    made_up = MadeUp(catalog)
    copies = [made_up.numbers["plain", path] for path in ("a_0", "a_1", "a_2")]
    made_up.features[copies] = made_up.features[copies[0]].clone()
    neighbours = evaluate(catalog, "test", made_up.load, made_up.embed, {"student": unit}).neighbours
    first_two = [neighbours["student", "plain", "merged"].of(query)[:2] for query in range(3)]
    assert [[path for _, path in pair] for pair in first_two] == [["a_1", "a_2"], ["a_0", "a_2"], ["a_0", "a_1"]]


def test_a_query_that_stands_in_a_separate_index_split_is_not_its_own_neighbour(catalog):
    made_up = MadeUp(catalog)
    neighbours = evaluate(catalog, "test", made_up.load, made_up.embed, {"student": unit}).neighbours
    for index in ("merged", "separate"):
        of_met = neighbours["student", "met", index]
        assert ("met", "x_3") not in of_met.of(of_met.query_paths.index("x_3"))


def test_the_same_path_in_two_domains_is_two_images(catalog):
    made_up = MadeUp(catalog)
    same = [made_up.numbers["plain", "a_0"], made_up.numbers["gld", "a_0"]]
    made_up.features[same] = made_up.features[same[0]].clone()
    neighbours = evaluate(catalog, "test", made_up.load, made_up.embed, {"student": unit}).neighbours
    of_plain = neighbours["student", "plain", "merged"]
    assert of_plain.of(0)[0] == ("gld", "a_0")
    assert not of_plain.hit[0, 0]


def test_an_embedder_may_leave_a_domain_out_and_has_no_mean_then(catalog):
    made_up = MadeUp(catalog)
    heads = {"teacher": {"plain": linear(1), "met": linear(2), "gld": linear(3)}}
    whole = evaluate(catalog, "test", made_up.load, made_up.embed, heads)
    heads["teacher"]["met"] = None
    part = evaluate(catalog, "test", made_up.load, made_up.embed, heads)
    rows = whole.table[whole.table["domain"].isin(["plain", "gld"])].reset_index(drop=True)
    assert part.table.equals(rows)
    assert part.with_intervals()["r_at_1_low"].notna().all()
    assert {domain for _, domain, _ in part.neighbours} == {"plain", "gld"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": "train"}, "subset is 'train'; valid: 'val', 'test'"),
        ({"heads": {}}, "nothing to evaluate"),
        ({"embed": None}, "nothing to evaluate"),
        ({"heads": {"teacher": {"plain": unit, "met": unit}}}, "embedder 'teacher' has no head for gld"),
        (
            {"heads": {"student": lambda features: 2 * unit(features)}},
            r"'student': embedding of plain, 'a_0' has norm 2",
        ),
        (
            {"heads": {"student": lambda f: f * torch.nan}},
            r"'student': embedding of plain, 'a_0' has norm nan; valid: 1",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_a_clear_message(catalog, change, message):
    made_up = MadeUp(catalog)
    arguments = {"subset": "test", "embed": made_up.embed, "heads": {"student": unit}} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(evaluate)(
            catalog,  # without the tests' type checks, which would come first
            load=made_up.load,
            **arguments,
        )


@pytest.mark.parametrize(("split_name", "prefix"), [("test", "q_"), ("index", "i_")])
def test_a_domain_whose_queries_or_index_cannot_be_read_is_refused(catalog, split_name, prefix):
    bad = [("gld", path) for path in catalog["gld"].splits[split_name].paths]
    made_up = MadeUp(catalog, bad)
    n = len(bad)
    with pytest.raises(ValueError, match=f"domain 'gld': none of the {n} images of '{split_name}' can be read"):
        evaluate(catalog, "test", made_up.load, made_up.embed, {"student": unit})


# --- real images -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    return write_uned_tree(tmp_path / "tree", domains=("emoji", "flags"), index_of="flags")


@pytest.mark.parametrize("n_workers", [0, 1])
def test_images_are_read_from_a_catalog_and_a_broken_one_is_left_out_and_named(tree, n_workers):
    catalog = load_catalog(str(tree))
    path = catalog["flags"].splits["test"].paths[1]
    (tree / "images" / path).write_bytes(b"no image")
    reader = ImageReader(catalog, 16, "eval", on_bad_image="skip")
    found = evaluate(catalog, "test", loading(reader, n_workers), image_embedders={"pixels": pixels}, batch_size=3)
    assert found.skipped.to_numpy().tolist() == [["flags", "test", path]]
    n_queries = found.table.set_index(["domain", "index"])["n_queries"]
    assert n_queries["flags", "merged"] == len(catalog["flags"].splits["test"]) - 1
    assert n_queries["emoji", "merged"] == len(catalog["emoji"].splits["test"])
    assert path not in found.neighbours["pixels", "flags", "merged"].query_paths


def test_a_broken_image_stops_the_evaluation_where_that_is_wanted(tree):
    catalog = load_catalog(str(tree))
    path = catalog["emoji"].splits["test"].paths[0]
    (tree / "images" / path).write_bytes(b"no image")
    with pytest.raises(ImageError, match=path):
        evaluate(catalog, "test", loading(ImageReader(catalog, 16, "eval")), image_embedders={"pixels": pixels})


def test_pixels_are_unit_vectors_blind_to_brightness_and_zero_where_flat():
    image = torch.randint(0, 200, (1, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = pixels(torch.cat([image, image + 50, torch.full_like(image, 7)]))
    torch.testing.assert_close(both[0], both[1])
    assert both.norm(dim=1).tolist() == pytest.approx([1, 1, 0])
    assert both.shape == (3, 768)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_intervals_enclose_the_figures_and_repeat_with_their_seed(catalog):
    made_up = MadeUp(catalog)
    found = evaluate(catalog, "test", made_up.load, made_up.embed, {"student": linear(1)}, k=3)
    table = found.with_intervals(seed=4, n_resamples=200)
    for metric in ("r_at_1", "mmp_at_3"):
        assert (table[f"{metric}_low"] <= table[metric] + 1e-4).all()
        assert (table[f"{metric}_high"] >= table[metric] - 1e-4).all()
    pd.testing.assert_frame_equal(table, found.with_intervals(seed=4, n_resamples=200))
    assert list(found.table.columns) == [
        *("embedder", "domain", "index", "n_queries", "n_without_positive", "n_index", "r_at_1", "mmp_at_3"),
    ]


def test_a_saved_table_reads_back_as_it_was_from_both_files(catalog, tmp_path):
    made_up = MadeUp(catalog)
    table = evaluate(catalog, "test", made_up.load, made_up.embed, {"student": linear(1)}).table
    save_table(table, tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path / "evaluation.csv"), table, check_exact=False, rtol=1e-12)
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    pd.testing.assert_frame_equal(pd.DataFrame(rows), table, check_exact=False, rtol=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.csv", "evaluation.json"]


def test_a_table_that_cannot_be_finished_leaves_the_one_before(catalog, tmp_path, monkeypatch):
    made_up = MadeUp(catalog)
    table = evaluate(catalog, "test", made_up.load, made_up.embed, {"student": linear(1)}).table
    save_table(table, tmp_path)
    before = (tmp_path / "evaluation.json").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="no space left"):
        save_table(table.head(1), tmp_path)
    assert (tmp_path / "evaluation.json").read_bytes() == before


# Names that libraries read as numbers, dates, truth or nothing.
ODD = ["NA", "null", "nan", "None", "True", "007", "1e5", "2020-01-01", "inf", "#N/A", "a,b", 'q"u', " sp ", "-"]


def test_names_are_read_back_as_they_were_written(tmp_path):
    table = pd.DataFrame({"embedder": "student", "domain": ODD, "index": "merged", "r_at_1": 50.0, "n_index": 7})
    table.loc[3, "r_at_1"] = np.nan
    save_table(table, tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path / "evaluation.csv"), table)
    outcomes = table.assign(path=ODD[::-1])
    save_outcomes(outcomes, tmp_path / "outcomes.csv.gz")
    pd.testing.assert_frame_equal(read_table(tmp_path / "outcomes.csv.gz"), outcomes)

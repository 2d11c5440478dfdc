"""The tables of gaps against counting by hand, on small random outcomes and neighbours."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import DOMAINS, outcomes, write_run, write_specialists
from udonlib.data.catalog import Catalog, Domain, Split, load_catalog
from udonlib.data.storage import Store
from udonlib.errors import UserError
from udonlib.evaluation.evaluate import Evaluation, MergedIndex, Neighbours
from udonlib.evaluation.outcomes import EMBEDDERS
from udonlib.lab.compare import gaps
from udonlib.presets import GapParams
from udonlib.runs import specialists
from udonlib.runs.run import load_run

N_INDEX = {"emoji": 4, "flags": 3, "earth": 5}
MERGED = MergedIndex(tuple(N_INDEX), tuple(tuple(f"{d}/{i}" for i in range(n)) for d, n in N_INDEX.items()))


def neighbours(position: np.ndarray, embedder: str, domain: str, n_right: int = 2) -> Neighbours:
    """Neighbours of a domain's queries; the first `n_right` index images of the domain are relevant to each of them."""
    start = sum(N_INDEX[name] for name in list(N_INDEX)[: list(N_INDEX).index(domain)])
    hit = (position >= start) & (position < start + n_right)
    paths = tuple(f"{domain}/q{i}" for i in range(len(position)))
    return Neighbours(embedder, domain, "merged", paths, position, np.zeros(position.shape, np.float32), hit, MERGED)


@st.composite
def ranked(draw, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Two lists of k different positions for each of some queries."""
    n_queries = draw(st.integers(1, 6))
    order = st.permutations(range(sum(N_INDEX.values())))
    lists = [np.array([draw(order)[:k] for _ in range(n_queries)], np.int64) for _ in range(2)]
    return lists[0], lists[1]


BITS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


# Pairing


def test_levels_are_means_in_percent_and_who_lacks_a_domain_has_no_mean():
    table = outcomes({"student": {"emoji": [1, 0, 1, 0], "flags": [1, 1]}, "specialist": {"flags": [0, 1]}})
    found = gaps.levels(table).set_index(["embedder", "domain"])["mean"]
    assert found.to_dict() == {
        ("student", "emoji"): 50.0,
        ("student", "flags"): 100.0,
        ("student", "mean"): 75.0,
        ("specialist", "flags"): 50.0,
    }


@settings(max_examples=15)  # each draws resamples
@given(st.data())
def test_differences_are_means_over_queries_then_domains(data):
    right = {}
    for domain in ("emoji", "flags"):
        student = data.draw(BITS)
        teacher = data.draw(st.lists(st.integers(0, 1), min_size=len(student), max_size=len(student)))
        right[domain] = (student, teacher)
    table = outcomes({e: {d: pair[i] for d, pair in right.items()} for i, e in enumerate(("student", "teacher"))})
    found = gaps.between_embedders(table).set_index("domain")
    naive = {d: 100 * (np.mean(teacher) - np.mean(student)) for d, (student, teacher) in right.items()}
    naive["mean"] = np.mean(list(naive.values()))
    assert found["mean"].to_dict() == pytest.approx(naive)
    assert (found["low"] <= found["mean"] + 1e-9).all()
    assert (found["high"] >= found["mean"] - 1e-9).all()
    assert set(found["one"]) == {"teacher"}
    assert set(found["other"]) == {"student"}
    assert found["n_queries"].to_dict() == {d: len(s) for d, (s, _) in right.items()} | {"mean": len(table) // 4}


def test_the_interval_of_a_difference_is_paired_by_query():
    student = np.random.default_rng(0).integers(0, 2, 200)
    teacher = student.copy()
    teacher[:4] = 1 - teacher[:4]
    table = outcomes({"student": {"emoji": student.tolist()}, "teacher": {"emoji": teacher.tolist()}})
    found = gaps.between_embedders(table).iloc[0]
    # 4 of 200 differ: a standard deviation of at most sqrt(0.02 / 200) = 1 point; unpaired it would be 5.
    assert found["high"] - found["low"] < 5
    level = gaps.levels(table).iloc[0]
    assert level["high"] - level["low"] > 10
    same = outcomes({"student": {"emoji": student.tolist()}, "teacher": {"emoji": student.tolist()}})
    assert gaps.between_embedders(same)[["mean", "low", "high"]].to_numpy().tolist() == [[0, 0, 0]] * 2


def test_each_pair_of_embedders_is_compared_on_the_domains_that_both_have():
    table = outcomes(
        {
            "specialist": {"flags": [1, 1]},
            "teacher": {"emoji": [1], "flags": [1, 0]},
            "student": {"emoji": [0], "flags": [0, 0]},
        }
    )
    found = gaps.between_embedders(table).set_index(["one", "other", "domain"])["mean"].to_dict()
    assert found == {
        ("teacher", "student", "emoji"): 100.0,
        ("teacher", "student", "flags"): 50.0,
        ("teacher", "student", "mean"): 75.0,
        ("specialist", "student", "flags"): 100.0,
        ("specialist", "student", "mean"): 100.0,
        ("specialist", "teacher", "flags"): 50.0,
        ("specialist", "teacher", "mean"): 50.0,
    }


# Frequency


@given(npst.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 9)), st.integers(1, 6))
def test_bins_rise_with_the_count_and_keep_equal_counts_together(counts, n_bins):
    numbers = gaps.frequency_bins(counts, n_bins)
    order = np.argsort(counts, kind="stable")
    assert (np.diff(numbers[order])[np.diff(counts[order]) == 0] == 0).all()
    assert (np.diff(numbers[order]) >= 0).all()
    assert set(numbers) == set(range(len(set(numbers))))
    assert len(set(numbers[counts > 0])) <= n_bins
    assert not set(numbers[counts == 0]) & set(numbers[counts > 0])


@given(st.integers(1, 6), st.integers(6, 40), st.randoms(use_true_random=False))
def test_bins_of_different_counts_are_of_equal_size(n_bins, n_queries, random):
    counts = random.sample(range(1, 1000), n_queries)
    sizes = np.bincount(gaps.frequency_bins(np.array(counts, np.int64), n_bins))
    assert len(sizes) == n_bins
    assert sizes.max() - sizes.min() <= 1


def test_recall_by_frequency_is_the_mean_of_each_bin():
    right = {"student": {"emoji": [0, 1, 1, 1, 0]}, "teacher": {"emoji": [1, 1, 1, 0, 0]}}
    found = gaps.by_frequency(outcomes(right, {"emoji": [1, 2, 7, 9, 0]}), n_bins=2)
    student = found[found["embedder"] == "student"]
    assert student[["lowest", "highest", "n_queries", "mean"]].to_numpy().tolist() == [[1, 2, 2, 50], [7, 9, 2, 100]]
    lead = found[found["embedder"] == gaps.DIFFERENCE]
    assert lead["mean"].tolist() == [50.0, -50.0]
    assert ((lead["low"] <= lead["mean"]) & (lead["mean"] <= lead["high"])).all()


def test_queries_that_nobody_can_answer_are_left_out():
    right = {"student": {"emoji": [0, 0]}, "teacher": {"emoji": [0, 0]}}
    assert len(gaps.by_frequency(outcomes(right, {"emoji": [0, 0]}))) == 0


def test_training_images_are_counted_over_all_classes_of_a_query(tmp_path):
    def split(name: str, labels: list[list[int]]) -> Split:
        return Split(name, tuple(f"emoji/q{i}" for i in range(len(labels))), np.array(labels, np.int64))

    train = Split("train", tuple("abcdef"), np.array([[1], [1], [1], [2], [2], [8]], np.int64))
    test = split("test", [[1, -1], [2, 1], [2, 2], [5, -1]])
    seen = Domain("emoji", {"train": train, "val": test, "test": test})
    unseen = Domain("flags", {"train": train, "val": test, "test": Split("test", ("flags/q0",), np.array([[77]]))})
    catalog = Catalog("two", tmp_path, (seen, unseen), Store(tmp_path))
    table = outcomes(
        {"student": {"emoji": [1, 0, 0, 1], "flags": [1]}, "teacher": {"emoji": [1, 0, 0, 1], "flags": [1]}}
    )
    found = gaps.with_train_images(table, catalog)
    assert set(found["domain"]) == {"emoji"}
    rows = found[(found["index"] == "merged") & (found["embedder"] == "student")]
    assert rows["n_train"].tolist() == [3, 5, 2, 0]
    binned = gaps.by_frequency(found, "n_train", n_bins=2)
    assert binned[binned["embedder"] == "student"]["lowest"].tolist() == [0, 2, 5]


def test_classes_that_no_domain_trains_leave_no_rows(tmp_path):
    catalog = load_catalog(str(write_uned_tree(tmp_path)))
    paths = catalog["emoji"].queries("test").paths
    table = outcomes({"student": {"emoji": [0] * len(paths)}}).assign(path=[*paths, *paths])
    found = gaps.with_train_images(table, catalog)
    assert len(found) == 0
    assert len(gaps.by_frequency(found, "n_train")) == 0


# Neighbour lists


@given(ranked(), st.integers(1, 4))
def test_overlap_is_the_share_of_common_neighbours(lists, k):
    one, other = lists
    pair = [neighbours(one, "student", "flags"), neighbours(other, "teacher", "flags")]
    found = gaps.overlaps(pair, k)
    naive = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert found["overlap"].tolist() == pytest.approx(naive)
    back = gaps.overlaps([neighbours(other, "student", "flags"), neighbours(one, "teacher", "flags")], k)
    np.testing.assert_allclose(found[["overlap", "rbo"]], back[["overlap", "rbo"]])


@given(ranked())
def test_rank_biased_overlap_is_its_formula(lists):
    p, k = 0.8, 4
    found = gaps.overlaps([neighbours(part, e, "emoji") for part, e in zip(lists, EMBEDDERS, strict=False)], k)
    for rbo, a, b in zip(found["rbo"], lists[0].tolist(), lists[1].tolist(), strict=True):
        agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, k + 1)]
        naive = agreement[-1] * p**k + (1 - p) / p * sum(x * p ** (d + 1) for d, x in enumerate(agreement))
        assert rbo == pytest.approx(naive)


def test_the_same_lists_overlap_wholly_even_where_there_are_fewer_than_k():
    lists = np.array([[3, 1, 2, 0], [5, 4, -1, -1]])
    found = gaps.overlaps([neighbours(lists, "student", "emoji"), neighbours(lists, "teacher", "emoji")], 4)
    np.testing.assert_allclose(found[["overlap", "rbo"]], 1)
    apart = gaps.overlaps([neighbours(lists, "student", "emoji"), neighbours(lists + 6, "teacher", "emoji")], 2)
    np.testing.assert_allclose(apart[["overlap", "rbo"]], 0)


def test_agreement_at_the_first_ranks_counts_more():
    student = np.array([[0, 1, 2, 3]] * 2)
    teacher = np.array([[0, 7, 8, 9], [7, 8, 9, 0]])
    found = gaps.overlaps([neighbours(student, "student", "emoji"), neighbours(teacher, "teacher", "emoji")], 4)
    assert found["overlap"].tolist() == [0.25, 0.25]
    assert found["rbo"][0] > found["rbo"][1]


def test_overlaps_are_averaged_over_all_and_by_who_is_right():
    # Of emoji, positions 0 and 1 are right.
    student = np.array([[0, 1], [0, 5], [6, 7], [6, 1]])
    teacher = np.array([[1, 0], [5, 6], [0, 7], [8, 9]])
    pair = [neighbours(student, "student", "emoji"), neighbours(teacher, "teacher", "emoji")]
    found = gaps.overlap_means(gaps.overlaps(pair, 2)).set_index(["domain", "group"])
    wanted = {"all": 50.0, "both": 100.0, "student only": 50.0, "teacher only": 50.0, "neither": 0.0}
    for group, mean in wanted.items():
        assert found.loc[("emoji", group), "mean"] == found.loc[("mean", group), "mean"] == mean
        assert found.loc[("emoji", group), "n_queries"] == (4 if group == "all" else 1)


@given(ranked())
def test_first_neighbours_are_of_the_domain_where_the_index_holds_them(lists):
    parts = [neighbours(part, e, "flags", 1) for part, e in zip(lists, EMBEDDERS, strict=False)]
    found = gaps.first_neighbours(parts)
    for part in parts:
        naive = Counter()
        for query in range(len(part.query_paths)):
            domain, _ = part.of(query)[0]
            own = "right" if part.hit[query, 0] else "wrong class"
            naive[own if domain == "flags" else domain] += 1
        rows = found[found["embedder"] == part.embedder]
        assert dict(zip(rows["found"], rows["n_queries"], strict=True)) == dict(naive)
        assert rows["percent"].sum() == pytest.approx(100)


def test_a_query_without_any_neighbour_is_named_so():
    lists = np.array([[-1, -1]])
    found = gaps.first_neighbours([neighbours(lists, "student", "earth"), neighbours(lists, "teacher", "earth")])
    assert found["found"].tolist() == [gaps.NOTHING] * 2


def test_neighbours_of_different_queries_are_not_compared():
    one, other = np.array([[0, 1]]), np.array([[0, 1], [1, 0]])
    with pytest.raises(UserError, match="'emoji'.*different queries"):
        list(gaps.pairs([neighbours(one, "student", "emoji"), neighbours(other, "teacher", "emoji")]))


@pytest.fixture
def outputs(tmp_path) -> Path:
    write_uned_tree(tmp_path / "data")
    return tmp_path / "results"


def test_domains_may_be_called_by_digits(tmp_path):
    write_uned_tree(tmp_path / "data", domains=("1", "2"))
    outputs = tmp_path / "results"
    write_run(outputs, "taught", ("1", "2"))
    found = gaps.open_gaps(GapParams(run="taught", outputs=str(outputs), k=3, specialists="none"))
    assert list(found.outcomes["domain"].unique()) == ["1", "2"]


def test_specialists_search_once_and_again_when_one_of_them_changes(outputs, monkeypatch):
    run = load_run(str(write_run(outputs, "taught")))
    write_specialists(outputs)
    calls = []

    def search(specialists):
        calls.append([specialist.path.name for specialist in specialists])
        outcomes = pd.concat(pd.read_csv(s.path / "outcomes.csv.gz") for s in specialists)
        both = pd.concat([outcomes.assign(embedder=name) for name in ("specialist", "routed")])
        return Evaluation(pd.DataFrame(), both, {}, pd.DataFrame())

    monkeypatch.setattr(specialists, "evaluate_assembly", search)
    params = GapParams(run="taught", outputs=str(outputs), k=3)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    first, again = gaps.open_gaps(params), gaps.open_gaps(params)
    assert calls == [["specialist-emoji-s0-0", "specialist-flags-s0-0"]]
    assert set(first.outcomes["embedder"]) == {"student", "teacher", "specialist"}
    pd.testing.assert_frame_equal(first.outcomes, again.outcomes)
    table = outputs / "runs" / "specialist-emoji-s0-0" / "evaluation.csv"
    table.write_text(table.read_text().replace("1.0", "0.9"))
    gaps.open_gaps(params)
    assert len(calls) == 2
    assert len(list((outputs / "gaps").iterdir())) == 2
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before  # who looks writes nothing there


def test_domains_choose_among_the_runs_and_the_mean_over_all_goes(outputs):
    folder = write_run(outputs, "taught")
    record = {
        "kind": "validation",
        "step": 3,
        "table": [{"domain": d, "embedder": "student"} for d in (*DOMAINS, "mean")],
    }
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    values = {"run": "taught", "outputs": str(outputs), "k": 3}
    whole = gaps.open_gaps(GapParams(**values))
    assert whole.domains == DOMAINS
    assert whole.validation["domain"].tolist() == [*DOMAINS, "mean"]
    part = gaps.open_gaps(GapParams(**values, domains="flags"))
    assert part.domains == ("flags",)
    assert set(part.outcomes["domain"]) == {part.query_domain for part in part.neighbours} == {"flags"}
    assert part.validation["domain"].tolist() == ["flags"]
    assert part.catalog.names == DOMAINS  # the index stays that of all
    with pytest.raises(UserError, match="'domains': run 'taught' has no 'flaggs'; did you mean 'flags'"):
        gaps.open_gaps(GapParams(**values, domains="flaggs"))


def test_more_neighbours_than_were_kept_are_refused(outputs):
    write_run(outputs, "taught")
    with pytest.raises(UserError, match="parameter 'k': found 5, but run 'taught' kept 3; valid: 1 to 3"):
        gaps.open_gaps(GapParams(run="taught", outputs=str(outputs)))


def test_data_that_has_moved_is_read_where_it_is_now(outputs):
    write_run(outputs, "taught")
    moved = outputs.parent / "elsewhere"
    (outputs.parent / "data").rename(moved)
    found = gaps.open_gaps(GapParams(run="taught", outputs=str(outputs), k=3, data=str(moved)))
    assert found.catalog.root == moved


@pytest.mark.parametrize("by", ["data", "images"])
def test_a_run_whose_images_were_elsewhere_is_read_where_they_are_now(outputs, by):
    data = outputs.parent / "data"
    write_run(outputs, "taught", images=str(data / "images"))
    moved = outputs.parent / "elsewhere"
    if by == "data":
        data.rename(moved)
        values = {"data": str(moved)}
    else:
        (data / "images").rename(moved)
        values = {"images": str(moved)}
    found = gaps.open_gaps(GapParams(run="taught", outputs=str(outputs), k=3, **values))
    domain = found.catalog.domains[0]
    assert found.catalog.store.read(domain.queries("test").paths[0])

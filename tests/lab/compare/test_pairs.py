"""Two runs compared: what differs is what was written, and what cannot be compared is said."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.gaps import A, B
from tests.helpers.gaps import write_run as write_searched_run
from tests.helpers.runfolders import write_run
from udonlib.errors import UserError
from udonlib.lab.compare import pair_views, pairs
from udonlib.lab.compare.pairs import Pair, open_pair
from udonlib.runs.folder import RunFolder


def pair(tmp_path, a=A, b=B, domains="all", **changes) -> Pair:
    one = write_run(tmp_path, "one", a)
    other = write_run(tmp_path, "other", b, **changes)
    return open_pair(RunFolder(one), RunFolder(other), domains)


def test_differences_are_b_minus_a_of_the_same_queries(tmp_path):
    found = pair(tmp_path)
    assert found.notes == ()
    table = pairs.between_runs(found).set_index("domain")
    assert table.loc["emoji", ["n_queries", "a", "b", "mean"]].tolist() == pytest.approx([6, 50, 500 / 6, 200 / 6])
    assert table.loc["flags", ["n_queries", "a", "b", "mean"]].tolist() == pytest.approx([4, 25, 50, 25])
    assert table.loc["mean", ["n_queries", "a", "b", "mean"]].tolist() == pytest.approx([10, 37.5, 200 / 3, 175 / 6])
    assert (table["low"] < table["mean"]).all()
    assert (table["high"] > table["mean"]).all()
    half = pairs.between_runs(found, "mmp_at_5").set_index("domain")
    assert half["mean"].tolist() == pytest.approx((table["mean"] / 2).tolist())


def test_a_pair_of_one_run_with_itself_differs_in_nothing(tmp_path):
    run = RunFolder(write_run(tmp_path, "one", A))
    found = pairs.between_runs(open_pair(run, run))
    assert (found[["mean", "low", "high"]] == 0).all(axis=None)
    assert pairs.parameters(run, run).empty


def test_the_interval_is_paired_by_query(tmp_path):
    """What both find hard does not widen it: a run that is right in exactly one more of 100 alternating queries."""
    one = [0.0, 1.0] * 50
    other = [1.0, *one[1:]]
    table = pairs.between_runs(pair(tmp_path, {"emoji": one}, {"emoji": other})).set_index("domain")
    assert table.loc["emoji", "mean"] == pytest.approx(1)
    assert table.loc["emoji", "high"] < 5  # unpaired, it would reach beyond 14
    assert table.loc["emoji", "low"] == 0


def test_queries_that_changed_side_are_counted(tmp_path):
    counts = pairs.changed(pair(tmp_path)).set_index("domain")
    assert counts.loc["emoji"].to_dict() == {"n_queries": 6, "both": 2, "only A": 1, "only B": 3, "neither": 0}
    assert counts.loc["flags"].to_dict() == {"n_queries": 4, "both": 1, "only A": 0, "only B": 1, "neither": 2}
    assert counts.loc["all"].to_dict() == {"n_queries": 10, "both": 3, "only A": 1, "only B": 4, "neither": 2}


def test_other_domains_are_left_out_and_said(tmp_path):
    found = pair(tmp_path, a={"emoji": [1, 0], "cars": [1]}, b={"flags": [1, 0], "emoji": [1, 1]}, fingerprint="e" * 64)
    assert found.domains == ["emoji"]
    text = " ".join(found.notes)
    assert "other fingerprints (pictures, fingerprint ffffffffff; pictures, fingerprint eeeeeeeeee)" in text
    assert "Only A was tested on cars: left out." in text
    assert "Only B was tested on flags: left out." in text
    assert "The merged index of one run holds other domains" in text
    assert pairs.changed(found)["domain"].tolist() == ["emoji", "all"]


def test_other_queries_are_compared_where_they_agree(tmp_path):
    found = pair(tmp_path, a={"emoji": [1, 0, 0, 1, 1]}, b={"emoji": [1, 1, 0]})
    assert "only those are compared: emoji (3 of 5 and 3)." in " ".join(found.notes)
    assert pairs.between_runs(found)[["n_queries", "mean"]].to_numpy().tolist() == [[3, pytest.approx(100 / 3)]] * 2


def test_queries_are_matched_by_path_and_not_by_place(tmp_path):
    straight = pair(tmp_path)
    file = tmp_path / "runs" / "other" / "outcomes.csv.gz"
    table = pd.read_csv(file)
    table.sample(frac=1, random_state=0).to_csv(file, index=False)
    shuffled = open_pair(straight.a, straight.b)
    for table in (pairs.between_runs, pairs.changed):
        pd.testing.assert_frame_equal(
            table(shuffled).sort_values("domain", ignore_index=True),
            table(straight).sort_values("domain", ignore_index=True),
            check_exact=False,
        )


def test_runs_that_share_no_query_have_nothing_to_compare(tmp_path):
    found = pair(tmp_path, a={"emoji": [1]}, b={"flags": [1]})
    assert found.outcomes.empty
    assert found.notes[-1] == "No query is shared: outcomes cannot be compared."


def test_only_the_chosen_domains_are_compared(tmp_path):
    found = pair(tmp_path, domains=("flags",))
    assert found.domains == ["flags"]
    assert found.notes == ()


def test_of_two_k_only_r_at_1_is_compared(tmp_path):
    first = pair(tmp_path)
    file = tmp_path / "runs" / "other" / "outcomes.csv.gz"
    pd.read_csv(file).rename(columns={"mmp_at_5": "mmp_at_10"}).to_csv(file, index=False)
    found = open_pair(first.a, first.b)
    assert found.metrics == ["r_at_1"]
    assert found.notes == ("mMP@k was measured with another k: only R@1 is compared.",)


def test_an_unfinished_run_is_compared_in_what_it_has(tmp_path):
    one = RunFolder(write_run(tmp_path, "one", A))
    going = RunFolder(write_run(tmp_path, "going", A, finished=False, step=20))
    found = open_pair(one, going)
    assert found.outcomes.empty
    assert found.notes[0].startswith(
        "B, going, has no test outcomes to compare: ended without a word after step 20 of 40"
    )
    curves = pairs.curves(going).groupby("curve", sort=False)["step"].max()
    assert curves.to_dict() == {"ce_student": 20, "total": 20, "r_at_1": 20, "mmp_at_5": 20}
    assert pairs.images_seen(going) == {"emoji": 200, "flags": 400}


def test_damaged_outcomes_are_a_note(tmp_path):
    first = pair(tmp_path)
    (first.b.path / "outcomes.csv.gz").write_bytes(b"no gzip")
    found = open_pair(first.a, first.b)
    assert found.outcomes.empty
    assert "B, other, has no test outcomes to compare: " in found.notes[0]
    assert "outcomes.csv.gz: damaged: " in found.notes[0]


def test_curves_are_means_over_domains(tmp_path):
    run = RunFolder(write_run(tmp_path, "one"))
    curves = pairs.curves(run)
    assert curves[curves["curve"] == "ce_student"]["value"].tolist() == [4.5, 4.0]
    assert curves[curves["curve"] == "r_at_1"]["value"].tolist() == [55.5]


def test_parameters_that_differ_are_listed_and_no_others(tmp_path):
    one = RunFolder(write_run(tmp_path, "one", seed=1, w_kl=0.5))
    other = write_run(tmp_path, "other", nested_dims=[8, 16])
    start = json.loads((other / "provenance.json").read_text())
    start[0]["packages"]["torch"] = "2.99"
    (other / "provenance.json").write_text(json.dumps(start))
    found = pairs.parameters(one, RunFolder(other)).to_numpy().tolist()
    assert found == [
        ["nested_dims", "[]", "[8, 16]"],
        ["w_kl", "0.5", "1.0"],
        ["run", "one", "other"],
        ["seed", "1", "0"],
        ["version of torch", "2.13", "2.99"],
    ]


def test_a_parameter_that_a_version_did_not_know_counts_as_its_default(tmp_path):
    folders = [write_run(tmp_path, "one", w_kl=0.5), write_run(tmp_path, "other", w_rel=1.0)]
    file = folders[1] / "params.yaml"
    values = yaml.safe_load(file.read_text())
    del values["w_kl"], values["w_rel"]
    file.write_text(yaml.safe_dump(values))
    found = pairs.parameters(*map(RunFolder, folders)).set_index("parameter")
    assert found.loc["w_kl"].tolist() == ["0.5", pairs.ABSENT]
    assert "w_rel" not in found.index


@pytest.fixture
def searched(tmp_path) -> Pair:
    """Two runs on a tree of images, whose neighbours are kept."""
    write_uned_tree(tmp_path / "data")
    folders = [write_searched_run(tmp_path / "results", name) for name in ("one", "other")]
    return open_pair(*map(RunFolder, folders))


def test_neighbours_of_both_runs_are_of_the_same_queries(searched):
    file = searched.b.path / "neighbours.npz"
    with np.load(file) as opened:
        arrays = dict(opened)
    for name in ("query_paths", "position", "similarity", "hit"):
        arrays[f"student/flags/{name}"] = arrays[f"student/flags/{name}"][::-1]
    arrays["student/flags/position"] = arrays["student/flags/position"] + np.arange(7, dtype=np.int32)[:, None]
    np.savez(file, **arrays)
    catalog, found = pairs.neighbours(searched)
    assert list(catalog.names) == ["emoji", "flags"]
    assert [one.query_domain for one, _ in found] == ["emoji", "flags"]
    for one, other in found:
        assert one.query_paths == other.query_paths
    assert found[1][1].position[:, 0].tolist() == list(range(6, -1, -1))  # in the order of A's queries again


def test_groups_of_queries_are_compared_as_domains_are(searched):
    found = pairs.by_group(searched).set_index("group")
    assert {"large domains", "small domains"} <= set(found.index)
    whole = pairs.between_runs(searched).set_index("domain")
    sizes = {"large domains": "emoji", "small domains": "flags"}
    for group, domain in sizes.items():  # a domain each
        assert found.loc[group].tolist() == whole.loc[domain].tolist()
    thirds = [group for group in ("head", "middle", "tail") if group in found.index]
    assert found.loc[thirds, "n_queries"].sum() <= whole.loc["mean", "n_queries"]
    text = pair_views.groups_table(searched).text
    assert "large domains" in text
    assert "B − A" in text


def test_a_run_of_recipe_features_is_compared_by_its_features(tmp_path):
    folder = write_run(tmp_path, "features", A, recipe="features", steps=0, sampler_loss="student")
    table = pd.read_csv(folder / "outcomes.csv.gz")
    own = table.assign(embedder="features", r_at_1=1.0)
    pd.concat([table, own]).to_csv(folder / "outcomes.csv.gz", index=False)
    found = open_pair(RunFolder(folder), RunFolder(write_run(tmp_path, "other", B)))
    assert pairs.between_runs(found)["a"].tolist() == [100, 100, 100]


def test_neighbours_in_images_of_two_places_are_not_shown_together(searched, tmp_path):
    write_uned_tree(tmp_path / "elsewhere" / "data")
    folder = write_searched_run(tmp_path / "elsewhere" / "results", "other")
    with pytest.raises(UserError, match="the images of both runs are not in one catalog"):
        pairs.neighbours(Pair(searched.a, RunFolder(folder), searched.outcomes, ()))


def test_neighbours_of_recipe_features_are_not_kept(searched, tmp_path):
    folder = write_searched_run(tmp_path / "results", "third", recipe="features", steps=0, sampler_loss="student")
    with pytest.raises(UserError, match="run 'third' is of recipe 'features', whose neighbours are not kept"):
        pairs.neighbours(Pair(searched.a, RunFolder(folder), searched.outcomes, ()))


def test_a_pair_whose_images_were_elsewhere_is_read_where_its_data_is_now(tmp_path):
    write_uned_tree(tmp_path / "data")
    images = str(tmp_path / "data" / "images")
    folders = [write_searched_run(tmp_path / "results", name, images=images) for name in ("one", "other")]
    (tmp_path / "data").rename(tmp_path / "moved")
    catalog, _ = pairs.neighbours(open_pair(*map(RunFolder, folders)), str(tmp_path / "moved"))
    assert catalog.store.read(catalog.domains[0].queries("test").paths[0])


def test_a_pair_whose_images_alone_have_moved_is_read_where_they_are_now(tmp_path):
    write_uned_tree(tmp_path / "data")
    folders = [write_searched_run(tmp_path / "results", name) for name in ("one", "other")]
    (tmp_path / "data" / "images").rename(tmp_path / "pictures")
    catalog, _ = pairs.neighbours(open_pair(*map(RunFolder, folders)), images=str(tmp_path / "pictures"))
    assert catalog.store.read(catalog.domains[0].queries("test").paths[0])

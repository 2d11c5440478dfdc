"""A run's test images as points: each once, with what the run's evaluation said of it, embedded by its best model."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.catalogs import write_uned_tree
from tests.helpers.embeddings import N_INDEX, N_QUERIES, SIZES, open_small, quick_umap, train
from udonlib import runs
from udonlib.errors import UserError
from udonlib.lab.compare import gap_views
from udonlib.lab.compare.gaps import open_gaps
from udonlib.lab.explore import embedding_map, embedding_views
from udonlib.lab.explore.embedding_map import NO_QUERY
from udonlib.presets import GapParams


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    train(folder, "plain", recipe="us_rr", sampler_loss="student")
    return train(folder)


@pytest.fixture(scope="module")
def found(results) -> embedding_map.EmbeddingMap:
    opened = open_small(results)
    opened.embed()
    return opened


def test_every_test_image_is_one_point(found):
    catalog = found.catalog
    expected = {(d.name, path) for d in catalog.domains for path in (*d.queries("test").paths, *d.index("test").paths)}
    points = list(zip(found.points["domain"], found.points["path"], strict=True))
    assert len(points) == len(set(points)) == found.n_images == N_QUERIES + 15 + 12
    assert set(points) == expected
    assert (found.points["query"] >= 0).sum() == N_QUERIES
    assert (found.points["position"] >= 0).sum() == N_INDEX


def test_points_know_their_place_among_queries_and_in_the_index(found):
    lists = found.lists["student"]
    for point in found.points.itertuples():
        if point.query >= 0:
            assert lists.query(point.query) == (point.domain, point.path)
        if point.position >= 0:
            assert lists.searched.locate(point.position) == (point.domain, point.path)
        label = found.catalog[point.domain].splits[point.split].labels[point.row, 0]
        assert point._3 == f"class {label}" == found.names[point.domain, point.path]


def test_points_say_what_the_evaluation_said(found):
    outcomes = found.run.path / "outcomes.csv.gz"
    rows = pd.read_csv(outcomes).query("index == 'merged'").set_index(["embedder", "domain", "path"])["r_at_1"]
    for point in found.points.itertuples():
        if point.query < 0:
            assert (point.result, point.gap) == (NO_QUERY, NO_QUERY)
            continue
        student, teacher = (rows[name, point.domain, point.path] > 0 for name in ("student", "teacher"))
        assert point.result == ("right" if student else "wrong")
        group = {(True, True): "both", (False, True): "teacher only", (True, False): "student only"}
        assert point.gap == group.get((student, teacher), "neither")
    means = pd.read_csv(found.run.path / "evaluation.csv").query("index == 'merged' and domain == 'mean'")
    assert found.r_at_1 == pytest.approx(means.set_index("embedder")["r_at_1"][["student", "teacher"]].to_dict())


def test_vectors_are_those_of_the_model_and_of_each_teacher(found):
    run = runs.load_run(str(found.run.path))
    model, reader = run.load_model(), embedding_map.ImageReader(run.catalog, run.params.image_size, "eval")
    points = found.points[found.points["split"] == "test"].groupby("domain", sort=False).head(4)
    for domain, part in points.groupby("domain", sort=False):
        images = reader.read(domain, "test", part["row"].to_numpy(copy=True))
        with torch.no_grad():
            features = model.features(images)
            expected = {"student": model.student(features), "teacher of flags": model.teachers["flags"](features)}
        for view, values in expected.items():
            np.testing.assert_allclose(found.vectors(view)[part.index], values.numpy(), atol=1e-5)


def test_neighbours_of_the_run_are_near_in_the_vectors(found):
    """What the map shows and what the lists say is the same embedding."""
    lists, vectors = found.lists["student"], found.vectors("student")
    row = {position: i for i, position in enumerate(found.points["position"]) if position >= 0}
    for i in np.flatnonzero(found.points["query"] >= 0):
        query = found.points["query"][i]
        similarities = [float(vectors[i] @ vectors[row[p]]) for p in lists.position[query]]
        np.testing.assert_allclose(similarities, lists.similarity[query], atol=1e-4)


def test_embedding_is_done_once(results, tmp_path, monkeypatch):
    reports: list[tuple[int, int]] = []
    first = open_small(results, k=3)
    first.embed(lambda *report: reports.append(report))  # another test may have embedded it
    second = open_small(results, k=2, seed=1)
    monkeypatch.setattr(embedding_map.EmbeddingMap, "_embedded", None)  # embedding again would fail
    assert second.embed(lambda *report: reports.append(report)) is False
    np.testing.assert_array_equal(first.features, second.features)
    assert all(total == len(first.points) for _, total in reports)


def test_a_changed_model_is_embedded_anew(tmp_path):
    results = train(tmp_path)
    reports: list[tuple[int, int]] = []
    first = open_small(results)
    assert first.embed(lambda *report: reports.append(report)) is True
    assert reports[-1] == (len(first.points), len(first.points))
    state = first.run.load_model_state()
    state["model"] = {
        name: value * 1.01 if value.is_floating_point() else value for name, value in state["model"].items()
    }
    torch.save(state, first.run.best)
    second = open_small(results)
    assert second.embed() is True
    assert not np.allclose(first.features, second.features)


def test_unreadable_images_are_left_out_where_the_run_skips_them(tmp_path):
    results = train(tmp_path, on_bad_image="skip")
    found = open_small(results)
    lost = found.points.iloc[[3, 20]]
    for path in lost["path"]:
        (tmp_path / "data" / "images" / path).write_bytes(b"broken")
    found.embed()
    assert len(found.points) == found.n_images - 2
    assert not set(lost["path"]) & set(found.points["path"])
    assert len(found.features) == len(found.points)


@pytest.mark.parametrize("projection", ["quick", "pca", "umap"])
def test_every_view_has_coordinates_and_a_caption(found, projection, monkeypatch):
    quick_umap(monkeypatch)
    assert found.views == ("student", "teacher", "teacher of emoji", "teacher of flags")
    for view in found.views:
        layout = found.layout(view, projection)
        assert layout.xy.shape == (len(found.points), 2)
        assert (np.abs(layout.xy) <= 1 + 1e-6).all()
        assert ("UMAP by 15 neighbours" in layout.caption) == (projection == "umap")
        assert found.is_kept(view, projection)
    assert "64 dimensions" in found.layout("student", "pca").caption


def test_a_caption_says_what_share_of_the_neighbours_is_kept_and_what_pca_keeps(found):
    k, vectors = 15, found.vectors("student")

    def nearest(values: np.ndarray) -> np.ndarray:
        apart = ((values[:, None] - values[None]) ** 2).sum(axis=2)
        np.fill_diagonal(apart, np.inf)
        return np.argsort(apart, axis=1)[:, :k]

    true = nearest(vectors)
    shares = {}
    for projection in ("quick", "pca"):
        layout = found.layout("student", projection)
        here = nearest(layout.xy)
        shares[projection] = 100 * np.mean([len(set(a) & set(b)) / k for a, b in zip(true, here, strict=True)])
        assert layout.kept == pytest.approx(shares[projection], abs=0.5)
    assert f"{shares['pca']:.0f}% of an image's 15 nearest are kept" in layout.caption
    quick = found.layout("student", "quick")
    assert f"{shares['quick']:.0f}% of an image's 15 nearest are kept (PCA: {shares['pca']:.0f}%)" in quick.caption
    of_domains = {name: found.points["domain"].to_numpy() == name for name in found.domains}
    parts = [(found.vectors("teacher of " + name)[here], here) for name, here in of_domains.items()]
    layout = found.layout("teacher", "quick")
    kept = [embedding_map.preserved(part, [layout.xy[here]], k)[0] for part, here in parts]
    assert layout.kept == pytest.approx(100 * np.average(kept, weights=[len(part) for part, _ in parts]), abs=0.5)


def test_domains_keep_to_their_own_teachers_cells(found):
    layout = found.layout("teacher", "pca")
    assert [name for name, _, _ in layout.labels] == ["emoji", "flags"]
    flags = (found.points["domain"] == "flags").to_numpy()
    assert layout.xy[~flags, 0].max() < layout.xy[flags, 0].min()
    alone = embedding_map.projections.pca(found.vectors("teacher of flags")[flags])[0]
    moved = layout.xy[flags]
    assert np.corrcoef(alone[:, 0], moved[:, 0])[0, 1] == pytest.approx(1, abs=1e-5)


def test_fewer_points_are_chosen_evenly_and_by_the_seed(results):
    found = open_small(results, max_points=20)
    assert found.points["domain"].value_counts().to_dict() == {"emoji": 10, "flags": 10}
    assert found.n_images == N_QUERIES + 27
    again, other = (open_small(results, max_points=20, seed=seed) for seed in (0, 1))
    assert again.points["path"].tolist() == found.points["path"].tolist()
    assert other.points["path"].tolist() != found.points["path"].tolist()
    most = open_small(results, max_points=40).points["domain"].value_counts()
    assert most.to_dict() == {"flags": 25, "emoji": 15}


def test_some_domains_alone_keep_the_whole_index(results):
    found = open_small(results, domains="flags")
    assert set(found.points["domain"]) == {"flags"}
    assert len(found.lists["student"]) == 15
    assert found.lists["student"].searched.domains == ("emoji", "flags")
    with pytest.raises(UserError, match="'domains': run 'small' has no 'flag'; did you mean 'flags'"):
        open_small(results, domains="flag")


def test_a_run_without_teachers_has_one_view(results):
    found = open_small(results, run="plain")
    assert found.views == ("student",)
    assert "gap" not in found.points
    with pytest.raises(
        UserError, match=r"run 'plain' \(recipe 'us_rr'\) has no teacher; finished runs with teachers: small"
    ):
        open_small(results, run="plain", embedder="teacher")


def test_the_latest_run_is_the_one_that_finished_last(results):
    assert open_small(results).run.path.name == "small"
    assert open_small(results, embedder="teacher").points["result"].isin(["right", "wrong", NO_QUERY]).all()


def test_right_and_wrong_are_those_of_the_chosen_embedder(results, found):
    file = found.run.path / "outcomes.csv.gz"
    whole = file.read_bytes()
    table = pd.read_csv(file)
    table["r_at_1"] = (table["embedder"] == "teacher").astype(float)  # the student finds nothing
    table.to_csv(file, index=False)
    try:
        for embedder, said in (("teacher", "right"), ("student", "wrong")):
            assert set(open_small(results, run="small", embedder=embedder).points["result"]) == {said, NO_QUERY}
    finally:
        file.write_bytes(whole)


def test_other_points_of_a_run_are_embedded_for_themselves(results):
    few, other = (open_small(results, run="small", max_points=20, seed=seed) for seed in (0, 1))
    assert few.embed() is True
    assert other.embed() is True
    assert not np.allclose(few.features, other.features)


def test_what_cannot_be_shown_is_refused_in_one_message(results, tmp_path, found):
    with pytest.raises(UserError, match="'run': found 'latest', but there is no finished run in .*nothing.*make train"):
        open_small(tmp_path / "nothing")
    with pytest.raises(UserError, match="no run 'smal'.*did you mean 'small'"):
        open_small(results, run="smal")
    with pytest.raises(UserError, match="parameter 'k': found 9, but 5 neighbours were kept; valid: 1 to 5"):
        open_small(results, k=9)
    with pytest.raises(UserError, match="not embedded yet"):
        open_small(results).vectors("student")
    with pytest.raises(UserError, match="no view 'teacher of flag'; did you mean 'teacher of flags'"):
        found.vectors("teacher of flag")


def test_the_best_model_of_an_unfinished_run_answers_now_what_it_would_have_answered(tmp_path, capsys):
    results = train(tmp_path)
    folder = results / "runs" / "small"
    finished = open_small(results)
    for name in ("summary.json", "evaluation.csv", "outcomes.csv.gz", "neighbours.npz"):
        (folder / name).unlink()
    found = open_small(results, run="small")
    assert "student: R@1" in capsys.readouterr().out
    pd.testing.assert_frame_equal(found.points, finished.points)
    assert found.r_at_1 == finished.r_at_1
    text = embedding_views.described(found).text
    assert "unfinished" in text
    assert "this is the best model so far" in text
    again = open_small(results, run="small", embedder="teacher")
    assert "evaluated before" in capsys.readouterr().out
    assert again.r_at_1 == finished.r_at_1
    gaps = open_gaps(GapParams(run="small", outputs=str(results), specialists="none"))
    assert "this is the best model so far" in gap_views.compared(gaps).text
    (folder / "checkpoints" / "best.pt").unlink()
    with pytest.raises(
        UserError, match=r"run 'small' has no checkpoint yet: it is unfinished, .*; finished runs: none"
    ):
        open_small(results, run="small")


def test_an_unfinished_run_of_one_domain_is_asked_in_that_alone_where_its_data_is_now(tmp_path):
    results = train(tmp_path, domains="flags", recipe="us_rr", sampler_loss="student", domains_per_batch=1)
    (results / "runs" / "small" / "summary.json").unlink()
    (tmp_path / "data").rename(tmp_path / "moved")
    found = open_small(results, run="small", data=str(tmp_path / "moved"))
    assert found.domains == ("flags",)
    assert set(found.lists["student"].searched.domains) == {"flags"}


def test_a_map_whose_images_were_elsewhere_is_read_where_its_data_is_now(tmp_path):
    write_uned_tree(tmp_path / "data", sizes=SIZES, index_of="flags")
    results = train(tmp_path, images=str(tmp_path / "data" / "images"))
    (tmp_path / "data").rename(tmp_path / "moved")
    found = open_small(results, data=str(tmp_path / "moved"))
    assert found.catalog.store.read(found.points["path"][0])

"""An index: what it finds and leaves out, what is added and removed, and its files."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.search import OTHER, clusters, files_of
from udonlib.errors import UserError
from udonlib.search import index as index_module
from udonlib.search.embed import Embeddings
from udonlib.search.index import build_index, index_folder, open_index
from udonlib.search.kinds import KINDS

MADE = clusters(600)
MORE = clusters(80, seed=1)
QUERIES = clusters(9, seed=2).vectors


def part(embeddings, rows):
    rows = np.asarray(rows, dtype=np.int64)
    images = embeddings.images.iloc[rows].reset_index(drop=True)
    return Embeddings(embeddings.vectors[rows], images, embeddings.model)


def found_ids(index, queries=QUERIES, k=7, **options):
    _, rows = index.search(queries, k, **options)
    ids = index.images["id"].tolist()
    return [[ids[row] if row >= 0 else None for row in line] for line in rows]


def naive_ids(embeddings, keep, k=7, queries=QUERIES):
    """Ids by a sort of all similarities, of those images that are kept."""
    order = np.argsort(-(queries @ embeddings.vectors.T), axis=1, kind="stable")
    ids = embeddings.ids
    return [([ids[row] for row in line if keep[row]] + [None] * k)[:k] for line in order]


def joined(*parts):
    images = pd.concat([each.images for each in parts], ignore_index=True)
    return Embeddings(np.concatenate([each.vectors for each in parts]), images, parts[0].model)


@settings(max_examples=25)
@given(
    domain=st.sampled_from([None, "even", "odd", ["even", "odd"]]),
    size=st.sampled_from([None, 1, [1, 3]]),
    removed=st.sets(st.integers(0, 599), max_size=400),
    k=st.integers(1, 30),
    few=st.sampled_from([0, 20_000]),
)
def test_filters_and_removals_leave_the_others_in_their_order(domain, size, removed, k, few):
    index = build_index(MADE)
    where = {name: value for name, value in (("domain", domain), ("size", size)) if value is not None}
    index.remove([MADE.ids[row] for row in removed])
    keep = np.array([row not in removed for row in range(600)])
    for name, value in where.items():
        keep &= MADE.images[name].isin(value if isinstance(value, list) else [value]).to_numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "FEW", few)
        assert found_ids(index, k=k, where=where) == naive_ids(MADE, keep, k)
    assert len(index) == 600 - len(removed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_images_in_and_out_without_being_built_anew(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "FEW", 0)
    index = build_index(MADE, kind, recall=0.99)
    built = index.structure.faiss
    index.add(MORE)
    index.remove(MADE.ids[::3])
    assert index.structure.faiss is built
    both, keep = joined(MADE, MORE), np.array([row >= 600 or row % 3 > 0 for row in range(680)])
    expected = naive_ids(both, keep, 5)
    for each in (index, open_index(index.save(tmp_path / kind))):
        got = found_ids(each, k=5)
        assert np.mean([len(set(a) & set(b)) for a, b in zip(got, expected, strict=True)]) > 4.5
        assert len(each) == 480
        assert each.has(MORE.ids[3])
        assert not each.has(MADE.ids[3])
        assert each.measured[-1].kind == kind


def test_a_filter_that_a_graph_loses_its_way_in_is_answered_exactly(monkeypatch):
    monkeypatch.setattr(index_module, "FEW", 0)
    index = build_index(MADE, "ivf", recall=0.1)
    index.structure.setting = 1
    keep = np.zeros(600, bool)
    keep[:9] = True
    index.images["rare"] = np.where(keep, "yes", "no")
    assert found_ids(index, where={"rare": "yes"}) == naive_ids(MADE, keep)


def test_a_query_that_is_in_the_index_is_not_found_itself():
    index = build_index(MADE)
    rows = np.array([5, -1, 7])
    got = found_ids(index, MADE.vectors[[5, 6, 7]], 3, exclude=rows)
    whole = found_ids(index, MADE.vectors[[5, 6, 7]], 4)
    assert got == [whole[0][1:], whole[1][:3], whole[2][1:]]
    assert found_ids(build_index(part(MADE, [5])), MADE.vectors[5:6], 3, exclude=np.array([0])) == [[None] * 3]
    assert found_ids(build_index(part(MADE, [5])), MADE.vectors[5:6], 3, exclude=np.array([-1])) == [
        [MADE.ids[5], None, None]
    ]


def test_an_update_adds_removes_and_replaces():
    index = build_index(part(MADE, range(10)).__class__(MADE.vectors[:10], hashed(MADE.images[:10]), MADE.model))
    coming = hashed(MADE.images[2:14])
    coming.loc[3, "hash"] = "changed"
    vectors = MADE.vectors[2:14].copy()
    vectors[3] = MADE.vectors[99]
    assert index.update(Embeddings(vectors, coming, MADE.model)) == (5, 3)
    assert len(index) == 12
    assert set(index.images["id"][index.alive]) == set(coming["id"])
    assert np.array_equal(index.vectors[index.row(coming["id"][3])], MADE.vectors[99])
    assert index.update(Embeddings(vectors, coming, MADE.model)) == (0, 0)


def hashed(images):
    return images.reset_index(drop=True).assign(hash=[f"h{i}" for i in images["id"]])


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    index = build_index(MADE)
    other = Embeddings(MORE.vectors, MORE.images, OTHER)
    for wrong, message in (
        (lambda: index.add(other), "this index: an index of model 'small' .* this is model 'other'"),
        (lambda: index.update(other), "this index: an index of model 'small'"),
        (lambda: index.add(part(MADE, [3])), "holds '0/3.png' already; remove it first"),
        (lambda: index.add(part(MORE, [3, 3])), "gets an image twice"),
        (lambda: index.remove(["0/3.png", "0/3.pgn"]), r"holds no image '0/3.pgn'; did you mean"),
        (lambda: build_index(part(MADE, [3, 3])), "the id '0/3.png' stands there twice"),
        (lambda: build_index(part(MADE, [])), "one image at least"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    assert len(index) == 600
    assert len(index.structure) == 600


def test_questions_that_make_no_sense_are_refused_with_the_nearest():
    index = build_index(MADE)
    for options, message in (
        ({"k": 0}, "parameter 'k': found 0, expected at least 1"),
        ({"where": {"domian": "even"}}, r"parameter 'where': no column 'domian'; did you mean 'domain'\?"),
        ({"where": {"domain": "evne"}}, r"parameter 'where': no image has domain 'evne'; did you mean 'even'\?"),
        ({"queries": QUERIES[:, :5]}, r"found vectors of shape \[9, 5\], expected \[n, 12\]"),
        ({"queries": QUERIES * np.nan}, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            index.search(**{"queries": QUERIES} | options)


def test_an_index_is_opened_by_name_or_path_as_it_was_saved(tmp_path):
    index = build_index(MADE, "ivf_sq8")
    index.answers = {"threshold": 0.5}
    folder = index.save("mine", str(tmp_path))
    assert folder == tmp_path / "indexes" / "mine" == index_folder("mine", str(tmp_path))
    for name in ("mine", folder, str(folder)):
        opened = open_index(name, str(tmp_path))
        assert found_ids(opened) == found_ids(index)
        assert opened.model == index.model
        assert opened.answers == {"threshold": 0.5}
        assert opened.measured == index.measured
    with pytest.raises(UserError, match=r"no index at .*min; did you mean 'mine'\?"):
        open_index("min", str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "other"])
@pytest.mark.parametrize("stem", ["vectors", "images", "faiss", "index"])
def test_a_file_that_was_changed_is_never_parsed(tmp_path, monkeypatch, damage, stem):
    folder = build_index(MADE, "ivf_sq8").save(tmp_path / "mine")
    [file] = folder.glob(f"{stem}[-.]*")
    data = file.read_bytes()
    middle = len(data) // 2
    if damage == "gone":
        file.unlink()
    else:
        changed = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        file.write_bytes({"cut": data[:middle], "changed": changed, "other": b"\x80\x04K\x01."}[damage])
    import faiss

    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("parsed"))
    if stem == "index" and damage == "changed":
        return  # any letter of it may have changed: see the next test
    with pytest.raises(UserError, match="damaged|missing|no index") as error:
        open_index(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "found version 2, expected 1"),
        ({"sums": {}}, "names other files than checksums"),
        (
            {"files": {"vectors": "../a", "images": "b"}, "sums": {"../a": "1", "b": "2"}},
            r"names a file '\.\./a' outside",
        ),
        ({"files": [1]}, "damaged"),
        ({"kind": "ivf"}, "names no file of faiss for kind 'ivf'"),
        ({"kind": "tree"}, "kind"),
        ({"model": {"name": "x"}}, "damaged"),
        ({"removed": [10**6]}, "damaged"),
        ({"removed": "all"}, "damaged"),
        ({"number": None}, None),
    ],
)
def test_an_index_json_of_another_form_is_told_in_one_line(tmp_path, change, message):
    folder = build_index(MADE).save(tmp_path / "mine")
    facts = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(facts | change))
    if message is None:
        return
    with pytest.raises(UserError, match=message) as error:
        open_index(folder)
    assert "\n" not in str(error.value)


def test_whoever_is_killed_while_saving_leaves_the_index_of_before(tmp_path, monkeypatch):
    index = build_index(MADE, "ivf_sq8")
    folder = index.save(tmp_path / "mine")
    before = found_ids(open_index(folder))
    for step in ("write_table", "checksum", "write_json"):
        index = open_index(folder)
        index.add(MORE)
        with monkeypatch.context() as patch:
            patch.setattr(index_module, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                index.save(folder)
        assert found_ids(open_index(folder)) == before
    index.save(folder)
    assert len(open_index(folder)) == 680
    assert set(files_of(folder)) == {"index.json", "lock", "vectors-2.npy", "images-2.parquet", "faiss-2.index"}


def test_an_index_does_not_replace_another_or_what_somebody_changed(tmp_path):
    first = build_index(MADE)
    folder = first.save(tmp_path / "mine")
    with pytest.raises(UserError, match="mine: holds an index already: name another, or remove that one"):
        build_index(MORE).save(folder)
    one, other = open_index(folder), open_index(folder)
    one.remove(MADE.ids[:5])
    one.save(folder)
    one.remove(MADE.ids[5:7])
    one.save(folder)
    with pytest.raises(UserError, match="has been changed meanwhile: open it again"):
        other.save(folder)
    assert len(open_index(folder)) == 593

"""Search by ids, paths, images and vectors."""

import numpy as np
import pytest

from tests.helpers.catalogs import picture, write_image_folder
from tests.helpers.search import MODEL, OTHER, SIZE, Counting, embed
from udonlib.data.decoding import decode
from udonlib.errors import UserError
from udonlib.search import find
from udonlib.search.classify import calibrate
from udonlib.search.embed import embed_pictures
from udonlib.search.find import Finder, open_finder
from udonlib.search.folders import embed_folder
from udonlib.search.index import build_index


class Model:
    """What a finder asks of a model."""

    def __init__(self, facts=MODEL):
        self.facts, self.counting = facts, Counting()

    def embed(self, pictures):
        return embed_pictures(self.counting, self.facts, pictures, SIZE, n_threads=1)


@pytest.fixture
def images(tmp_path):
    return write_image_folder(tmp_path / "images", n_classes=6, n_images=4)


@pytest.fixture
def embeddings(images, tmp_path):
    return embed_folder(embed, MODEL, images, SIZE, n_threads=1, outputs=str(tmp_path / "out"))


@pytest.fixture
def finder(embeddings):
    return Finder(build_index(embeddings), Model())


def naive(embeddings, vector, but=None):
    order = np.argsort(-(embeddings.vectors @ vector), kind="stable")
    return [embeddings.ids[row] for row in order if embeddings.ids[row] != but]


def test_an_image_is_found_by_whatever_names_it(images, embeddings, finder):
    image = embeddings.ids[7]
    file, vector = images / image, embeddings.vectors[7]
    pixels = decode(file.read_bytes(), "x")
    for query in (file, str(file), pixels, np.asarray(pixels), vector, [file], np.stack([vector])):
        found = finder.search(query, 4)
        assert found["id"].tolist() == naive(embeddings, vector)[:4]
        assert found["rank"].tolist() == [1, 2, 3, 4]
        assert found["similarity"].tolist() == pytest.approx(sorted(embeddings.vectors @ vector)[::-1][:4], abs=1e-5)
    before = finder.model.counting.n
    assert finder.search(image, 4)["id"].tolist() == naive(embeddings, vector, but=image)[:4]
    assert finder.model.counting.n == before


def test_many_at_once_are_answered_as_each_alone(images, embeddings, finder):
    queries = [embeddings.ids[3], images / embeddings.ids[9], decode(picture(5), "x")]
    found = finder.search(queries, 3)
    assert found["query"].tolist() == [queries[0]] * 3 + [str(queries[1])] * 3 + [2] * 3
    for i, query in enumerate(queries):
        alone = finder.search(query, 3)
        assert found["id"].tolist()[3 * i : 3 * i + 3] == alone["id"].tolist()


def test_filters_and_columns(embeddings, finder):
    found = finder.search(embeddings.ids[0], 5, where={"domain": "dogs"})
    assert set(found["domain"]) == {"dogs"}
    assert list(found) == ["query", "rank", "similarity", "id", "domain", "label", "width", "height", "hash"]
    assert "thumbnail" in finder.search(embeddings.ids[0], 1, columns="thumbnails")
    assert len(finder.search(embeddings.ids[0], 99, where={"label": "class 1"})) == 8


def test_a_text_is_an_id_first_and_a_file_else(embeddings, finder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / embeddings.ids[0]).parent.mkdir(parents=True)
    (tmp_path / embeddings.ids[0]).write_bytes(b"no image")
    assert len(finder.search(embeddings.ids[0], 2)) == 2
    with pytest.raises(UserError, match="not an image"):
        finder.search(tmp_path / embeddings.ids[0])
    with pytest.raises(UserError, match=r"'cats/class 0/0.PGN' is no file, and no image of this index; did you mean"):
        finder.search("cats/class 0/0.PGN")
    for vector in (np.zeros(MODEL.dim, np.float32), np.full(MODEL.dim, np.nan)):
        with pytest.raises(UserError, match="a vector that is zero or not finite"):
            finder.search(vector)


def test_answers_by_class_leave_the_query_itself_out(embeddings, finder):
    with pytest.raises(UserError, match="no threshold"):
        finder.classify(embeddings.ids[0])
    calibrate(finder.index, "domain", false_labels=0.5)
    answers = finder.classify(embeddings.ids[:4])
    assert list(answers) == ["query", "answer", "nearest_class", "score"]
    assert answers["query"].tolist() == embeddings.ids[:4]


def test_another_model_is_refused_also_where_it_has_changed_since(embeddings, monkeypatch):
    with pytest.raises(UserError, match=r"this index: an index of model 'small' .*this is model 'other'"):
        Finder(build_index(embeddings), Model(OTHER))
    asked = []

    def load(source, precision):
        asked.append((source, precision))
        return Model(OTHER)

    monkeypatch.setattr(find, "load", load)
    finder = Finder(build_index(embeddings))
    finder.search(embeddings.ids[0])
    finder.search(embeddings.vectors[0])
    assert asked == []  # vectors and ids need no model
    with pytest.raises(UserError, match="an index of model 'small'"):
        finder.search(decode(picture(5), "x"))
    assert asked == [("somewhere/small", "float32")]


def test_indexes_and_embeddings_are_opened_by_name_or_path(embeddings, tmp_path):
    outputs = str(tmp_path / "out")
    folder = build_index(embeddings, "exact").save("mine", outputs)
    expected = Finder(build_index(embeddings)).search(embeddings.ids[5])["id"].tolist()
    for name in ("mine", folder, str(folder), embeddings.folder.name, embeddings.folder):
        assert open_finder(name, outputs=outputs).search(embeddings.ids[5])["id"].tolist() == expected
    with pytest.raises(UserError, match=r"no index 'mien' in .*, nor vectors in .*; did you mean 'mine'\?"):
        open_finder("mien", outputs=outputs)

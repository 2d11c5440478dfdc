"""What a search finds, and why the right class is not first."""

import numpy as np
import pytest
from PIL import Image

from udonlib.errors import UserError
from udonlib.lab.use.answers import MERGED, cropped, find, is_right, labelled, of_picture, of_row, sample, some


def test_neighbours_of_each_domain_are_the_most_similar_of_it_and_never_the_query(searched):
    vectors = np.asarray(searched.index.vectors)
    for row in (0, 20, len(vectors) - 1):
        found = find(searched, of_row(searched, row))
        similarities = vectors @ vectors[row]
        similarities[row] = -np.inf
        assert set(found.student) == {MERGED, *searched.domains}
        for name, hits in found.student.items():
            mine = np.flatnonzero((searched.row_domains == name) | (name == MERGED))
            best = np.sort(similarities[mine])[::-1][:3]
            assert np.allclose(hits.similarities, best, atol=1e-6)
            assert row not in hits.rows
            assert set(hits.rows) <= set(mine)
        assert set(found.teacher) == {"emoji", "flags"}
        assert all(row not in hits.rows for hits in found.teacher.values())
        assert found.order[0] == searched.row_domains[found.student[MERGED].rows[0]]


def test_the_rank_of_the_right_class_is_counted_as_by_hand(searched):
    vectors = np.asarray(searched.index.vectors, dtype=np.float64)
    ranks = []
    for row in range(len(vectors)):
        query = of_row(searched, row)
        why = find(searched, query).why
        order = [other for other in np.argsort(-(vectors @ vectors[row]), kind="stable") if other != row]
        right = [place for place, other in enumerate(order, 1) if searched.labels[other] == query.label]
        if not right:
            assert why is None
            continue
        assert why.rank == right[0]
        assert why.right == order[right[0] - 1]
        assert why.first == order[0]
        assert sum(why.before.values()) == why.rank - 1
        ranks.append(why.rank)
    assert min(ranks) == 1 < max(ranks)


def test_a_picture_is_searched_like_the_image_that_it_shows(searched):
    image = searched.picture(5)
    found = find(searched, of_picture(searched, image, "photo.png"))
    assert found.student[MERGED].rows[0] == 5
    assert found.student[MERGED].similarities[0] == pytest.approx(1, abs=1e-5)
    assert found.why is None
    said = find(searched, labelled(searched, found.query, searched.labels[5]))
    assert (said.why.rank, said.why.right) == (1, 5)
    assert is_right(searched, said.query, 5) is True
    assert is_right(searched, found.query, 5) is None
    with pytest.raises(UserError, match=r"no image of class 'emoji/clas 8' is searched; did you mean 'emoji/class"):
        labelled(searched, found.query, "emoji/clas 8")
    assert labelled(searched, said.query, "").label is None


def test_a_crop_searches_for_that_part_alone(searched):
    query = of_picture(searched, Image.new("RGB", (100, 50), "red"), "x")
    query.whole.paste(searched.picture(7).resize((50, 50)), (50, 0))
    part = cropped(query, (0.5, 0.0, 1.0, 1.0))
    assert part.image.size == (50, 50)
    vector, _ = searched.embed(searched.picture(7).resize((50, 50)))
    assert np.allclose(searched.embed(part.image)[0], vector)
    assert find(searched, part).student[MERGED].rows[0] == int(np.argmax(searched.index.vectors @ vector))
    assert cropped(part, (-1, -1, 2, 2)).image.size == (100, 50)
    for box in ((0.5, 0, 0.5, 1), (0, 0, 0.02, 1), (0.6, 0, 0.4, 1)):
        with pytest.raises(UserError, match="fewer than 4 pixels on a side"):
            cropped(query, box)


def test_samples_are_of_every_domain_and_misses_are_missed(searched):
    rows = sample(searched, 6)
    assert rows == sample(searched, 6)
    assert len(set(rows)) == 6
    assert {searched.row_domains[row] for row in rows} == {"emoji", "flags"}
    assert sample(searched, 6, seed=1) != rows
    misses = some(searched, 9, misses=True)
    assert len(misses) == 9
    for row in misses:
        why = find(searched, of_row(searched, row)).why
        assert why is None or why.rank > 1
    assert {searched.row_domains[row] for row in some(searched, 5, "flags")} == {"flags"}

"""Images in memory as unit vectors with ids."""

import numpy as np
import pytest
import torch

from tests.helpers.catalogs import picture
from tests.helpers.search import MODEL, OTHER, SIZE, embed, one
from udonlib.data.decoding import ImageError, decode
from udonlib.errors import UserError
from udonlib.search.embed import embed_pictures


def made(pictures, **options):
    return embed_pictures(embed, MODEL, pictures, SIZE, **{"batch_size": 4, "n_threads": 2} | options)


def test_a_list_of_images_is_embedded_in_its_order_as_each_alone():
    found = made([decode(picture(i), "x") for i in range(11)])
    expected = np.stack([one(picture(i)) for i in range(11)])
    assert np.allclose(found.vectors, expected, atol=1e-6)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1)
    assert found.ids == list(range(11))
    assert found.model == MODEL
    assert len(found) == 11


def test_paths_are_ids_and_one_image_is_a_list_of_one(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    found = made(paths)
    assert found.ids == [str(path) for path in paths]
    for single in (paths[1], str(paths[1]), decode(picture(1), "x"), np.asarray(decode(picture(1), "x"))):
        assert np.allclose(made(single).vectors, found.vectors[1:2], atol=1e-6)
    assert made([paths[0], decode(picture(1), "x")]).ids == [0, 1]


def test_batches_of_uint8_are_embedded_without_a_copy_or_resized():
    batch = torch.randint(0, 256, (9, 3, SIZE, SIZE), dtype=torch.uint8)
    expected = embed(batch).numpy()
    assert np.allclose(made(batch).vectors, expected, atol=1e-6)
    assert np.allclose(made(batch.permute(0, 2, 3, 1).numpy()).vectors, expected, atol=1e-6)
    assert np.allclose(made(list(batch)).vectors, expected, atol=1e-6)
    larger = torch.randint(0, 256, (3, 3, 20, 16), dtype=torch.uint8)
    assert np.allclose(made(larger).vectors, made(list(larger)).vectors)
    assert made(batch[:0]).vectors.shape == (0, MODEL.dim)
    assert made([]).vectors.shape == (0, MODEL.dim)


def test_bad_images_are_left_out_with_their_names(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(ImageError, match=r"b\.png: not an image"):
        made(paths)
    found = made(paths, on_bad_image="skip")
    assert found.ids == paths[:1]
    assert set(found.skipped) == set(paths[1:])


@pytest.mark.parametrize("what", [7, None, {"a": 1}, iter([])])
def test_what_is_no_list_of_images_is_refused(what):
    with pytest.raises(UserError, match="parameter 'images': found .*, expected an image, a list or a folder"):
        made(what)


def test_a_vector_that_is_not_finite_ends_it():
    def broken(images):
        return embed(images) * float("nan")

    with pytest.raises(ImageError, match="its vector is not finite"):
        embed_pictures(broken, MODEL, [decode(picture(1), "x")], SIZE)


def test_progress_counts_images():
    seen = []
    made([decode(picture(i), "x") for i in range(10)], progress=lambda *state: seen.append(state))
    assert seen == [("embedding", 4, 10), ("embedding", 8, 10), ("embedding", 10, 10)]


def test_vectors_of_another_model_are_refused_in_one_line():
    MODEL.check(MODEL._replace(name="a copy"), "holds vectors", "here")
    with pytest.raises(UserError) as error:
        MODEL.check(OTHER, "holds vectors", "here")
    assert str(error.value) == (
        "here: holds vectors of model 'small' (ffffffffffff), and this is model 'other' (000000000000), whose vectors "
        "mean something else: load('somewhere/small'), or embed again"
    )

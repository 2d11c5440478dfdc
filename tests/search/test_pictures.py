"""Images of every kind, and the loader that decodes them in threads."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.catalogs import picture
from udonlib.data.decoding import ImageError, decode, prepare_eval
from udonlib.errors import UserError
from udonlib.search import pictures
from udonlib.search.pictures import PictureLoader, open_picture, ready

PIXELS = np.asarray(decode(picture(1), "x"))


def same(image):
    assert image.mode == "RGB"
    return np.array_equal(np.asarray(image), PIXELS)


def test_every_kind_of_image_has_the_same_pixels(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(picture(1))
    tensor = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    kinds = (file, str(file), Image.open(io.BytesIO(picture(1))), Image.fromarray(PIXELS), PIXELS, tensor)
    assert all(same(open_picture(kind, "it")) for kind in kinds)


def test_grey_and_transparent_images_are_read_as_files_are():
    grey = PIXELS[:, :, 0]
    assert np.array_equal(np.asarray(open_picture(grey, "it"))[:, :, 2], grey)
    assert np.array_equal(np.asarray(open_picture(grey[:, :, None], "it"))[:, :, 1], grey)
    assert np.array_equal(np.asarray(open_picture(grey.astype(np.uint16) * 257, "it"))[:, :, 0], grey)
    clear = np.dstack([PIXELS, np.zeros_like(grey)])
    assert np.asarray(open_picture(clear, "it")).min() == 255
    opened = Image.fromarray(clear)
    assert np.asarray(open_picture(opened, "it")).min() == 255
    assert opened.mode == "RGBA"


def test_a_cmyk_jpeg_that_pillow_opened_has_the_colours_of_its_file():
    data = picture(3, image_format="JPEG", mode="CMYK")
    opened = open_picture(Image.open(io.BytesIO(data)), "it")
    assert np.array_equal(np.asarray(opened), np.asarray(decode(data, "it")))


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (PIXELS / 255, "image 3: found array float64 [20, 24, 3], expected a path, a PIL image"),
        (torch.zeros(3, 4, 4), "image 3: found tensor float32 [3, 4, 4]"),
        (np.zeros((3, 20, 24), np.uint8), "array uint8 [3, 20, 24]"),
        (np.zeros((0, 5, 3), np.uint8), "array uint8 [0, 5, 3]"),
        (7, "found int"),
        (None, "found NoneType"),
        (np.zeros((1, 500, 3), np.uint8), "too thin: 500 x 1"),
    ],
)
def test_what_is_no_image_is_refused(what, found):
    with pytest.raises(ImageError) as error:
        open_picture(what, "image 3")
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: cannot be read: No such file"):
        open_picture(tmp_path / "none.png", "it")


def test_a_batch_is_ready_where_it_is_as_the_model_sees_it():
    batch = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(ready(batch, 8), batch)
    assert torch.equal(ready(batch.permute(0, 2, 3, 1).numpy(), 8), batch)
    assert ready(batch, 9) is None
    assert ready(batch.float(), 8) is None
    assert ready([batch[0]], 8) is None


def loader_of(n, bad=(), unneeded=(), **options):
    def opened(position):
        if position in bad:
            raise ImageError(f"image {position}: broken")
        return None if position in unneeded else decode(picture(position), "x")

    return PictureLoader(opened, 8, **options)


@settings(max_examples=25)
@given(n=st.integers(0, 40), size=st.integers(1, 17), n_threads=st.integers(1, 3), unneeded=st.sets(st.integers(0, 40)))
def test_batches_come_in_order_as_if_decoded_one_by_one(n, size, n_threads, unneeded):
    batches = [range(i, min(i + size, n)) for i in range(0, n, size)]
    loaded = list(loader_of(n, unneeded=unneeded, n_threads=n_threads)("", "", batches))
    assert [list(positions) for _, positions in loaded] == [[p for p in b if p not in unneeded] for b in batches]
    for images, positions in loaded:
        assert images.shape == (len(positions), 3, 8, 8)
        for image, position in zip(images, positions, strict=True):
            assert torch.equal(image, prepare_eval(decode(picture(position), "x"), 8))


def test_bad_images_are_left_out_and_noted_or_end_it():
    loader = loader_of(9, bad=(2, 8), on_bad_image="skip", n_threads=2)
    assert [list(p) for _, p in loader("", "", [range(6), range(6, 9)])] == [[0, 1, 3, 4, 5], [6, 7]]
    assert loader.problems == {2: "image 2: broken", 8: "image 8: broken"}
    batches = loader_of(9, bad=(8,))("", "", [range(6), range(6, 9)])
    next(batches)
    with pytest.raises(ImageError, match="image 8: broken; on_bad_image='skip' leaves such images out"):
        next(batches)
    with pytest.raises(UserError, match="parameter 'on_bad_image': found 'skipp'; did you mean 'skip'"):
        loader_of(1, on_bad_image="skipp")


def test_few_batches_are_decoded_before_they_are_asked_for():
    seen = []

    def opened(position):
        seen.append(position)
        return Image.new("RGB", (8, 8))

    batches = PictureLoader(opened, 8, n_threads=2)("", "", [range(i, i + 4) for i in range(0, 400, 4)])
    for number in range(1, 6):
        next(batches)
        assert len(seen) <= 4 * (number + pictures.AHEAD + 1)
    batches.close()
    assert len(seen) < 100


def test_the_number_of_threads_is_as_before_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = loader_of(9, n_threads=2)("", "", [range(4), range(4, 9)])
        next(batches)
        batches.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

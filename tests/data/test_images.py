"""Reading batches: from memory or files, ahead of time or on demand, with bad images skipped or not."""

import gc
import io
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

import udonlib.data.images
from tests.helpers.catalogs import picture, write_tree, write_uned_tree, write_uned_zip
from udonlib.data import decoding
from udonlib.data.catalog import Catalog, load_catalog
from udonlib.data.decoding import ImageError, JpegDecoder, decode, is_plain_jpeg, prepare_eval, prepare_train
from udonlib.data.images import ImageReader, WindowLoader
from udonlib.data.storage import Store
from udonlib.errors import UserError

SIZE = 16
SIZES = {"train": (4, 3, 5, 8), "val": (2, 3), "test": (3, 2, 2)}  # 20 train images


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return load_catalog(str(write_uned_zip(tmp_path / "bench.zip", sizes=SIZES)))


@pytest.fixture
def damaged(tmp_path: Path) -> Catalog:
    """Train images 2, 3 and 19 of flags cannot be read: cut short, empty and missing."""
    root = write_uned_tree(tmp_path / "damaged", sizes=SIZES)
    paths = load_catalog(str(root))["flags"].splits["train"].paths
    content = (root / "images" / paths[2]).read_bytes()
    write_tree(root, {f"images/{paths[2]}": content[:-40], f"images/{paths[3]}": b""})
    (root / "images" / paths[19]).unlink()
    return load_catalog(str(root))


def positions(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def expected(catalog: Catalog, domain: str, split: str, indices: np.ndarray, mode: str = "train") -> Tensor:
    prepare = prepare_train if mode == "train" else prepare_eval
    paths = [catalog[domain].splits[split].paths[i] for i in indices]
    return torch.stack([prepare(decode(catalog.store.read(path), path), SIZE) for path in paths])


PLAN = [
    [("emoji", positions(3, 1, 2))],
    [("flags", positions(0, 19)), ("emoji", positions(1, 4, 1))],
    [("flags", positions(5))],
    [("emoji", positions(19, 18, 17)), ("flags", positions(5, 0, 6))],
    [("flags", positions(2, 2, 7, 3))],
    [("emoji", positions(3, 1, 2))],
]


class TestImageReader:
    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("cache", [True, False])
    def test_images_are_those_at_the_positions_in_their_order(self, catalog: Catalog, mode: str, cache: bool) -> None:
        reader = ImageReader(catalog, SIZE, mode, cache=cache)
        for indices in (positions(4, 0, 4, 2), positions(0), positions(2, 1, 4), positions()):
            images = reader.read("emoji", "val", indices)
            assert images.dtype == torch.uint8
            assert images.shape == (len(indices), 3, SIZE, SIZE)
            if len(indices):
                assert torch.equal(images, expected(catalog, "emoji", "val", indices, mode))

    def test_an_image_is_decoded_once_where_it_is_kept(self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []
        original = Store.read

        def noted(store: Store, path: str) -> bytes:
            read.append(path)
            return original(store, path)

        monkeypatch.setattr(Store, "read", noted)
        for cache, n_reads in ((True, 3), (False, 6)):
            read.clear()
            reader = ImageReader(catalog, SIZE, "train", cache=cache)
            reader.read("emoji", "train", positions(0, 1, 1))
            reader.read("emoji", "train", positions(1, 0))
            reader.read("emoji", "train", positions(0, 7))
            assert len(read) == n_reads

    def test_a_split_is_kept_only_if_all_of_it_fits(self, catalog: Catalog) -> None:
        one = 3 * SIZE * SIZE / 2**30
        reader = ImageReader(catalog, SIZE, "train", cache_gib=26 * one)
        everything = np.arange(20)
        reader.read("emoji", "train", everything)  # 20 images of 26
        reader.read("flags", "train", everything)  # 20 more do not fit
        reader.read("emoji", "val", np.arange(5))  # but 5 do
        assert reader.holds("emoji", "train")
        assert not reader.holds("flags", "train")
        assert reader.holds("emoji", "val")
        assert torch.equal(reader.read("flags", "train", everything), expected(catalog, "flags", "train", everything))

    def test_a_batch_that_is_changed_does_not_change_what_is_kept(self, catalog: Catalog) -> None:
        reader = ImageReader(catalog, SIZE, "train")
        for _ in range(2):
            batch = reader.read("emoji", "train", positions(0, 1))
            assert torch.equal(batch, expected(catalog, "emoji", "train", positions(0, 1)))
            batch.zero_()

    @pytest.mark.parametrize("indices", [positions(-1), positions(20), positions(0, 99)])
    def test_a_position_that_does_not_exist_is_refused(self, catalog: Catalog, indices: np.ndarray) -> None:
        with pytest.raises(IndexError, match="emoji/train has positions 0 to 19, asked for"):
            ImageReader(catalog, SIZE, "train").read("emoji", "train", indices)

    def test_unknown_modes_are_refused(self, catalog: Catalog) -> None:
        with pytest.raises(UserError, match="parameter 'on_bad_image': found 'ski'; did you mean 'skip'"):
            ImageReader(catalog, SIZE, "train", on_bad_image="ski")
        with pytest.raises(UserError, match="parameter 'mode': found 'test'"):
            ImageReader(catalog, SIZE, "test")


class TestBadImages:
    @pytest.mark.parametrize(
        ("position", "message"),
        [
            (2, r"flags/0000_002\.png: cannot be decoded"),
            (3, r"flags/0000_003\.png: the file is empty"),
            (19, "no file"),
        ],
    )
    def test_an_error_names_the_image(self, damaged: Catalog, position: int, message: str) -> None:
        reader = ImageReader(damaged, SIZE, "train")
        with pytest.raises(ImageError, match=message):
            reader.read("flags", "train", positions(0, position))

    @pytest.mark.parametrize("cache", [True, False])
    def test_a_skipped_image_is_black_and_counted_once(self, damaged: Catalog, cache: bool) -> None:
        reader = ImageReader(damaged, SIZE, "eval", on_bad_image="skip", cache=cache)
        for _ in range(2):
            images = reader.read("flags", "train", np.arange(20))
        assert [i for i in range(20) if not images[i].any()] == [2, 3, 19]
        assert reader.bad("flags", "train").tolist() == [2, 3, 19]
        assert reader.bad("emoji", "train").tolist() == []
        paths = damaged["flags"].splits["train"].paths
        assert list(reader.skipped) == [paths[2], paths[3], paths[19]]
        assert "the file is empty" in reader.skipped[paths[3]]

    @pytest.mark.parametrize("cache", [True, False])
    def test_the_next_readable_image_takes_the_place_of_a_bad_one(self, damaged: Catalog, cache: bool) -> None:
        reader = ImageReader(damaged, SIZE, "train", on_bad_image="skip", cache=cache)
        plan = [[("emoji", positions(2)), ("flags", positions(2, 0, 19, 3))]]
        [(images, slots)] = WindowLoader(reader)(plan)
        assert [(domain, indices.tolist()) for domain, indices in slots] == [("emoji", [2]), ("flags", [4, 0, 0, 4])]
        shown = torch.cat([expected(damaged, domain, "train", indices) for domain, indices in slots])
        assert torch.equal(images, shown)
        assert plan[0][1][1].tolist() == [2, 0, 19, 3]  # the plan itself is not changed
        assert len(reader.skipped) == 3

    def test_a_split_without_a_readable_image_is_an_error(self, tmp_path: Path) -> None:
        root = write_uned_tree(tmp_path, sizes=SIZES)
        for path in (root / "images/emoji").iterdir():
            path.write_bytes(b"")
        reader = ImageReader(load_catalog(str(root)), SIZE, "train", on_bad_image="skip")
        with pytest.raises(ImageError, match="emoji/train: none of 20 images can be read; .*the file is empty"):
            list(WindowLoader(reader)([[("emoji", positions(4))]]))


@pytest.fixture(autouse=True)
def no_worker_survives() -> Iterator[None]:
    yield
    gc.collect()
    assert multiprocessing.active_children() == []


class TestWindowLoader:
    @pytest.mark.parametrize("n_workers", [0, 2])
    @pytest.mark.parametrize("cache", [True, False])
    def test_batches_come_in_the_order_of_the_plan_whatever_the_number_of_workers(
        self, catalog: Catalog, n_workers: int, cache: bool
    ) -> None:
        loader = WindowLoader(ImageReader(catalog, SIZE, "train", cache=cache), n_workers)
        state = torch.get_rng_state()
        for plan in (PLAN, PLAN[::-1], [], PLAN * 3):
            batches = list(loader(plan))
            assert len(batches) == len(plan)
            for step, (images, slots) in zip(plan, batches, strict=True):
                assert [(d, i.tolist()) for d, i in slots] == [(d, i.tolist()) for d, i in step]
                assert torch.equal(images, torch.cat([expected(catalog, d, "train", i) for d, i in step]))
        assert torch.equal(torch.get_rng_state(), state)  # no random number was drawn

    def test_workers_replace_bad_images_as_the_process_itself_does(self, damaged: Catalog) -> None:
        results = []
        for n_workers, cache in ((0, True), (2, True), (2, False)):
            reader = ImageReader(damaged, SIZE, "train", "skip", cache)
            batches = list(WindowLoader(reader, n_workers)(PLAN))
            shown = [[(d, i.tolist()) for d, i in slots] for _, slots in batches]
            results.append((torch.cat([images for images, _ in batches]), shown, reader.skipped))
        for images, shown, skipped in results[1:]:
            assert torch.equal(images, results[0][0])
            assert shown == results[0][1]
            assert skipped == results[0][2]
        assert shown[4] == [("flags", [4, 4, 7, 4])]

    def test_a_bad_image_stops_a_loader_with_workers_at_its_step(self, damaged: Catalog) -> None:
        loader = WindowLoader(ImageReader(damaged, SIZE, "train"), 2)
        seen = []
        with pytest.raises(ImageError, match=r"flags/0003_007\.png"):
            for _, slots in loader(PLAN):
                seen.append(slots)
        assert len(seen) == 1
        assert len(list(loader(PLAN[2:4]))) == 2  # and it can still be used

    @pytest.mark.parametrize("n_workers", [0, 2])
    def test_an_iteration_may_be_left_at_any_point(self, catalog: Catalog, n_workers: int) -> None:
        loader = WindowLoader(ImageReader(catalog, SIZE, "train", cache=False), n_workers)
        for n_taken in (0, 1, 3):
            left = loader(PLAN * 5)
            for _ in range(n_taken):
                next(left)
            [(images, _)] = loader([[("flags", positions(n_taken, 9))]])
            assert torch.equal(images, expected(catalog, "flags", "train", positions(n_taken, 9)))
            if n_taken:
                with pytest.raises(RuntimeError, match="a newer iteration of this WindowLoader has begun"):
                    next(left)

    def test_workers_stay_and_are_not_needed_when_all_is_in_memory(self, catalog: Catalog) -> None:
        reader = ImageReader(catalog, SIZE, "train")
        loader = WindowLoader(reader, 1)
        whole = [[("emoji", np.arange(20)), ("flags", np.arange(20))]]
        first = list(loader(whole))
        pids = {child.pid for child in multiprocessing.active_children()}
        assert len(pids) == 1
        other = WindowLoader(reader, 1)
        assert torch.equal(next(iter(other(whole)))[0], first[0][0])
        assert {child.pid for child in multiprocessing.active_children()} == pids

    def test_a_worker_that_is_killed_ends_the_iteration_with_an_error(self, catalog: Catalog) -> None:
        loader = WindowLoader(ImageReader(catalog, SIZE, "train", cache=False), 1)
        batches = loader(PLAN * 50)
        next(batches)
        [child] = multiprocessing.active_children()
        assert child.pid is not None
        multiprocessing.active_children()[0].kill()
        with pytest.raises(UserError, match="'n_workers': a process that decodes images has ended .*for memory"):
            list(batches)
        assert signal.getsignal(signal.SIGCHLD) is not None

    def test_images_that_find_no_shared_memory_come_through_the_pipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("unable to allocate shared memory(shm)")

        made = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        sent, problems, left = udonlib.data.images._to_send((made, [None], {}))
        assert isinstance(sent, np.ndarray)
        assert torch.equal(torch.as_tensor(sent), made)
        assert (problems, left) == ([None], {})

    def test_a_plain_script_in_a_container_with_little_shared_memory_reads_its_images(self, tmp_path: Path) -> None:
        """No `__main__` guard, and less shared memory than a batch has bytes: neither may end or hold up a worker."""
        data = write_uned_tree(tmp_path / "data")
        script = tmp_path / "script.py"
        script.write_text(
            "import numpy as np\n"
            "from udonlib.data.catalog import load_catalog\n"
            "from udonlib.data.images import ImageReader, WindowLoader\n"
            "print('the script runs', flush=True)\n"
            f"reader = ImageReader(load_catalog({str(data)!r}), 224, 'train', cache=False)\n"
            "plan = [[('emoji', np.arange(8))], [('flags', np.arange(8))]] * 3\n"
            "print([tuple(images.shape) for images, _ in WindowLoader(reader, 1)(plan)])\n"
        )
        command = [sys.executable, str(script)]
        small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=300k none /dev/shm && exec "$@"', "-"]
        if shutil.which("unshare") and subprocess.run([*small, "true"], capture_output=True).returncode == 0:
            command = [*small, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert (done.stderr, done.returncode) == ("", 0)
        assert done.stdout.splitlines() == ["the script runs", str([(8, 3, 224, 224)] * 6)]

    def test_other_splits_can_be_read(self, catalog: Catalog) -> None:
        reader = ImageReader(catalog, SIZE, "eval")
        [(images, _)] = WindowLoader(reader, split="test")([[("emoji", positions(6, 2))]])
        assert torch.equal(images, expected(catalog, "emoji", "test", positions(6, 2), "eval"))


def encoded(seed: int, **options: Any) -> bytes:
    """A JPEG of 50 x 44 pixels; `mode` of its pixels, the rest is Pillow's."""
    image = Image.open(io.BytesIO(picture(seed, (50, 44)))).convert(options.pop("mode", "RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def turned(seed: int) -> bytes:
    """A JPEG that is to be shown turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(seed, exif=exif)


FORMATS: dict[str, tuple[bytes, bool]] = {  # files, and whether each is a plain JPEG
    "plain": (encoded(0), True),
    "fine": (encoded(1, quality=98, subsampling=0), True),
    "progressive": (encoded(2, progressive=True), True),
    "grey": (encoded(3, mode="L"), True),
    "cmyk": (encoded(4, mode="CMYK"), False),
    "turned": (turned(5), False),
    "cut": (encoded(6)[:-60], False),
    "cut in the middle": (encoded(7)[:-100] + b"\xff\xd9", True),
    "rgb": (encoded(8, keep_rgb=True), False),
    "png": (picture(9), False),
    "empty": (b"", False),
    "noise": (bytes(range(1, 200)), False),
}


@pytest.fixture
def mixed(tmp_path: Path) -> Catalog:
    """Emoji's first train images are of all these kinds."""
    root = write_uned_tree(tmp_path / "mixed", sizes=SIZES)
    paths = load_catalog(str(root))["emoji"].splits["train"].paths
    write_tree(root, {f"images/{path}": data for path, (data, _) in zip(paths, FORMATS.values(), strict=False)})
    return load_catalog(str(root))


@pytest.fixture(scope="module")
def jpegs() -> JpegDecoder:
    pytest.importorskip("nvidia.nvimgcodec", reason="nvimgcodec is made for Linux and Windows")
    return JpegDecoder(torch.device("cpu"))


class TestJpegDecoder:
    """What a GPU does, by the same library's decoder for CPUs."""

    @pytest.mark.parametrize("name", FORMATS)
    def test_a_plain_jpeg_is_one_that_any_decoder_shows_alike(self, name: str) -> None:
        data, is_plain = FORMATS[name]
        try:
            assert is_plain_jpeg(data, "x") == is_plain
        except ImageError as error:  # the same as if it were decoded
            with pytest.raises(ImageError, match=re.escape(str(error))):
                decode(data, "x")

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_pixels_and_problems_are_those_of_pillow(self, mixed: Catalog, jpegs: JpegDecoder, mode: str) -> None:
        everything = np.arange(len(FORMATS))
        plainly, aside = (ImageReader(mixed, SIZE, mode, "skip", jpegs=each) for each in (None, jpegs))
        found = aside.read("emoji", "train", everything)
        assert found.dtype == torch.uint8
        assert torch.equal(found, plainly.read("emoji", "train", everything))
        assert aside.skipped == plainly.skipped
        assert [list(FORMATS)[i] for i in aside.bad("emoji", "train")] == ["cut", "empty", "noise"]

    def test_plain_jpegs_are_decoded_by_it_and_nothing_else_is(self, mixed: Catalog, monkeypatch) -> None:
        asked: list[bytes] = []

        class Noting(JpegDecoder):
            def __call__(self, files: Sequence[bytes]) -> list[Tensor | None]:
                asked.extend(files)
                return super().__call__(files)

        pytest.importorskip("nvidia.nvimgcodec")
        reader = ImageReader(mixed, SIZE, "train", "skip", jpegs=Noting(torch.device("cpu")))
        reader.read("emoji", "train", np.arange(len(FORMATS)))
        assert asked == [data for data, is_plain in FORMATS.values() if is_plain]
        assert not reader.holds("emoji", "train")

    def test_what_it_cannot_decode_is_left_to_pillow(self, mixed: Catalog, jpegs: JpegDecoder, monkeypatch) -> None:
        everything = np.arange(len(FORMATS))
        expected = ImageReader(mixed, SIZE, "train", "skip").read("emoji", "train", everything)
        monkeypatch.setattr(JpegDecoder, "__call__", lambda self, files: [None] * len(files))
        reader = ImageReader(mixed, SIZE, "train", "skip", jpegs=jpegs)
        assert torch.equal(reader.read("emoji", "train", everything), expected)
        strict = ImageReader(mixed, SIZE, "train", jpegs=jpegs)
        with pytest.raises(ImageError, match="cannot be decoded: .*truncated"):
            strict.read("emoji", "train", positions(list(FORMATS).index("cut")))

    @pytest.mark.parametrize("n_workers", [0, 1, 2])
    def test_batches_are_the_same_with_any_number_of_workers(
        self, mixed: Catalog, jpegs: JpegDecoder, n_workers: int
    ) -> None:
        plan = [[("emoji", np.arange(10)), ("flags", positions(3))], [("emoji", positions(0, 0, 1))], *PLAN]
        expected = list(WindowLoader(ImageReader(mixed, SIZE, "train", "skip"))(plan))
        reader = ImageReader(mixed, SIZE, "train", "skip", jpegs=jpegs)
        for (images, slots), (others, other_slots) in zip(WindowLoader(reader, n_workers)(plan), expected, strict=True):
            assert torch.equal(images, others)
            for (name, shown), (other, other_shown) in zip(slots, other_slots, strict=True):
                assert (name, shown.tolist()) == (other, other_shown.tolist())

    def test_a_missing_library_is_named_with_the_way_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
        with pytest.raises(UserError, match="'decoder': found 'nvimgcodec', which is not installed: pip install"):
            JpegDecoder(torch.device("cpu"))


def test_the_module_offers_what_others_need() -> None:
    assert decode is decoding.decode
    assert ImageError is decoding.ImageError

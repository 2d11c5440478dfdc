"""The pure functions of MiniUnED's builder, on small drawings, without the packages it draws from."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from udonlib.data.miniuned import artwork, build, collected, dedupe, icons, layout, lettering, logos, masks, sources
from udonlib.data.miniuned.artwork import Drawing


def test_a_set_under_another_licence_is_refused():
    with pytest.raises(sources.BuildError, match=r"GPL-3\.0.*MIT"):
        sources.Credit("x 1 (npm)", "X", "someone", "GPL-3.0")


def test_a_package_with_other_bytes_than_pinned_is_refused(tmp_path):
    package = sources.Package("npm", "thing", "1.0.0", "thing-1.0.0.tgz", "icons", "0" * 64)
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(sources.BuildError, match=r"thing-1\.0\.0\.tgz: sha256 .* pinned to 0000"):
        sources.Downloads(tmp_path, [package]).path(package)


def draw(shape: str, ink=(0, 0, 0), size: int = 90, width: int = 12) -> Image.Image:
    image = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(image)
    box = (2, 2, size - 3, size - 3)
    if shape == "disc":
        pen.ellipse(box, fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=width)
    elif shape == "square":
        pen.rectangle(box, fill=ink)
    elif shape == "cross":
        pen.line((2, 2, size, size), fill=ink, width=width)
        pen.line((size, 2, 2, size), fill=ink, width=width)
    elif shape == "two colours":
        pen.rectangle(box, fill=ink)
        pen.rectangle((size // 2, 2, size - 3, size - 3), fill=(0, 90, 200))
    return image


def test_composing_twice_from_the_same_key_gives_the_same_pixels_and_another_key_gives_others():
    style = artwork.Style()
    pictures = [
        np.asarray(artwork.compose(draw("ring"), artwork.generator("icons", "ring", name), style)) for name in "aab"
    ]
    assert pictures[0].shape == (48, 48, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_a_picture_is_its_drawing_laid_on_its_ground():
    style, key = artwork.Style(), ("icons", "ring", "a")
    ground, drawing = artwork.set_on_ground(draw("ring"), artwork.generator(*key), style)
    alpha = np.asarray(drawing.getchannel("A"))[..., None] / 255
    mixed = alpha * np.asarray(drawing)[..., :3] + (1 - alpha) * np.asarray(ground)[..., :3]
    picture = artwork.reduced(Image.fromarray(mixed.round().astype(np.uint8)))
    composed = artwork.compose(draw("ring"), artwork.generator(*key), style)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(composed)).max() <= 2


def drawn_archive() -> tuple[dict, dict, dict]:
    """Pictures, info files and drawings of a tiny archive: discs and rings in each domain of drawings."""
    images, info, drawings = {}, {}, {}
    for domain, style in artwork.DRAWN.items():
        info[domain] = {"train": [], "test": []}
        for i, shape in enumerate(("ring", "disc", "square")):
            source = f"set:{shape}"
            drawings[domain, source] = draw(shape)
            finished = artwork.compose(draw(shape), artwork.generator(domain, shape, source), style)
            path = f"{domain}/{9 - i}.webp"
            images[path] = layout.encode(finished)
            info[domain]["train" if i else "test"].append({"path": path, "class": shape, "source": source})
    return images, info, drawings


def test_masks_are_where_the_drawing_covers_its_ground_in_the_order_of_paths():
    images, info, drawings = drawn_archive()
    sheets = masks.draw_masks(images, info, lambda *key: drawings[key], report=lambda line: None)
    assert set(sheets) == {"emoji.webp", "logos.webp", "icons.webp"}
    square, disc, ring = masks.cells(sheets["icons.webp"])[:3]
    assert square.mean() > disc.mean() > ring.mean() > 0.05
    _, drawing = artwork.set_on_ground(
        draw("disc"), artwork.generator("icons", "disc", "set:disc"), artwork.DRAWN["icons"]
    )
    assert np.array_equal(disc, np.asarray(drawing.getchannel("A").resize((48, 48), Image.Resampling.LANCZOS)) >= 128)


def test_a_picture_that_its_drawing_does_not_give_has_no_mask():
    images, info, drawings = drawn_archive()
    images["logos/8.webp"] = images["logos/9.webp"]
    with pytest.raises(sources.BuildError, match=r"logos/8\.webp: the drawing set:disc gives another picture"):
        masks.draw_masks(images, info, lambda *key: drawings[key], report=lambda line: None)


def test_masks_are_made_for_an_archive_that_stays_and_the_manifest_says_so(tmp_path, monkeypatch):
    images, info, _ = drawn_archive()
    files = {f"images/{path}": content for path, content in images.items()}
    files |= {
        f"info_files/{d}/{s}.json": build.to_json(rows) for d, splits in info.items() for s, rows in splits.items()
    }
    archive = tmp_path / "miniuned.zip"
    archive.write_bytes(build.pack(files))
    before = {**build.facts(archive.name, archive.read_bytes()), "images": 9}
    (tmp_path / "manifest.json").write_bytes(build.to_json(before))

    class Sets:
        def __init__(self, downloads):
            pass

        def load(self, names):
            assert set(names) == {"set"}

        def draw(self, name, icon):
            return Drawing(draw(icon), f"{name}:{icon}")

    monkeypatch.setattr(build, "IconSets", Sets)
    downloads = sources.Downloads(tmp_path, [], report=lambda line: None)
    build.build_masks(downloads, archive)
    content = (tmp_path / "masks.zip").read_bytes()
    assert json.loads((tmp_path / "manifest.json").read_text()) == before | {"masks": build.facts("masks.zip", content)}
    with zipfile.ZipFile(tmp_path / "masks.zip") as opened:
        assert sorted(opened.namelist()) == ["emoji.webp", "icons.webp", "logos.webp"]
        assert masks.cells(opened.read("emoji.webp"))[:3].any((1, 2)).all()


def test_stable_hash_is_the_same_in_every_process():
    assert artwork.stable_hash("emoji", "red-heart", 3) == 2808110820345908463


@pytest.mark.parametrize("shape", ["disc", "two colours"])
def test_a_composed_drawing_stands_out_from_its_background(shape):
    for name in range(20):
        picture = artwork.compose(draw(shape, (250, 240, 30)), artwork.generator(name), artwork.Style(tilt=0.0))
        light = np.asarray(picture).astype(np.float32) @ artwork.LUMA
        assert np.quantile(light, 0.98) - np.quantile(light, 0.02) > 40


def test_the_same_drawing_in_another_ink_or_size_is_dropped_within_a_class():
    drawings = [
        Drawing(draw("ring"), "a"),
        Drawing(draw("ring", (200, 30, 30), size=70, width=9), "b"),
        Drawing(draw("disc"), "c"),
        Drawing(draw("cross"), "d"),
        Drawing(draw("two colours", (250, 240, 30)), "e"),
        Drawing(draw("two colours", (20, 120, 30)), "f"),
    ]
    assert [d.source for d in dedupe.drop_near_duplicates(drawings)] == ["a", "c", "d", "e", "f"]


def test_a_class_that_repeats_another_is_dropped_and_a_shared_drawing_leaves_both():
    shapes = {"one": ["ring", "disc", "cross"], "two": ["ring", "disc", "square"], "three": ["two colours", "square"]}
    classes = {n: [Drawing(draw(s, (9, 9, 9)), f"{n}:{s}") for s in v] for n, v in shapes.items()}
    kept, notes = dedupe.drop_duplicate_classes(classes, min_images=1)
    assert len({"one", "two"} & set(kept)) == 1
    sources_left = {d.source.split(":")[1] for v in kept.values() for d in v}
    assert any("repeats" in note for note in notes)
    assert "two colours" in sources_left


def test_artwork_of_a_test_class_leaves_train_even_in_another_colour():
    def entry(name, split, shape, ink):
        return layout.Entry("icons", name, split, Drawing(draw(shape, ink), f"{name}:{shape}"))

    entries = [
        entry("one", "train", "ring", (0, 0, 0)),
        entry("one", "train", "cross", (0, 0, 0)),
        entry("two", "test", "ring", (255, 0, 0)),
        entry("two", "test", "square", (0, 0, 0)),
    ]
    kept, words = layout.without_repeated_artwork(entries)
    assert [(e.split, e.drawing.source) for e in kept] == [
        ("train", "one:cross"), ("test", "two:ring"), ("test", "two:square")
    ]  # fmt: skip
    assert len(words) == 1
    assert "one:ring" in words[0]


def test_near_pictures_leave_train_and_stay_in_test():
    rng = np.random.default_rng(0)
    pictures = [np.kron(rng.integers(0, 255, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(3)]

    def entry(split, picture):
        image = Image.fromarray(picture)
        return layout.Entry("earth", "place", split, Drawing(image, split), layout.encode(image))

    darker = (pictures[0] * 0.8).astype(np.uint8)
    kept, words = layout.without_near_pictures(
        [entry("train", darker), entry("train", pictures[1]), entry("test", pictures[0]), entry("val", pictures[2])]
    )
    assert [e.split for e in kept] == ["train", "test", "val"]
    assert len(words) == 1


def test_thumbnails_of_flat_pictures_are_near_nothing():
    flat = dedupe.thumbnails(np.full((2, 48, 48, 3), 200, np.uint8))
    assert not flat.any()
    assert dedupe.near_pictures(flat, flat) == []


def test_classes_are_split_by_their_hash_whatever_the_order_they_come_in():
    names = [f"class {i}" for i in range(50)]
    forward, backward = collected.stable_order("x", names), collected.stable_order("x", names[::-1])
    assert forward == backward
    assert sorted(forward) == sorted(names)
    assert forward != sorted(names)
    splits = Counter(layout.split_of_class(i, 50) for i in range(50))
    assert splits == {"train": 30, "val": 5, "test": 15}


@pytest.mark.parametrize(
    ("icon_set", "icon", "expected"),
    [
        ("logos", "google-drive-icon", "googledrive"),
        ("tabler", "brand-github-filled", "github"),
        ("tabler", "home", None),
        ("streamline-logos", "flickr-logo-2-block", "flickr"),
        ("simple-icons", "sinaweibo", "weibo"),
        ("skill-icons", "vuejs-dark", "vue"),
    ],
)
def test_a_brand_has_one_name_in_all_icon_sets(icon_set, icon, expected):
    assert logos.brand(icon_set, icon) == expected


@pytest.mark.parametrize(
    ("icon_set", "icon", "expected"),
    [
        ("mdi", "home-outline", "home"),
        ("lucide", "house", "home"),
        ("ic", "baseline-hourglass", "hourglass"),
        ("fluent", "umbrella-24-filled", "umbrella"),
        ("mdi", "home-account", None),
    ],
)
def test_an_icon_is_known_by_its_bare_name_or_a_synonym(icon_set, icon, expected):
    assert icons.concept(icon_set, icon, icons.load_concepts()) == expected


def test_unicode_ranges_are_read_as_in_style_sheets():
    assert list(lettering.ranges("U+4E00-4E02, u+5b57,U+30f?")) == [
        0x4E00,
        0x4E01,
        0x4E02,
        0x5B57,
        *range(0x30F0, 0x3100),
    ]


def test_a_package_is_read_by_member_and_a_missing_member_is_named(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in (("package/b.json", b"2"), ("package/a.json", b"1"), ("package/c.txt", b"3")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    package = sources.Package("npm", "thing", "1.0.0", "thing-1.0.0.tgz", "icons", digest)
    (tmp_path / package.file).write_bytes(content.getvalue())
    downloads = sources.Downloads(tmp_path, [package])
    assert list(downloads.members(package, lambda name: name.endswith(".json")).items()) == [
        ("a.json", b"1"),
        ("b.json", b"2"),
    ]
    with pytest.raises(sources.BuildError, match=r"thing 1\.0\.0.*no file 'd\.json'"):
        downloads.member(package, "d.json")


def test_the_command_says_in_one_line_that_the_folder_of_the_archive_is_missing(tmp_path, capsys):
    missing = tmp_path / "nowhere" / "miniuned.zip"
    assert build.main(["--downloads", str(tmp_path / "downloads"), "--out", str(missing)]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "downloads").exists()


def test_packing_depends_on_names_and_contents_alone():
    files = {"b": b"2", "a": b"1"}
    assert build.pack(files) == build.pack(dict(sorted(files.items()))) != build.pack({"b": b"2", "a": b"3"})


def test_images_are_numbered_and_index_splits_are_made_by_the_rules_of_fashion_and_earth():
    blank = Image.new("RGB", (48, 48))

    def entries(domain, name, *splits):
        return [
            layout.Entry(domain, name, split, Drawing(blank, f"{name}:{i}:{split}"), f"{domain}{name}{i}".encode())
            for i, split in enumerate(splits)
        ]

    images, info = layout.number(
        [
            *entries("fashion", "bag", "test", "val", "train", "train", "train"),
            *entries("earth", "here", "train", "train"),
            *entries("earth", "there", "val", "val"),
            *entries("earth", "yonder", "test", "index"),
            *entries("earth", "alone", "train"),
        ]
    )
    paths = {d: {split: [row["path"] for row in rows] for split, rows in splits.items()} for d, splits in info.items()}
    fashion, earth = paths["fashion"], paths["earth"]
    assert fashion["index"] == fashion["train"] == [f"fashion/0000_00{i}.webp" for i in (2, 3, 4)]
    assert fashion["small_index"] == ["fashion/0000_002.webp", "fashion/0000_004.webp"]
    assert set(earth["val"]) < set(earth["index"])
    assert len(earth["index"]) == 3
    assert not set(earth["test"]) & set(earth["index"])
    assert {row["class"] for rows in info["earth"].values() for row in rows} == {"here", "there", "yonder"}
    assert {row["class_id"] for rows in info["earth"].values() for row in rows} == {0, 1, 2}
    assert len(images) == 5 + 6

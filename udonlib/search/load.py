"""A trained model, ready to embed images: of a run, its checkpoint or its release, or a checkpoint of the reference.

model = udonlib.load("latest")
found = model.embed("folder/of/images")
found.vectors, found.ids
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from udonlib.data.catalog import Catalog
from udonlib.errors import ParameterError, nearest
from udonlib.evaluation.reading import Embed
from udonlib.models.embedding_model import EmbeddingModel
from udonlib.models.processors import PRECISIONS, Precision, dtype_of, lone_threads, pick_device, pick_precision
from udonlib.presets import EvaluateParams
from udonlib.release.folder import CONFIG, ENCODER, load_release, read_config
from udonlib.runs.evaluations import find_source
from udonlib.search.embed import Embeddings, ModelFacts, Progress, embed_pictures
from udonlib.search.folders import embed_folder


@dataclass(frozen=True, eq=False)
class Embedder:
    """A model that embeds images of any kind; `load` makes it.

    model: in evaluation mode, on its device. image_size: side of the images that it sees, in pixels. name: of its run
    or file. source: what `load` finds it by. outputs: folder of results.
    """

    model: EmbeddingModel
    image_size: int
    precision: Precision
    device: torch.device
    name: str
    source: str
    outputs: str = "auto"

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes what the backbone sees."""
        backbone = self.model.backbone
        size = self.image_size
        return {
            "resize": f"short side to {size} pixels, bilinear without antialiasing",
            "crop": f"the middle {size} x {size}",
            "mean": [float(value) for value in backbone.mean],
            "std": [float(value) for value in backbone.std],
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights of backbone and student head, and of what is done to an image before them.

        Whatever file the weights came from, and whatever it holds besides: teachers, prototypes, an optimizer.
        """
        digest = hashlib.sha256(repr((self.preprocessing, self.model.normalise_features)).encode())
        for part in (self.model.backbone, self.model.student):
            for name, value in sorted(part.state_dict().items()):
                digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def facts(self) -> ModelFacts:
        """Which model this is."""
        size = self.image_size
        dim = len(self(torch.zeros((1, 3, size, size), dtype=torch.uint8))[0])
        return ModelFacts(self.fingerprint, self.name, self.source, self.precision, dim)

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image dim"]:
        """Unit vectors, in float32 on the CPU, of images as the model sees them."""
        return self.model.embed(images.to(self.device), dtype_of(self.precision, self.device)).float().cpu()

    def embed(
        self,
        images: Any,
        *,
        batch_size: int = 128,
        on_bad_image: str = "error",
        n_threads: int = 0,
        progress: Progress | None = None,
        name: str = "auto",
        overwrite: bool = False,
    ) -> Embeddings:
        """Embed images, or a folder of them.

        Args:
            images: a folder, a zip archive, "miniuned" or a catalog (its test images), whose vectors are kept: see
                `search.folders.embed_folder`; a path of an image, a PIL image, an array, a tensor, a list of these, or
                a batch of uint8: see `search.embed.embed_pictures`.
            batch_size: images that the network sees at once.
            on_bad_image: "error": stop at an image that cannot be read; "skip": leave it out, and say so in `skipped`.
            n_threads: that decode; 0: as many as there are cores.
            progress: called with ("embedding", images done, images in all).
            name: of the folder of a folder's vectors; "auto": from the folder and the model.
            overwrite: embed a folder anew.

        Raises:
            UserError: what is no image or cannot be read; a folder without images.
        """
        facts, size = self.facts, self.image_size
        with self._parallel() as embed:
            if (
                isinstance(images, Catalog)
                or (isinstance(images, str) and images == "miniuned")
                or (isinstance(images, str | Path) and holds_images(Path(images).expanduser()))
            ):
                return embed_folder(
                    embed, facts, images, size, batch_size, on_bad_image, n_threads, progress,
                    outputs=self.outputs, name=name, overwrite=overwrite,
                )  # fmt: skip
            return embed_pictures(embed, facts, images, size, batch_size, on_bad_image, n_threads, progress)

    @contextmanager
    def _parallel(self) -> Iterator[Embed]:
        """This model, where on a CPU every thread embeds a part of the batch by itself.

        Threads that share each layer spin while they wait for one another, and here others decode beside them.
        """
        n_threads = torch.get_num_threads()
        if self.device.type != "cpu" or n_threads == 1:
            yield self
            return
        with lone_threads(n_threads, "udonlib-embedder") as pool:

            def embed(images: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image dim"]:
                return torch.cat(list(pool.map(self, images.chunk(n_threads))))

            yield embed


def holds_images(path: Path) -> bool:
    """Whether `Embedder.embed` takes a path for a folder of images, not for an image."""
    return path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file())


def load(
    source: str | Path = "latest", *, precision: str = "auto", device: str = "auto", outputs: str = "auto"
) -> Embedder:
    """Load a trained model.

    Args:
        source: a run, by its name, its folder or "latest" (whose best model was kept last); a checkpoint of a run, with
            its params.yaml beside it or above; a checkpoint of the reference, or its folder; the folder of a release.
        precision: "float32", "bfloat16"; "auto": the run's, where the device multiplies it fast.
        device: "cpu", "cuda", "cuda:1"; "auto": a GPU where there is one.
        outputs: folder of results.

    Raises:
        UserError: no run or file is called so, with the nearest name; a file that is no checkpoint, or is damaged.
    """
    path = Path(source).expanduser()
    where = pick_device(device)
    if (path / CONFIG).is_file() and (path / ENCODER).is_file():
        released = load_release(path)
        chosen = pick_precision(_known(precision), where)
        name, size = path.absolute().name, read_config(path).image_size
        return _embedder(released, size, chosen, where, name, str(path.absolute()), outputs)
    is_checkpoint = path.is_file() or (path / "checkpoint_-1").is_file()
    kind = {"checkpoint": str(path.absolute())} if is_checkpoint else {"run": str(source)}
    found = find_source(EvaluateParams(**kind, outputs=outputs))
    wanted = _known(precision)
    if wanted == "auto" and found.trained is not None and found.trained.precision == "float32":
        wanted = "float32"
    chosen = pick_precision(wanted, where)
    model = found.load_model()
    size = found.image_size(model)
    where_it_is = path.absolute() if is_checkpoint else found.file.absolute().parents[1]
    return _embedder(model, size, chosen, where, found.name, str(where_it_is), outputs)


def _known(precision: str) -> Literal["auto", "float32", "bfloat16"]:
    if precision not in ("auto", *PRECISIONS):
        raise ParameterError({"precision": f"found {precision!r}; {nearest(precision, ('auto', *PRECISIONS))}"})
    return precision  # type: ignore[return-value]


def _embedder(model: EmbeddingModel, size: int, precision: Precision, device: torch.device, *rest: str) -> Embedder:
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Embedder(model.eval(), size, precision, device, *rest)

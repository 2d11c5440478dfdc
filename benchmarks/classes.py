"""Very many classes: what a step costs with them, and how far a softmax over a sample of them is off.

    python benchmarks/classes.py

1. Seconds of a step of UDON (student, teacher, distillation) with UnED's 316,446 training classes over those of one
   with MiniUnED's 1,459, in eight domains each, on ViT-S/16 at 224 pixels. A round has a step of each domain, so Met's
   224,408 count as one of eight; then the same with a tenth and a hundredth of the classes in each step.
2. The error of such samples, at prototypes that fit their images as in a trained head: of the loss (absolute) and of
   its gradient at the embeddings (relative), each drawn class standing for as many as were left out; and without that
   factor.

Each round measures all in turns, so that a drift of the machine's speed cancels; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from udonlib.data.check.uned import OFFICIAL
from udonlib.models.embedding_model import create_model
from udonlib.models.heads import cosine_logits, unit
from udonlib.models.processors import multiplies_bfloat16
from udonlib.params import TrainParams
from udonlib.training.learner import Learner
from udonlib.training.losses import classification_loss
from udonlib.training.parallel.class_shards import ClassShards, Columns
from udonlib.training.threads import use_threads

MANY = {domain: counts.train_classes for domain, counts in OFFICIAL.items()}
FEW = {domain: 1_459 // len(OFFICIAL) for domain in OFFICIAL}
SAMPLES = (0.1, 0.01)


class Case:
    """A model of so many classes, and what its steps took."""

    def __init__(self, name: str, n_classes: dict[str, int], params: TrainParams) -> None:
        self.name, self.n_classes, self.params = name, n_classes, params
        model = create_model(params, n_classes)
        self.learner = Learner(model, params, shards=ClassShards(model, sampled=params.class_sample))
        self.seconds: list[float] = []
        self.n_steps = 0

    def round(self, images: torch.Tensor) -> None:
        """One step of each domain."""
        start = time.perf_counter()
        for domain, n in self.n_classes.items():
            labels = torch.randint(n, (len(images),), generator=torch.Generator().manual_seed(self.n_steps))
            self.learner.step(self.n_steps, images, [(domain, labels)])
            self.n_steps += 1
        self.seconds.append((time.perf_counter() - start) / len(self.n_classes))


def steps(n_rounds: int, batch_size: int, precision: str) -> None:
    """Print what a step takes, with each number of classes."""
    given = {"backbone": "vit_small_patch16_224", "pretrained": False, "precision": precision, "frozen_steps": 0}
    params = TrainParams(**given, batch_size=batch_size)
    cases = [Case("1,459 classes", FEW, params), Case("316,446 classes", MANY, params)]
    for share in SAMPLES:
        cases.append(
            Case(f"{share:.0%} of 316,446", MANY, TrainParams(**given, batch_size=batch_size, class_sample=share))
        )
    images = torch.rand(batch_size, 3, 224, 224) * 255
    for number in range(n_rounds + 1):
        for case in cases:
            case.round(images)
            if number == 0:  # warm
                case.seconds.clear()
    of_few = statistics.median(cases[0].seconds)
    for case in cases:
        seconds = statistics.median(case.seconds)
        n_bytes = 16 * sum(p.numel() for n, p in case.learner.model.named_parameters() if "prototypes" in n)
        print(
            f"{case.name:18}  {seconds:6.2f} s a step of {batch_size}, {seconds / of_few:.2f} of that with few"
            f"   prototypes, gradients and moments {n_bytes / 2**20:,.0f} MiB"
        )


def errors(n_classes: int, dim: int, scale: float, batch_size: int) -> None:
    """Print how far the loss and its gradient are off, over samples of several sizes."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(n_classes, dim, generator=generator)
    labels = torch.randint(n_classes, (batch_size,), generator=generator)
    near = unit(prototypes[labels]) + 1.5 / dim**0.5 * torch.randn(batch_size, dim, generator=generator)
    embeddings = unit(near).requires_grad_()

    def found(columns: Columns) -> tuple[float, torch.Tensor]:
        cosines = cosine_logits(embeddings, columns.of(prototypes))
        loss = classification_loss(cosines, labels, "normface", scale, 0.0, 0.0, columns)
        return loss.item(), torch.autograd.grad(loss, embeddings)[0]

    loss, gradient = found(Columns(n_classes))
    print(f"{n_classes:,} classes, {dim} dimensions, scale {scale:g}: loss {loss:.3f}")
    for share in (0.3, 0.1, 0.03, 0.01):
        shards = _Sampled(n_classes, share)
        off: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for step in range(10):
            columns = shards.columns("domain", labels, step)
            for weighed in off:
                counts = columns.log_counts if weighed else torch.zeros_like(columns.log_counts)
                value, slope = found(Columns(n_classes, 0, n_classes, columns.sample, counts))
                off[weighed].append((value - loss, ((slope - gradient).norm() / gradient.norm()).item()))
        told = "   ".join(
            f"{'' if weighed else 'without the factor '}loss {statistics.mean(v for v, _ in seen):+.3f}, "
            f"gradient {statistics.mean(g for _, g in seen):.1%}"
            for weighed, seen in off.items()
        )
        print(f"  {share:4.0%} of the classes: {told}")


class _Sampled(ClassShards):
    """Samples of the classes of one domain, without a model."""

    def __init__(self, n_classes: int, sampled: float) -> None:
        module = torch.nn.Module()
        module.student_prototypes = module.teacher_prototypes = {"domain": torch.empty(n_classes, 0)}  # type: ignore[assignment]
        super().__init__(module, sampled=sampled)  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of a step of each domain")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    steps(arguments.rounds, arguments.batch_size, "bfloat16" if multiplies_bfloat16(torch.device("cpu")) else "float32")
    errors(224_408, 64, 16.0, 16)

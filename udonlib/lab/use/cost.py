"""What a run on all of UnED costs on one GPU or many: hours, memory, network, disks and money, computed.

    costs = estimates(params)

Nothing is measured here but the operations of the model, which are counted. A step's time is that of its operations at
the pace that a GPU is said to reach, and of what the processes send each other; both come one after the other, as in
`training.parallel`. Each process computes heads and losses of the whole batch, for its part of the classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go
import torch

from udonlib import presets
from udonlib.data.check.uned import OFFICIAL
from udonlib.lab.use.use_params import CostParams
from udonlib.lab.views import charts
from udonlib.lab.views.tables import Table, facts_table, lines_table
from udonlib.models.backbones import flops_per_image
from udonlib.models.embedding_model import create_model
from udonlib.params import TrainParams
from udonlib.training.needs import list_needs

N_CLASSES = {domain: counts.train_classes for domain, counts in OFFICIAL.items()}
N_TRAIN = sum(counts.train for counts in OFFICIAL.values())
N_VAL = sum(counts.val + counts.small_index for counts in OFFICIAL.values())  # images of one validation
N_TEST = sum(counts.test + counts.index for counts in OFFICIAL.values())
FLOAT = 4  # bytes: gradients are summed in float32


@dataclass(frozen=True)
class Model:
    """What has to be known of a run's model: parameters, the size of a feature, and operations of an image forward.

    flops: of the backbone. class_flops: cosines to the classes of a domain, as the mean over domains, and of a joint
    classifier to those of all, by student and teacher.
    """

    backbone: int
    student: int
    teacher: int  # of one domain's head
    prototypes: int  # of all domains, student's and teachers'
    feature_dim: int
    flops: float
    class_flops: float


@dataclass(frozen=True)
class Cost:
    """What a run costs on n GPUs. Seconds are of one step, as the mean over all of them.

    computing: backbone, heads and losses. sending: gradients and features, each of so many bytes. slices: into which
    the classes are split, one for each GPU; 1: each holds all. evaluating: of the whole run, in seconds. memory: of a
    GPU, at least; disk: images and checkpoints; reading: of images, all GPUs together, in bytes a second. cores: that
    decode images, for each GPU.
    """

    n: int
    params: TrainParams
    batch: int
    steps: int
    computing: float
    sending: float
    evaluating: float
    gradients: float
    features: float
    slices: int
    memory: float
    disk: float
    reading: float
    cores: float
    euros_per_gpu_hour: float

    @property
    def hours(self) -> float:
        return (self.steps * (self.computing + self.sending) + self.evaluating) / 3600

    @property
    def euros(self) -> float:
        return self.hours * self.n * self.euros_per_gpu_hour


def planned(params: CostParams) -> TrainParams:
    """The run of the preset. Raises: UserError as `presets.load`."""
    return presets.load(params.plan)


def describe(p: TrainParams) -> Model:
    """Count a run's model, without memory for it."""
    with torch.device("meta"):
        model = create_model(p.model_copy(update={"pretrained": False, "weights": None}), N_CLASSES)
        flops = flops_per_image(model.backbone, p.image_size)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    teachers = count(model.teachers) // max(1, len(model.teachers))
    prototypes = count(model.student_prototypes) + count(model.teacher_prototypes)
    n_all = sum(N_CLASSES.values())
    n_mean = n_all / len(N_CLASSES)
    class_flops = 2 * p.student_dim * p.has_head * (n_all if p.classifier == "joint" else n_mean)
    class_flops += 2 * p.teacher_dim * p.has_teachers * n_mean
    encoder = model.backbone
    return Model(count(encoder), count(model.student), teachers, prototypes, encoder.feature_dim, flops, class_flops)


def ring_seconds(n_bytes: float, n: int, bytes_per_s: float, latency: float) -> float:
    """Time in which n processes sum a tensor in a ring: each sends 2 (n - 1) parts of 1/n of it, one by one."""
    return 2 * (n - 1) * (latency + n_bytes / n / bytes_per_s) if n > 1 else 0.0


def summing_seconds(n_bytes: float, n: int, params: CostParams) -> float:
    """Time of an all-reduce: within each node in a ring, and between nodes in rings of one GPU of each.

    A GPU of m nodes of g GPUs carries 1/g of the tensor over the network:

        ring(bytes, g, node) + ring(bytes / g, m, network)
    """
    p = params
    g = min(n, p.gpus_per_node)
    latency = p.latency_us / 1e6
    within = ring_seconds(n_bytes, g, 1e9 * p.node_gb_per_s, latency)
    return within + ring_seconds(n_bytes / g, math.ceil(n / g), 1e9 * p.network_gb_per_s, latency)


def flops_per_s(params: CostParams, model: Model) -> float:
    """Operations a second that a GPU reaches: as measured (three forward passes an image), or as assumed."""
    if params.images_per_s is not None:
        return 3 * model.flops * params.images_per_s
    return 1e12 * params.peak_tflops * params.utilisation


def estimate(params: CostParams, n: int) -> Cost:
    """Compute what the run costs on n GPUs.

    As many images are seen as in the run of the preset; with more GPUs steps are larger and fewer.
    """
    wanted = planned(params)
    batch = n * params.images_per_gpu
    steps = max(1, round(wanted.steps * wanted.batch_size / batch))
    frozen = min(1.0, wanted.frozen_steps / max(1, wanted.steps))
    p = wanted.model_copy(update={"batch_size": batch, "steps": steps, "frozen_steps": round(frozen * steps)})
    model = describe(p)
    rate = flops_per_s(params, model)
    slices = n if sum(N_CLASSES.values()) >= p.split_classes_from else 1
    heads = 3 * batch * model.class_flops / slices  # forward, and twice that backward
    images = params.images_per_gpu * model.flops * (frozen + 3 * (1 - frozen))
    # Sent in a step: gradients of what is trained, the heads of one domain; features of all images, there and back.
    gradients = FLOAT * (model.backbone * (1 - frozen) + model.student + model.teacher)
    gradients += FLOAT * model.prototypes / len(N_CLASSES) * (slices == 1)
    features = 2 * FLOAT * batch * model.feature_dim
    sending = summing_seconds(gradients, n, params) + summing_seconds(features, n, params)
    validations = wanted.steps / wanted.eval_every
    seen = validations * N_VAL + N_TEST
    computing = (images + heads) / rate
    needs = list_needs(p.model_copy(update={"precision": "bfloat16"}), N_CLASSES, N_TEST, torch.device("cpu"), n)
    total = model.backbone + model.student + len(N_CLASSES) * model.teacher + model.prototypes
    # Two checkpoints with Adam's moments, and the best model of each; every image once.
    disk = 2 * FLOAT * (3 + 1) * total + 1000 * params.image_kb * (N_TRAIN + N_VAL + N_TEST)
    pace = batch / (computing + sending)
    return Cost(
        n,
        p,
        batch,
        steps,
        computing,
        sending,
        seen * model.flops / rate / n,
        gradients,
        features,
        slices,
        sum(need.n_bytes for need in needs),
        disk,
        1000 * params.image_kb * pace,
        pace / n / params.decoded_per_s,
        params.euros_per_gpu_hour,
    )


def estimates(params: CostParams) -> list[Cost]:
    """The costs on each number of GPUs."""
    return [estimate(params, n) for n in params.n_gpus]


def known(params: CostParams) -> Table:
    """Tabulate what is computed from: the run, its model as it was counted, and what is said of the machine."""
    p = planned(params)
    model = describe(p)
    frozen, heads = p.frozen_steps / max(1, p.steps), model.student + len(N_CLASSES) * model.teacher
    pace = "measured" if params.images_per_s else f"{params.utilisation:.0%} of {params.peak_tflops:g} TFLOP/s, assumed"
    return facts_table(
        {
            "run": f"{params.plan}: {p.steps:,} steps of {p.batch_size} images, {frozen:.0%} of them frozen",
            "images": f"{N_TRAIN:,} to train on, {N_VAL:,} in a validation, {N_TEST:,} in the test, of UnED",
            "model": f"{p.backbone}: {model.backbone / 1e6:.1f} M parameters, {model.flops / 1e9:.1f} GFLOP an image",
            "heads": f"{heads / 1e6:.1f} M parameters, and {model.prototypes / 1e6:.1f} M for classes",
            "a GPU computes": f"{flops_per_s(params, model) / 1e12:,.0f} TFLOP/s: {pace}",
            "a GPU sends": f"{params.node_gb_per_s:g} GB/s within a node of {params.gpus_per_node}, "
            f"{params.network_gb_per_s:g} beyond it",
        }
    )


def table(costs: list[Cost]) -> Table:
    """Tabulate what the run costs on each number of GPUs."""
    rows = {
        "images a step": lambda c: f"{c.batch:,}",
        "steps": lambda c: f"{c.steps:,}",
        "a step computes, ms": lambda c: f"{1000 * c.computing:,.1f}",
        "and sends, ms": lambda c: f"{1000 * c.sending:,.2f}",
        "images/s": lambda c: f"{c.batch / (c.computing + c.sending):,.0f}",
        "validations and test, minutes": lambda c: f"{c.evaluating / 60:,.1f}",
        "**hours**": lambda c: f"**{c.hours:,.2f}**",
        "**euros**": lambda c: f"**{c.euros:,.2f}**",
        "memory of a GPU at least, GiB": lambda c: f"{c.memory / 2**30:,.1f}",
        "sent by a GPU in a step, MB": lambda c: f"{(c.gradients + c.features) * (c.n > 1) / 1e6:,.0f}",
        "read from disks, MB/s": lambda c: f"{c.reading / 1e6:,.0f}",
        "cores that decode, for each GPU": lambda c: f"{c.cores:,.1f}",
        "disk: images and checkpoints, GB": lambda c: f"{c.disk / 1e9:,.0f}",
    }
    head = ["", *(f"{c.n} GPU{'s' * (c.n > 1)}" for c in costs)]
    return lines_table(head, [[name, *(say(c) for c in costs)] for name, say in rows.items()])


def chart(costs: list[Cost]) -> go.Figure:
    """Draw GPU hours by what they are spent on: what is above the computing is what many GPUs cost more."""
    fig = charts.panels("GPU hours, by what they are spent on", [""], height=380)
    parts = {
        "computing": ("#0b8f8f", lambda c: c.steps * c.computing),
        "sending": ("#d9720b", lambda c: c.steps * c.sending),
        "validations and test": ("#8c8c8c", lambda c: c.evaluating),
    }
    for name, (colour, seconds) in parts.items():
        hours = charts.f32([c.n * seconds(c) / 3600 for c in costs])
        bar = go.Bar(name=name, x=[f"{c.n}" for c in costs], y=hours, marker={"color": colour})
        fig.add_trace(bar.update(hovertemplate="%{y:.2f} h"))
    fig.update_xaxes(title="GPUs", type="category")
    fig.update_yaxes(title="GPU hours", rangemode="tozero")
    return fig.update_layout(barmode="stack")

"""What a machine computes with: its cores, its device, the precision that it multiplies fast."""

import os

import pytest
import torch

from udonlib.errors import UserError
from udonlib.models import processors
from udonlib.models.processors import computing_in, lone_threads

CPU = torch.device("cpu")
MULTIPLIES = processors.multiplies_bfloat16  # before the tests' fixture says that nothing does


@pytest.fixture
def bfloat16_cpu(monkeypatch):
    """A processor with instructions for bfloat16."""
    monkeypatch.setattr(processors, "multiplies_bfloat16", MULTIPLIES)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.fixture
def plain_cpu(monkeypatch):
    """A processor without."""
    monkeypatch.setattr(processors, "multiplies_bfloat16", MULTIPLIES)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_a_processor_with_bfloat16_instructions_computes_in_it(bfloat16_cpu):
    assert processors.pick_precision("auto", CPU) == "bfloat16"
    assert processors.dtype_of("auto", CPU) == torch.bfloat16


def test_a_processor_without_them_computes_in_float32(plain_cpu):
    assert processors.pick_precision("auto", CPU) == "float32"
    assert processors.dtype_of("auto", CPU) == torch.float32


def test_tiles_that_multiply_bfloat16_count_too(plain_cpu, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert processors.pick_precision("auto", CPU) == "bfloat16"


@pytest.mark.parametrize(("limit", "expected"), [("avx2", "float32"), ("AVX512_CORE_BF16", "bfloat16")])
def test_a_limit_on_instructions_is_kept(bfloat16_cpu, monkeypatch, limit, expected):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert processors.pick_precision("auto", CPU) == expected


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_is_asked_itself(monkeypatch, has_it):
    monkeypatch.setattr(processors, "multiplies_bfloat16", MULTIPLIES)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    expected = "bfloat16" if has_it else "float32"
    assert processors.pick_precision("auto", torch.device("cuda")) == expected


def test_apples_gpu_computes_in_float32(bfloat16_cpu):
    assert processors.pick_precision("auto", torch.device("mps")) == "float32"


def test_a_precision_that_was_asked_for_stays(bfloat16_cpu):
    assert processors.pick_precision("float32", CPU) == "float32"
    assert processors.dtype_of("float32", CPU) == torch.float32


def test_a_slow_precision_is_warned_of_with_the_factor(plain_cpu, monkeypatch):
    monkeypatch.setattr(processors, "_times_as_long", lambda device: 19.6)
    message = processors.slow_precision("bfloat16", CPU)
    assert message is not None
    assert "'bfloat16' is slow here" in message
    assert "20 times as long as in float32" in message
    assert processors.slow_precision("float32", CPU) is None


def test_a_precision_that_is_fast_is_not_warned_of(bfloat16_cpu):
    assert processors.slow_precision("bfloat16", CPU) is None


def test_the_factor_is_measured():
    assert processors._times_as_long(CPU) > 0


def test_the_cores_are_those_of_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr(processors, "_quota", lambda: float("inf"))
    assert processors.n_cores() == 3


def test_a_system_without_affinities_counts_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(processors, "_quota", lambda: float("inf"))
    assert processors.n_cores() == 8


@pytest.mark.parametrize(("granted", "expected"), [("250000 100000", 3), ("50000 100000", 1), ("max 100000", 64)])
def test_a_containers_quota_limits_the_cores(monkeypatch, tmp_path, granted, expected):
    file = tmp_path / "cpu.max"
    file.write_text(granted + "\n")
    quota = processors._quota(file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(processors, "_quota", lambda: quota)
    assert processors.n_cores() == expected


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processors.pick_device("auto") == CPU
    with pytest.raises(UserError, match=r"parameter 'device': found 'cuda:1', .* valid: auto, cpu"):
        processors.pick_device("cuda:1")
    with pytest.raises(UserError, match=r"parameter 'device': found 'mps', which has no float64, .* valid: auto, cpu"):
        processors.pick_device("mps")


def test_the_number_of_threads_is_as_before_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with lone_threads(2, "x") as pool:
            assert torch.get_num_threads() == 1
            assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_computed_within_has_the_precision_asked_for():
    layer, values = torch.nn.Linear(4, 3), torch.ones(2, 4)
    for precision in (torch.float32, torch.bfloat16):
        with computing_in(precision, torch.device("cpu")):
            assert layer(values).dtype == precision
        assert layer(values).dtype == torch.float32

"""Several processes against one; each number of them is started once, and does all of its cases."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from tests.helpers import ranks
from tests.helpers.catalogs import write_uned_tree
from tests.helpers.training import make, same
from udonlib.data.catalog import load_catalog
from udonlib.errors import UserError
from udonlib.training.parallel import world as world_module
from udonlib.training.parallel.world import ONE, World
from udonlib.training.steering import RunStoppedError

# A batch of 8 images has unequal parts in 3 processes, and domains that not all of them see.
CASES = {2: list(ranks.CASES), 3: ["mixed", "offline", "split", "split_joint"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_uned_tree(folder / "data")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What comes out of a case in one process."""
    return functools.cache(lambda case: ranks.train(folder / "data", case))


@pytest.fixture(scope="module")
def together(folder):
    """What comes out in each of so many processes."""
    return functools.cache(lambda size: ranks.train_together(folder, size, CASES[size]))


every_case = pytest.mark.parametrize(("size", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
every_size = pytest.mark.parametrize("size", CASES)


def of_kind(records, kind):
    return [record for record in records if record["kind"] == kind]


@every_case
def test_all_processes_end_in_the_same_bits_and_have_the_same_records(together, size, case):
    first, *others = [left[case] for left in together(size)]
    assert len(others) == size - 1
    for other in others:
        assert same(other["weights"], first["weights"])
        assert same(other["kept"], first["kept"])
        assert first["records"] == other["records"]


@every_case
def test_several_processes_train_what_one_trains(together, alone, size, case):
    found, expected = together(size)[0][case], alone(case)
    assert [(r["kind"], r["step"]) for r in found["records"]] == [(r["kind"], r["step"]) for r in expected["records"]]
    for kind in ("train", "allocation"):  # the allocation, to the image
        for record, wanted in zip(of_kind(found["records"], kind), of_kind(expected["records"], kind), strict=True):
            assert record["images_seen"] == wanted["images_seen"]
            assert record.get("shares", {}) == pytest.approx(wanted.get("shares", {}), abs=1e-6)
            for domain, losses in record.get("losses", {}).items():
                assert losses == pytest.approx(wanted["losses"][domain], rel=1e-4, abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for part in ("weights", "kept", "moments"):
        assert found[part].keys() == expected[part].keys()
        off = {name: (value - expected[part][name]).abs().max().item() for name, value in found[part].items()}
        assert {name: size for name, size in off.items() if size > 1e-5} == {}


@pytest.mark.parametrize(
    ("size", "case"), [(n, case) for n, cases in CASES.items() for case in cases if "split" in case]
)
def test_each_process_holds_the_prototypes_of_a_part_of_the_classes(together, alone, size, case):
    held = [left[case]["n_held"] for left in together(size)]
    assert held[0]
    for name, n in alone(case)["n_held"].items():
        assert [of_one[name] for of_one in held] == [n * (r + 1) // size - n * r // size for r in range(size)]
        assert len(together(size)[0][case]["weights"][name]) == n


def test_what_the_first_process_is_told_all_of_them_do(together):
    for left in together(2):
        records = left["steered"]["records"]
        [told] = of_kind(records, "steering")
        assert told["step"] == 6
        shares = {record["step"]: record["shares"]["emoji"] for record in of_kind(records, "allocation")}
        assert shares[6] > 0.6 > shares[4]
        assert 6 in {record["step"] for record in of_kind(records, "validation")}
        records = left["unic"]["records"]
        [told] = of_kind(records, "steering")
        assert (told["teachers"], told["drop_probability"]) == ({"second": 0.2}, 0.9)
        losses = {record["step"]: record["losses"].values() for record in of_kind(records, "train")}
        kept = {step: [terms["first/kept"] + terms["second/kept"] for terms in losses[step]] for step in (6, 9, 12)}
        assert max(map(np.mean, (kept[9], kept[12]))) < 1.3 < np.mean(kept[6])


@every_size
def test_rows_are_gathered_from_all_and_their_gradients_summed(together, size):
    everything = torch.arange(21.0).view(7, 3)
    found = [left["sums"] for left in together(size)]
    places = [sums["rows"] for sums in found]
    assert places[0][0] == 0
    assert places[-1][1] == 7
    assert all(before[1] == after[0] for before, after in itertools.pairwise(places))
    assert {stop - start for start, stop in places} <= {7 // size, 7 // size + 1}
    for sums in found:
        assert torch.equal(sums["whole"], everything)
        # The loss of process r is r + 1 times the sum of squares.
        assert torch.equal(sums["gradient"], size * (size + 1) * everything[slice(*sums["rows"])])
        assert sums["some"].tolist() == [1, 2]


@every_size
def test_tensors_of_all_types_and_layouts_are_summed_and_averaged(together, size):
    total = size * (size + 1) // 2
    maps = torch.full((2, 3, 4, 4), float(total))
    maps[0, 1, 2, 3] = 0
    for left in together(size):
        sums = left["sums"]
        assert torch.equal(sums["maps"], maps)
        assert sums["counts"].tolist() == [total, 5 * size]
        assert sums["total"] == 2 * size
        assert sums["mean"].tolist() == [total / size] * 2


@every_size
def test_the_first_process_gives_its_state_and_goes_first_and_takes_what_others_send(together, size):
    first, *others = [left["sums"] for left in together(size)]
    assert first["collected"] == [f"of {rank}" for rank in range(size)]
    assert first["sent"] == [(rank, number) for number in range(20) for rank in range(1, size)]
    for sums in others:
        assert sums["shared"] == [[0.0, 0.0]]
        assert sums["collected"] == sums["sent"] == []
        assert len(sums["passed"]) == 2
        assert first["passed"][-1] < sums["passed"][0]


@every_size
def test_the_first_process_s_word_reaches_all(together, size):
    assert all(left["words"] == ranks.WORDS for left in together(size))


def test_one_process_has_everything_and_says_it_to_itself():
    rows = torch.rand(5, 2)
    kept = rows.clone()
    assert ONE.is_first
    assert ONE.rows(5) == slice(0, 5)
    assert ONE.gather(rows, 5) is rows
    assert ONE.sum(rows) is rows
    assert ONE.broadcast("stop") == "stop"
    assert ONE.collect("mine") == ["mine"]
    assert list(ONE.in_turn(range(2))) == [0, 1]
    assert ONE.device(torch.device("cuda:1")) == torch.device("cuda:1")
    error = ValueError()
    assert ONE.cause(error) is error
    ONE.leave(error)
    ONE.sum_([rows])
    ONE.average_([rows])
    assert torch.equal(rows, kept)


def test_nobody_is_waited_for_who_was_not_started_by_torchrun(monkeypatch):
    for name in world_module.NEEDED:
        monkeypatch.delenv(name, raising=False)
    assert world_module.join() is ONE
    monkeypatch.setenv("WORLD_SIZE", "8")  # schedulers set some of them, too
    assert world_module.join() is ONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world_module.join() is ONE


class Store:
    """Keeps the first word, as that of torchrun does."""

    def __init__(self):
        self.word = ""

    def compare_set(self, key, expected, word):
        self.word = self.word or word
        return self.word.encode()


def several(store, rank=0, n_here=2):
    """One of two processes that needs no others."""
    world = world_module.Processes.__new__(world_module.Processes)
    world.rank, world.size, world.n_here, world._store, world._last = rank, 2, n_here, store, None
    return world


def test_whoever_fails_first_says_why_and_all_others_end_without_a_word():
    store = Store()
    first, second = several(store, 1), several(store, 0)
    bad, gone = UserError("image 5 is none"), world_module.LostError("another process has ended")
    assert first.cause(bad) is bad
    first.leave(bad)
    assert str(second.cause(gone)) == "image 5 is none"
    with pytest.raises(SystemExit) as end:
        second.leave(gone)
    assert end.value.code == 1
    assert str(end.value.__cause__) == "image 5 is none"
    second.leave(GeneratorExit())
    second.leave(SystemExit(0))


def test_what_somebody_stops_ends_well_and_the_first_process_says_so():
    stop = RunStoppedError("the run was stopped")
    first, second = several(Store(), 0), several(Store(), 1)
    first.leave(stop)
    with pytest.raises(SystemExit) as end:
        second.leave(stop)
    assert end.value.code == 0


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    world = several(Store(), n_here=3)
    assert world.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world.device(torch.device("cuda")) == torch.device("cuda:1")
    assert taken == [1]
    with pytest.raises(UserError, match="parameter 'device': found 'cuda:0' for 2 processes, expected cuda"):
        world.device(torch.device("cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="3 processes on a machine with GPUs: 2; each needs one"):
        world.device(torch.device("cuda"))


def test_batch_norm_of_several_processes_is_said():
    normed = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    assert "batch norm sees the images of its own process, of which there are 2" in world_module.normed_apart(
        normed, several(Store())
    )
    assert world_module.normed_apart(normed, ONE) == ""
    assert world_module.normed_apart(torch.nn.Sequential(torch.nn.LayerNorm(2)), several(Store())) == ""


def test_a_batch_smaller_than_the_number_of_processes_is_refused(folder):
    class Many(World):
        size = 9

    with pytest.raises(UserError, match="parameter 'batch_size': found 8 images for 9 processes"):
        make(load_catalog(str(folder / "data")), world=Many())

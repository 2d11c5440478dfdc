"""What a run depends on: files that must not change under it. Replays are tested in test_steered_runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from udonlib.errors import UserError
from udonlib.params import TrainParams
from udonlib.runs.begin.origins import check_origins, differences, origins
from udonlib.runs.folder import RunFolder

PLAIN = {"pretrained": False, "backbone": "small_resnet"}


def test_each_file_has_its_digest_and_one_that_is_missing_has_none(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    for name, n in (("w.safetensors", 1), ("v.safetensors", 0)):
        found = origins(TrainParams(**PLAIN, weights=str(tmp_path / name)), {})
        assert len(found) == n
        assert all(len(digest) == 64 for digest in found.values())
    assert origins(TrainParams(**PLAIN, start="none", outputs=str(tmp_path)), {}) == {}


def test_a_file_that_changed_is_named(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('[{"data_fingerprint": "x", "origins": {"weights \'w\'": "1"}}]')
    check_origins(RunFolder(tmp_path), {"weights 'w'": "1", "weights 'v'": "2"})
    with pytest.raises(UserError, match="does not fit: the weights 'w' has changed since it began. Restore the file"):
        check_origins(RunFolder(tmp_path), {"weights 'w'": "2"})


def test_differences_are_said_with_both_values() -> None:
    one, other = TrainParams(**PLAIN, steps=4, seed=1), TrainParams(**PLAIN, steps=8)
    assert differences(one, other, {"seed"}) == ["steps: 4 there, 8 here"]

"""The rows of the steering panel by themselves: what they show of a wish, and what they ask for."""

import pytest

from udonlib.lab.views.controls import rows
from udonlib.params import TrainParams
from udonlib.training.interventions import Wish

PARAMS = TrainParams(w_ce_teacher=0.0, w_kl=0.0, w_rel=0.0, sampler="round_robin")


def test_a_share_is_typed_in_percent_with_or_without_the_sign():
    row = rows.rows(["emoji"])["emoji"]
    assert [row.typed(text) for text in ("20", " 12,5 % ", "100", "0%", "")] == [0.2, 0.125, 1.0, 0.0, None]
    for text in ("x", "-1", "101", "nan"):
        with pytest.raises(ValueError, match=f"emoji: found '{text}', expected a share from 0 to 100 percent, or"):
            row.typed(text)


def test_a_row_shows_what_is_wanted_and_asks_for_what_it_shows():
    row, rate = rows.rows(["emoji"])["emoji"], rows.rate_row(PARAMS, ["emoji"])
    wish = Wish(locks={"emoji": 1 / 3}, rate=0.5)
    assert not row.shows(wish)
    for each in (row, rate):
        each.show(wish)
        assert each.shows(wish)
    assert (row.share.value, row.lock.icon, row.slider.disabled) == ("33.33", rows.CLOSED, False)
    assert rate.slider.value == 0.5
    assert rate.change(2.0) == {"rate": 2.0}
    assert rate.change(None) == {"rate": 1.0}
    assert 0.0 not in [value for _, value in rate.slider.options]
    row.enable(False)
    assert row.share.disabled

"""What a user did wrong is said in words that fit on a line."""

import pytest

from udonlib.errors import ParameterError, nearest
from udonlib.params import TrainParams


def test_a_name_like_no_other_is_answered_with_the_first_twenty_valid_ones():
    names = [f"name{number:02d}" for number in range(25)]
    twenty = "valid: " + ", ".join(names[:20])
    assert nearest("q", names) == f"{twenty} and 5 more"
    assert nearest("q", names[:20]) == twenty
    assert nearest("q", []) == "valid: none"
    assert nearest("NAME7", names) in [f"did you mean '{name}'?" for name in ("name07", "name17")]


@pytest.mark.parametrize(("n", "shown"), [(78, repr("x" * 78)), (79, "'" + "x" * 76 + "...")])
def test_a_value_is_shown_with_80_signs_at_most(n, shown):
    assert len(shown) == 80
    with pytest.raises(ParameterError) as error:
        TrainParams(steps="x" * n)
    assert f"parameter 'steps': found {shown} (str), expected" in str(error.value)

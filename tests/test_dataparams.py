import pytest

from udonlib.dataparams import DataParams
from udonlib.errors import UserError


@pytest.mark.parametrize("value", ["emoji, kanji", "emoji,kanji", ["emoji", "kanji"], ("emoji", "kanji")])
def test_domains_may_be_a_list_or_text_with_commas(value):
    assert DataParams(domains=value).domains == ("emoji", "kanji")


def test_all_domains_are_all_in_a_list_too():
    assert DataParams(domains=["all"]).domains == DataParams(domains="all").domains == "all"


def test_data_parameters_alone_know_nothing_of_training():
    assert DataParams(data="x", domains="a").domains == ("a",)
    with pytest.raises(UserError, match="no such parameter"):
        DataParams(steps=3)

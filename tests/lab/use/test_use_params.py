"""What search.ipynb and release.ipynb take."""

import pytest

from udonlib.errors import UserError
from udonlib.lab.use.use_params import ReleaseParams, SearchParams


def test_defaults_are_the_latest_run_and_its_own_images():
    assert (SearchParams().model, SearchParams().data, SearchParams().index) == ("latest", "auto", None)
    assert (ReleaseParams().run, ReleaseParams().folder, ReleaseParams().licence) == ("latest", "auto", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", 0), ("k", 51), ("kind", "flat"), ("false_labels", 0), ("recall", 1.1), ("modle", "latest")],
)
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"parameter '{name}'"):
        SearchParams(**{name: value})


def test_text_of_papermill_is_read_as_what_it_means():
    assert SearchParams(false_labels="1e-1", k="4", domains="emoji, flags").domains == ("emoji", "flags")

"""Parameters of the notebooks that look at results, at the edges of what is valid."""

import pytest

from udonlib.errors import ParameterError
from udonlib.notebookparams import DataParams, EmbeddingsParams, EvaluateParams, GapParams, GridParams, SamplerParams

LEAST = [
    (GapParams, {"k": 1, "n_bins": 1, "n_queries": 1, "seed": 0}),
    (EvaluateParams, {"k": 1, "eval_batch_size": 1}),
    (GridParams, {"jobs": 1, "steps": 1}),
    (SamplerParams, {"steps": 1, "batch_size": 1, "domains_per_batch": 1, "update_every": 1}),
    (EmbeddingsParams, {"max_points": 10, "n_hubs": 1}),
]


@pytest.mark.parametrize(
    ("kind", "name", "least"), [(kind, *each) for kind, values in LEAST for each in values.items()]
)
def test_the_least_value_is_valid_and_one_less_is_not(kind: type[DataParams], name: str, least: int) -> None:
    given = {"run": "mine"} if kind is EvaluateParams else {}
    assert getattr(kind(**given, **{name: least}), name) == least
    with pytest.raises(ParameterError, match=f"parameter '{name}': found {least - 1}"):
        kind(**given, **{name: least - 1})

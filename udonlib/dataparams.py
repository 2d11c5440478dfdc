"""Parameters in general: how they are read and checked together; and those that say which images are meant."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from udonlib.bounds import long_name
from udonlib.errors import ParameterError, problems
from udonlib.home import located
from udonlib.written import read_as


class DataParams(BaseModel):
    """Which images: what every notebook that reads a catalog takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = Field(
        "miniuned", min_length=1, description="'miniuned', or a folder or zip: UnED's form or folders of images"
    )
    images: str | None = Field(None, min_length=1, description="root of the images where it is not under `data`")
    domains: Literal["all"] | tuple[str, ...] = Field("all", description="'all' or names: a list, or text with commas")

    def __init__(self, /, **values: Any) -> None:
        """Check all values together. Raises ParameterError naming every parameter that is unknown or wrong."""
        try:
            fields = type(self).model_fields
            read = {name: read_as(fields[name].annotation, value) for name, value in values.items() if name in fields}
            super().__init__(**self.implied(values) | values | read)
        except ValidationError as error:
            raise ParameterError(problems(type(self), error, values)) from None

    @classmethod
    def implied(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values that others bring along where they are not given themselves."""
        return {}

    @model_validator(mode="after")
    def _name_what_can_be(self) -> "DataParams":
        texts = {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), str)}
        wrong = {name: problem for name, text in texts.items() if (problem := long_name(text))}
        if wrong:
            raise ParameterError(wrong)
        return self

    _locate = field_validator("data", "images")(located)

    @field_validator("domains")
    @classmethod
    def _name_domains(cls, names: Literal["all"] | tuple[str, ...]) -> Literal["all"] | tuple[str, ...]:
        if names == "all" or names == ("all",):
            return "all"
        return different(names, "'all' or one or more different names")


def different(values: tuple, expected: str = "one or more different values, with commas between them") -> tuple:
    """Refuse a list that is empty, or names something twice or not at all, as text with a comma too many does."""
    if not values or "" in values or len(set(values)) < len(values):
        raise ValueError(f"expected {expected}")
    return values

"""What the tables of every configuration are made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator


class Strict(BaseModel):
    """Table without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"must not be true or false, got {value}")
        return value


def _compiles(pattern: str) -> str:
    """The pattern. Raises: ValueError if it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as err:
        raise ValueError(f"must be a regular expression ({err})") from err
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""

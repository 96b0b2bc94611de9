"""What every section of the configuration is built from: the base class and the ranges of values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16", "float16"]
SubjectId = Annotated[int, Field(ge=1)]
Scalar = bool | int | float | str
Value = Scalar | tuple[float, ...]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, docstrings under the fields become their description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a refused URL may hold a password
    )

"""What every section of a config is made of: number types, and relations between fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Schedule = Literal['cosine', 'linear', 'constant']

# Keys that a broken relation speaks of (relative to the section), and the sentence about it.
Relation = tuple[tuple[str, ...], str]


class Section(BaseModel):
  """A frozen group of settings; unknown keys are faults."""

  model_config = ConfigDict(extra='forbid', frozen=True, allow_inf_nan=False, validate_default=True)

  def relations(self) -> Iterator[Relation]:
    """Yields every broken relation between this section's own fields."""
    yield from ()

  @model_validator(mode='after')
  def _check_relations(self):
    errors = [
      InitErrorDetails(
        type=PydanticCustomError('relation', '{text}', {'text': text, 'keys': keys}),
        loc=(),
        input=None,
      )
      for keys, text in self.relations()
    ]
    if errors:
      raise ValidationError.from_exception_data(type(self).__name__, errors)
    return self

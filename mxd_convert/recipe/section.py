"""The base class of a recipe's sections, and what several of them share."""

import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, le=10**13)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Base class of all sections. Unknown keys and implicit type conversions are errors, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def is_local(path: str) -> bool:
    """Return whether `path` is local rather than a Hub id. In a resolved recipe, local paths are absolute."""
    return os.path.isabs(path)

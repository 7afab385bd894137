"""Node schemas that older hosts understand: arguments they do not know are dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

CATEGORY = "DyDiT"
AdapterType = io.Custom("DYDIT_ADAPTER")


def lenient(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`make(*args, **kwargs)` without the keyword arguments that this host's version lacks."""
    known = inspect.signature(make).parameters
    return make(*args, **{key: value for key, value in kwargs.items() if key in known})


def schema(**kwargs: Any) -> io.Schema:
    return lenient(io.Schema, category=CATEGORY, **kwargs)

"""What all sections check their values with: one line that names the key, the rule, the value and what to do."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from so3krates_dist.errors import ConfigError


def check(condition: bool, key: str, rule: str, got: object, remedy: str = "Change the value") -> None:
    """Raise `ConfigError` where a condition does not hold."""
    if not condition:
        raise ConfigError(key, rule, got, remedy)


def check_numbers(
    section: Any, prefix: str, *, positive: Sequence[str] = (), at_least_zero: Sequence[str] = ()
) -> None:
    """Check that all floats are finite and the named numbers are in range."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, float):
            check(math.isfinite(value), f"{prefix}.{field.name}", "be a finite number", value)
    for name in positive:
        value = getattr(section, name)
        check(value > 0, f"{prefix}.{name}", "be greater than zero", value)
    for name in at_least_zero:
        value = getattr(section, name)
        check(value >= 0, f"{prefix}.{name}", "be zero or greater", value)

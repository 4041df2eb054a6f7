"""The definition of one setting: its type and bounds, and how its values are parsed and validated.

Independent of particular settings, the environment and files. Every error is one line that names where the value came
from, the value, and what was expected.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from surfw.errors import ConfigurationError

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_SHOWN = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting's definition.

    Attributes:
        name: the keyword in Python and the key in a file.
        kind: the type of its values.
        optional: whether it may be None, which neither a variable nor a file can express.
        default_text: the default in words; empty for a switch that is off.
        help: its meaning, in one line.
        least: the smallest number; None for no limit.
        most: the largest number; None for no limit.
        choices: the allowed texts; empty for any.
        words: for a switch, texts it may be besides on and off.
        metavar: what help shows instead of the type.
        form: describes valid values if the type alone does not, such as `a size such as 1.5GB`.
        has_form: whether a text or a table is valid; None if all are.
        many: whether several texts may be given: as a repeated option, a list in a file, or a JSON list in a variable.
    """

    name: str
    kind: type
    optional: bool
    default_text: str
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    metavar: str | None = None
    form: str = ""
    has_form: Callable[[Any], bool] | None = None
    many: bool = False

    @property
    def variable(self) -> str:
        """The environment variable: `SURFW_PORT`."""
        return f"SURFW_{self.name.upper()}"

    @property
    def option(self) -> str:
        """The command-line option: `--port`; for a table, an option that sets one entry."""
        name = self.name.removesuffix("s") if self.kind is dict else self.name
        return f"--{name.replace('_', '-')}"

    @property
    def expected(self) -> str:
        """Describes valid values, for errors."""
        if self.choices:
            return " or ".join(self.choices)
        if self.kind not in {int, float}:
            switch = f"true, false or {' or '.join(self.words)}" if self.words else "true or false"
            return switch if self.kind is bool else self.form or "a text that is not empty"
        number = "a whole number" if self.kind is int else "a number"
        if self.least is None:
            return number
        return f"{number} from {self.least} to {self.most}" if self.most is not None else f"{number} >= {self.least}"

    def check(self, value: object, where: str) -> Any:
        """Validate a value; integers are accepted as floats, and paths as texts.

        Args:
            value: a value from an argument or a file.
            where: names the value in errors, such as `surfw.toml: port`.

        Raises:
            ConfigurationError: the value has the wrong type or is out of bounds.
        """
        if value is None and self.optional:
            return None
        if self.many and isinstance(value, list | tuple):
            parts = tuple(replace(self, optional=False, many=False).check(part, where) for part in value)
            return parts if len(parts) > 1 else next(iter(parts), None)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                value = float(value)
        if self.kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not self._fits(value):
            raise self._refusal(value, where)
        return value

    def parse(self, text: str, where: str) -> Any:
        """Parse and validate a value from an environment variable.

        Args:
            text: the variable's value.
            where: names the variable in errors, such as `SURFW_PORT`.

        Raises:
            ConfigurationError: the text has the wrong type, or the value is out of bounds.
        """
        if self.kind is dict:
            return self._parse_table(text, where)
        if self.many and text.strip().startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                return self.check(json.loads(text), where)
        value: object = text
        with contextlib.suppress(ValueError, KeyError):
            value = _WORDS[text.strip().lower()] if self.kind is bool else self.kind(text)
        if not self._fits(value):
            raise self._refusal(text, where)
        return value

    def _parse_table(self, text: str, where: str) -> Any:
        expected = f'{self.expected} as JSON, such as {{"name": "value"}}'
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigurationError(f"{where} is not JSON, expected {expected}") from None  # the cause has the text
        if not self._fits(value):
            raise ConfigurationError(f"{where} is {_kind_of(value)}, expected {expected}")
        return value

    def _refusal(self, value: object, where: str) -> ConfigurationError:
        seen = _kind_of(value) if self.kind is dict else _show(value)  # a table may hold secrets
        return ConfigurationError(f"{where} is {seen}, expected {self.expected}")

    def _fits(self, value: object) -> bool:
        if value in self.words:
            return True
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return False
        if self.choices:
            return value in self.choices
        if isinstance(value, str | dict) and self.has_form:
            return self.has_form(value)
        if isinstance(value, str):
            return bool(value.strip())
        return isinstance(value, bool) or not isinstance(value, int | float) or self._is_within(value)

    def _is_within(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (self.least is None or self.least <= value) and (self.most is None or value <= self.most)


def _kind_of(value: object) -> str:
    """Describe something that is not a valid table, without its values."""
    if isinstance(value, dict):
        return "a table with a name of other characters than letters, digits and _"
    kinds = {str: "a text", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "nothing" if value is None else f"of type {type(value).__name__}")


def _show(value: object) -> str:
    """Format a refused value for an error, shortened to fit on a line."""
    try:
        text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

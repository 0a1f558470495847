"""How a decision's value stands in a cell of somebody's table or file, or in somebody's JSON: a number with decimals, or a name.

Belongs here: translating one value, exactly, both ways. Does not: reading or writing tables, files and answers.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

from delivery.connectors.template import ABSENT, INT64, Unfit, scaled

LARGEST = 2**63 - 1


class Strict(BaseModel):
    """Unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Cells(Strict):
    """What the settings of a table and of a file say of the cell that holds the value."""

    decimals: int = Field(
        default=0,
        ge=0,
        le=9,
        description="The cell holds value / 10^decimals: 6 where the decision is in micros and the cell in units of money",
    )
    names: dict[int, str] | None = Field(
        default=None, description="The cell holds a name: value → name, for example {1: urgent, 2: high}"
    )

    @field_validator("names")
    @classmethod
    def _one_to_one(cls, names: dict[int, str] | None) -> dict[int, str] | None:
        if names is not None and len(set(names.values())) != len(names):
            raise ValueError("two values have the same name, so that a read could not tell them apart")
        return names

    def put(self, value: int) -> int | Decimal | str:
        """What to store for a value. ValueError where the cell cannot hold it, in words for people."""
        if self.names is not None:
            if value not in self.names:
                raise ValueError(f"no name is given for {value}; names are given for {sorted(self.names)}")
            return self.names[value]
        if not -LARGEST <= value <= LARGEST:
            raise ValueError("the value does not fit into 64 bits")
        if not self.decimals:
            return value
        number = Decimal(value).scaleb(-self.decimals)
        whole = number.to_integral_value()
        return int(whole) if number == whole else number.normalize()

    def take(self, found: object) -> tuple[int | None, str]:
        """The value of a stored cell; None, and what stands there, where it is none."""
        if found is None or found == "":
            return None, "the value is empty"
        shown = repr(str(found)[:40])
        if self.names is not None:
            for value, name in self.names.items():
                if found == name:
                    return value, ""
            return None, f"{shown} is none of the named values"
        if isinstance(found, bool) or not isinstance(found, int | float | Decimal | str):
            return None, f"{shown} is no number"
        try:
            # str(): a float is read as people see it, 0.1 rather than 0.1000000000000000055
            number = Decimal(str(found).strip()).scaleb(self.decimals)
            whole = int(number)
        except (InvalidOperation, ValueError, OverflowError):
            return None, f"{shown} is no number"
        if whole != number or abs(whole) > LARGEST:
            return None, f"{shown} is no whole number of the decision's unit"
        return whole, ""


class Values(Strict):
    """How the decision's whole numbers stand in the system, and how they are written there."""

    kind: Literal["integer", "decimal", "text", "names", "boolean"] = Field(
        description='integer: 3; decimal: 70.5; text: "3", "70.50" (int64 strings, ids, amounts); names: each number stands for '
        "a name, or for another number; boolean: 1 is true, 0 is false"
    )
    decimals: int = Field(
        default=0,
        ge=0,
        le=18,
        description="The system holds value / 10^decimals: 6 where the decision is in micros and the system in units of money, "
        "4 where it is in cents",
    )
    places: int | None = Field(
        default=None,
        ge=0,
        le=18,
        description="Digits after the point, for decimal and text: a finer value is never sent, and a text always has them",
    )
    names: dict[StrictStr | StrictInt, StrictInt] = Field(
        default={},
        description="For `names`: what the system shows (a name, or a number of its own) → the decision's number",
    )
    ignore_case: bool = Field(default=False, description="`names` are read in capital and small letters alike")
    written: dict[StrictInt, StrictStr | StrictInt | StrictBool | float | None] = Field(
        default={},
        description="The decision's number → what is written, where that is something else than what is read: "
        "an id where a name is shown, or a name where an id is. Then every number that may be sent stands here",
    )
    null_is: StrictInt | None = Field(
        default=None, description="The number that an empty value stands for, read as well as written"
    )
    min: int = Field(default=INT64[0], description="Smaller is never sent")
    max: int = Field(default=INT64[1], description="Larger is never sent")

    @model_validator(mode="after")
    def _both_ways(self) -> Values:
        if (self.kind == "names") != bool(self.names):
            raise ValueError("`names` stand with kind: names, and only there")
        taken = [*self.names.values(), *([] if self.null_is is None else [self.null_is])]
        if len(set(taken)) != len(taken):
            raise ValueError("two names stand for one number; which one would be written?")
        if len(self._numbers) != len(self.names):
            raise ValueError("two of the `names` read alike")
        if self.decimals and self.kind not in ("integer", "decimal", "text"):
            raise ValueError(f"`decimals` stand with kind: integer, decimal or text, and not with {self.kind}")
        if self.places is not None and (self.kind not in ("decimal", "text") or self.places > self.decimals):
            raise ValueError("`places` stand with kind: decimal or text, and are no more than `decimals`")
        if self.ignore_case and self.kind != "names":
            raise ValueError("`ignore_case` stands with kind: names")
        seen = [(type(form), form) for form in self.written.values()]
        if len(set(seen)) != len(seen):
            raise ValueError("`written` gives two numbers one form; a read-back could not tell them apart")
        unknown = set(self.written) - set(taken) if self.kind == "names" else set()
        if unknown:
            raise ValueError(f"`written` holds {min(unknown)}, which none of the `names` stands for")
        return self

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {self._plain(name): number for name, number in self.names.items()}

    def _plain(self, name: str | int) -> str:
        """A name as it is compared: a number and its text are the same."""
        return str(name).casefold() if self.ignore_case else str(name)

    def read(self, found: Any) -> tuple[int | None, str]:
        """The decision's number, or None and what stands there instead."""
        if found is ABSENT:
            return None, "no value stands where `read.value` points"
        if found is None or (found == "" and "" not in self.names):
            return self.null_is, "" if self.null_is is not None else "the value is empty"
        shown = f"{str(found)[:60]!r}"
        if self.kind == "names":
            whole = scaled(found, 0)
            number = self._numbers.get(self._plain(found if isinstance(found, str) or whole is None else whole))
            if isinstance(found, bool | list | dict):
                number = None
            return number, "" if number is not None else f"{shown} is none of the names of `values`"
        if self.kind == "boolean":
            return (int(found), "") if isinstance(found, bool) else (None, f"{shown} is neither true nor false")
        number = scaled(found, self.decimals)
        if number is not None:
            return number, ""
        unit = f", times 10^{self.decimals}" if self.decimals else ""
        return None, f"{shown} is no whole number of 64 bits{unit}"

    def write(self, value: int) -> Any:
        """The system's form of a number. Raises Unfit."""
        if not self.min <= value <= self.max:
            raise Unfit(f"{value} lies outside {self.min}…{self.max} (`values`)")
        if self.written:
            if value not in self.written:
                raise Unfit(f"{value} is not in `values.written`")
            return self.written[value]
        if value == self.null_is:
            return None
        if self.kind == "names":
            for name, number in self.names.items():
                if number == value:
                    return name
            raise Unfit(f"{value} has no name in `values.names`")
        if self.kind == "boolean":
            if value not in (0, 1):
                raise Unfit(f"{value} is neither 1 (true) nor 0 (false)")
            return bool(value)
        return self._amount(value)

    def _amount(self, value: int) -> int | float | str:
        amount = Decimal(value).scaleb(-self.decimals)
        places = 0 if self.kind == "integer" else self.places
        if places is not None and amount != round(amount, places):
            raise Unfit(f"{value} / 10^{self.decimals} has more than {places} digits after the point (`values`)")
        if self.kind == "text":
            return f"{amount:.{places}f}" if places is not None else f"{amount.normalize():f}"
        if amount == amount.to_integral_value():
            return int(amount)
        number = float(amount)
        if abs(value) > 2**53 or Decimal(str(number)) != amount:
            raise Unfit(
                f"{amount} has more digits than a JSON number keeps; say `kind: text` if the system takes texts"
            )
        return number

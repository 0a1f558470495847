"""How a decision's value stands in a cell of somebody's table or file: a number with decimals, or a name.

Belongs here: translating one cell, exactly, both ways. Does not: reading or writing tables and files.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from pydantic import BaseModel, ConfigDict, Field, field_validator

LARGEST = 2**63 - 1


class Cells(BaseModel):
    """What the settings of a table and of a file say of the cell that holds the value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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

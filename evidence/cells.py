"""Cells of the tables."""

from typing import Any


def percent(value: float, sign: str = "") -> str:
    return format(100 * value, f"{sign}.1f")


def interval(paired: dict[str, Any]) -> str:
    """A paired difference in points, with its interval."""
    return f"{percent(paired['difference'], '+')} [{percent(paired['low'], '+')}, {percent(paired['high'], '+')}]"

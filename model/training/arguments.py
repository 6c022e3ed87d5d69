"""Types of arguments for command lines, which say in words what they do not accept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of whole numbers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return value

    return number


def number_in(words: str, accepted: Callable[[float], bool]) -> Callable[[str], float]:
    """Return the type of numbers that are accepted. words: which these are: "from 0 to 1"."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not accepted(value):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    return number


# All of them refuse NaN, which compares false.
COUNT = at_least(1)
POSITIVE = number_in("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number_in("a number from 0 on", lambda value: 0 <= value < math.inf)
SHARE = number_in("from 0 to 1", lambda value: 0 <= value <= 1)
SOME_SHARE = number_in("above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_ONE = number_in("from 0 to below 1", lambda value: 0 <= value < 1)

"""How the pages write numbers."""

from __future__ import annotations

import math

RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(number: float) -> str:
    """2e-5, or 1.7e-5."""
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def raised(number: float) -> str:
    """10⁻⁵, or 2 · 10⁻²."""
    digits, exponent = f"{number:.0e}".split("e-")
    return ("" if digits == "1" else f"{digits} · ") + f"10⁻{str(int(exponent)).translate(RAISED)}"


def next_power(number: float) -> float:
    """The least power of ten that is no less."""
    return 10.0 ** math.ceil(math.log10(number))


def percent(share: float) -> str:
    return f"{100 * share:g} %"

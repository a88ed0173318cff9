"""The templates, and how they write numbers, times and addresses."""

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_THIN_SPACE = "\u202f"
_EN_DASH = "\u2013"


def percent(share: float | None) -> str:
    """Write a share in [0, 1], e.g. ``93.4 %``; a dash where there is none."""
    return _EN_DASH if share is None else f"{100 * share:.1f}{_THIN_SPACE}%"


def interval(ends: tuple[float, float]) -> str:
    """Write an interval of shares, in percent."""
    return f"{100 * ends[0]:.1f}{_EN_DASH}{100 * ends[1]:.1f}"


def whole(number: int) -> str:
    """Write a whole number with thin spaces between thousands."""
    return f"{number:,}".replace(",", _THIN_SPACE)


def utc(seconds: float) -> str:
    """Write a moment, given in seconds since the epoch, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """Write a duration to two units, e.g. ``3 min 20 s``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def address(root: str, *parts: str, **query: Any) -> str:
    """Return the address of a page; ``parts`` and ``query`` may be any text."""
    path = "/".join(quote(part, safe="") for part in parts)
    asked = {key: value for key, value in query.items() if value not in ("", None)}
    return f"{root}/{path}" + (f"?{urlencode(asked, doseq=True)}" if asked else "")


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "whole": whole,
        "utc": utc,
        "duration": duration,
    }
    environment.globals |= {"address": address, "now": time.time}
    return environment


TEMPLATES = _environment()
"""Escape everything, and fail where a value is missing."""

"""Patterns of dates that are text, as `strptime` of the C library reads them: those that say one day on any machine."""

import re
from collections.abc import Mapping

_DIRECTIVE = re.compile(r"%[-_0^#]*([EO]?.?)", re.DOTALL)  # flags of strftime change nothing of what is read
_OF_A_LANGUAGE = set("aAbBhcpPrxX")  # what is read so differs with the machine's locale
_IN_FULL = {
    "D": "%m/%d/%y",
    "F": "%Y-%m-%d",
    "R": "%H:%M",
    "T": "%H:%M:%S",
    "e": "%d",
    "k": "%H",
    "l": "%I",
    "n": " ",
    "t": " ",
}
_DIGITS = {"Y": 4, "j": 3, **dict.fromkeys("CydmHIMS", 2)}
_READ = {*_IN_FULL, *_DIGITS, *"uUwWz%"}
_ALLOWED = "%Y %m %d, %y, %j, %U or %W beside %w, %H %M %S, %z, and %F %D %T %R for several of them"


def fault(pattern: str) -> str | None:
    """Say why a pattern does not tell the day of a date; None if it does."""
    letters = _DIRECTIVE.findall(pattern)
    if _OF_A_LANGUAGE & set(letters):
        return "reads names of days or months, or AM and PM, which differ from machine to machine"
    dropped = [f"%{letter}" for letter in letters if letter not in _READ]
    if not dropped and {"U", "W"} & set(letters) and not {"u", "w"} & set(letters):
        dropped = [f"%{letter} without %w" for letter in letters if letter in "UW"]
    if not dropped:
        return None
    zone = "; a zone that is the same in all rows can be written as it stands, like UTC" if "%Z" in dropped else ""
    told = ", ".join(dict.fromkeys(dropped))
    return f"holds {told}, which says no day, or not the same on every machine; it may hold {_ALLOWED}{zone}"


def spelled_out(pattern: str) -> str:
    """Return the same pattern without abbreviations like %F, and without flags as in %-d."""
    return _DIRECTIVE.sub(lambda found: _IN_FULL.get(found[1], f"%{found[1]}"), pattern)


def instead(pattern: str, changes: Mapping[str, str]) -> str:
    """Return a pattern that reads the same text, and takes some of its parts for others."""
    return _DIRECTIVE.sub(lambda found: changes.get(found[1], found[0]), pattern)


def digits(pattern: str) -> int:
    """Count the digits of dates like 01022026; 0 where another sign stands between them, or where no 0 can be lost."""
    letters = _DIRECTIVE.findall(pattern)
    bare = "".join(f"%{letter}" for letter in letters) == pattern and set(letters) <= set(_DIGITS)
    return sum(_DIGITS[letter] for letter in letters) if bare and letters[0] != "Y" else 0

"""Learning rates as functions of the step alone, so that they are exact after a resume and the same at every party.

`base` is a group's own learning rate, `step` counts optimizer steps from 0, and `steps` is how many the whole job has.
With a warm-up the first `warmup` steps go up in a line, base * (step + 1) / warmup, and the rest of the schedule runs
over the steps that are left.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

Factor = Callable[[int, int], float]  # (step, steps) -> what the learning rate is multiplied with

_OPTIONS = {  # of each schedule; those without a default have to be given
    "constant": ("warmup",),
    "cosine": ("warmup", "min_lr"),
    "linear": ("warmup", "min_lr"),
    "step": ("every", "gamma", "warmup", "min_lr"),
    "exponential": ("gamma", "warmup", "min_lr"),
    "one_cycle": ("pct_start", "div_factor", "final_div_factor"),
}
NAMES = tuple(_OPTIONS)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A named schedule with its numbers."""

    name: str
    warmup: int = 0  # steps
    min_lr: float = 0.0
    every: int = 0  # steps between two drops
    gamma: float = 0.1
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Schedule":
        """Read a table like { name = "cosine", warmup = 200 }. Raises ValueError that says what is wrong with it."""
        options = dict(settings)
        name = options.pop("name", None)
        if not isinstance(name, str) or name not in _OPTIONS:
            raise ValueError(f"= {name!r} is unknown; it must be {', '.join(NAMES)} or module:callable")
        for key, value in options.items():
            if key not in _OPTIONS[name]:
                raise ValueError(f".{key} is unknown; {name!r} takes {', '.join(_OPTIONS[name])}")
            if problem := _problem(key, value):
                raise ValueError(f".{key} = {value!r}; it must be {problem}")
        missing = [key for key in ("every", "gamma") if key in _OPTIONS[name] and key not in options]
        if missing and (name, missing) != ("step", ["gamma"]):
            raise ValueError(f".{missing[0]} is missing; it must be {_NUMBERS[missing[0]][0]}")
        return cls(name, **{key: _KINDS[key](value) for key, value in options.items()})

    def rate(self, base: float, step: int, steps: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return base * (step + 1) / self.warmup
        done, whole = step - self.warmup, max(1, steps - self.warmup)
        match self.name:
            case "constant":
                return base
            case "cosine":
                return self.min_lr + (base - self.min_lr) * (1 + math.cos(math.pi * min(1.0, done / whole))) / 2
            case "linear":
                return self.min_lr + (base - self.min_lr) * (1 - min(1.0, done / whole))
            case "step":
                return max(self.min_lr, base * self.gamma ** (done // self.every))
            case "exponential":
                return max(self.min_lr, base * self.gamma**done)
            case _:
                return self._one_cycle(base, step, steps)

    def _one_cycle(self, base: float, step: int, steps: int) -> float:
        """Compute as torch's OneCycleLR with cosine phases and without a cycle of the momentum."""
        first = base / self.div_factor
        last = first / self.final_div_factor
        top = float(self.pct_start * steps) - 1
        if step <= top:
            return _cosine(first, base, step / top if top else 1.0)
        return _cosine(base, last, (step - top) / ((steps - 1 - top) or 1.0))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


_COUNT, _FROM_0 = "a whole number of at least 1, in steps", "a number of at least 0"
_NUMBERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "warmup": ("a whole number of at least 0, in steps", lambda n: isinstance(n, int) and n >= 0),
    "every": (_COUNT, lambda n: isinstance(n, int) and n >= 1),
    "min_lr": (_FROM_0, lambda x: x >= 0),
    "gamma": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "pct_start": ("a number above 0 and below 1", lambda x: 0 < x < 1),
    "div_factor": ("a number of at least 1", lambda x: x >= 1),
    "final_div_factor": ("a number of at least 1", lambda x: x >= 1),
}
_KINDS: Mapping[str, type] = {f.name: type(f.default) for f in fields(Schedule) if f.name != "name"}


def _problem(key: str, value: Any) -> str | None:
    """Return what a number must be, None if it is that."""
    told, fits = _NUMBERS[key]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return None if number and fits(value) else told

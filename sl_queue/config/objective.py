"""The settings in [fuse] that say what is learned and measured: the loss and the metrics, by name or in code."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

from sl_queue.compute.names import NAMED_LOSSES as LOSSES
from sl_queue.compute.names import metric_name
from sl_queue.config.schema import shown
from sl_queue.config.user_code import NAME
from sl_queue.protocol.text import nearest

_ABOVE_0 = "a number above 0"
_FLAG = "true or false"
_ANOTHER = 'another name in the history: as = "..."'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(x) and x >= 0 for x in value)


_SHARE = ("a number from 0 to below 1", lambda x: _is_number(x) and 0 <= x < 1)
_EACH = ("a list of numbers of at least 0, one for each class", _numbers)
_POSITIVE = ("a number above 0, or a list with one for each output", lambda x: _positive(x) or _numbers(x))
_Option = tuple[str, Callable[[Any], bool]]
OPTIONS: Mapping[str, Mapping[str, _Option]] = {  # of each loss that may be named
    "bce_with_logits": {"pos_weight": _POSITIVE},
    "cross_entropy": {"weight": _EACH, "label_smoothing": _SHARE},
    "mse": {},
    "l1": {},
    "huber": {"delta": (_ABOVE_0, _positive)},
    "poisson": {
        "log_input": (_FLAG, lambda x: isinstance(x, bool)),
        "full": (_FLAG, lambda x: isinstance(x, bool)),
    },
    "bce": {},
}


def _is_code(value: Any) -> bool:
    return callable(value) or (isinstance(value, str) and NAME.fullmatch(value) is not None)


def _loss(value: Any) -> Any:
    allowed = f'it must be {", ".join(LOSSES)}, a table like {{ name = "huber", delta = 2.0 }}, or module:callable'
    if not isinstance(value, dict):
        if value in LOSSES if isinstance(value, str) else callable(value):
            return value
        if isinstance(value, str) and NAME.fullmatch(value):
            return value
        advice = nearest(value, list(LOSSES)) if isinstance(value, str) else ""
        raise ValueError(f"= {shown(value)}; {advice}{allowed}")
    name = value.get("name")
    if name not in LOSSES:
        advice = nearest(name, list(LOSSES)) if isinstance(name, str) else ""
        raise ValueError(f".name = {shown(name)}; {advice}it must be {', '.join(LOSSES)}")
    for key, option in value.items():
        if key == "name":
            continue
        if key not in OPTIONS[name]:
            told = ", ".join(OPTIONS[name]) or "no options"
            raise ValueError(f".{key} is unknown; {name!r} takes {told}")
        needed, fits = OPTIONS[name][key]
        if not fits(option):
            raise ValueError(f".{key} = {shown(option)}; it must be {needed}")
    return value


def _metrics(value: Any) -> Any:
    for number, metric in enumerate(value):
        if isinstance(metric, dict):
            if not isinstance(metric.get("name"), str):
                raise ValueError(f'[{number}] needs a name, that of a metric: {{ name = "fbeta", beta = 2.0 }}')
            if not isinstance(metric.get("as", ""), str) or metric.get("as") == "":
                raise ValueError(f"[{number}].as = {shown(metric['as'])}; it must be text: a name in the history")
        elif not isinstance(metric, str) and not callable(metric):
            raise ValueError(f"[{number}] = {shown(metric)}; it must be a name, a table with one, or module:callable")
        if metric_name(metric) == "loss" != metric:
            raise ValueError(f"[{number}] is called 'loss', as what is minimized is; give it {_ANOTHER}")
    twice = [name for name, count in Counter(map(metric_name, value)).items() if count > 1]
    if twice:
        raise ValueError(f"has {twice[0]!r} twice; give one of them {_ANOTHER}")
    return value


LossSetting = Annotated[Any, AfterValidator(_loss)]
MetricsSetting = Annotated[list[Any], AfterValidator(_metrics)]

"""The settings in [base] and [fuse] that say how a model learns: optimizer, groups, schedule, clipping, average."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from sl_queue.config.schema import shown
from sl_queue.config.user_code import NAME
from sl_queue.protocol.rates import Schedule

OPTIMIZER = 'a table like { name = "adam", lr = 1e-3 }, or module:callable that is given the model'
SCHEDULE = 'a table like { name = "cosine", warmup = 200 }, or module:callable(step, steps) -> factor'
GROUPS = 'a list of tables like { match = "head.*", lr = 1e-2 }'


def _is_code(value: Any) -> bool:
    """Return True for `module:callable`, and for the thing itself."""
    return callable(value) or (isinstance(value, str) and NAME.fullmatch(value) is not None)


def _optimizer(value: Any) -> Any:
    if _is_code(value) or value == {}:
        return value
    if not isinstance(value, dict):
        raise ValueError(f"= {shown(value)}; it must be {OPTIMIZER}")
    if not isinstance(value.get("name"), str):
        raise ValueError('needs a name, that of a torch.optim class in lower case: { name = "adam", lr = 1e-3 }')
    if "no_decay" in value:
        _patterns(value["no_decay"], ".no_decay")
    return value


def _groups(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, group in enumerate(value):
        if "match" not in group:
            raise ValueError(f"[{number}].match is missing; it must be a pattern of parameter names, like 'head.*'")
        _patterns(group["match"], f"[{number}].match")
        if len(group) == 1:
            raise ValueError(f"[{number}] sets nothing; give it what differs for these parameters, for instance lr")
    return value


def _patterns(value: Any, key: str) -> None:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{key} = {shown(value)}; it must be a pattern of parameter names, or a list of them")


def _schedule(value: Any) -> Any:
    if value is None or _is_code(value):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise ValueError(f"= {shown(value)}; it must be {SCHEDULE}")
    Schedule.of(value)
    return value


def _checked(check: Callable[[Any], Any]) -> AfterValidator:
    return AfterValidator(check)


OptimizerSetting = Annotated[Any, _checked(_optimizer)]
GroupsSetting = Annotated[list[dict[str, Any]], _checked(_groups)]
ScheduleSetting = Annotated[Any, _checked(_schedule)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]

"""A party's columns as a model's input: fitted on training rows, kept as JSON, applied to any rows.

`fit` is a pure function of the columns and of which rows train, and its sums run in canonical order in float64; so it
is computed again at a restart, to the same bits. `apply` is the same at training, evaluation and prediction, and
needs nothing but what was fitted.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sl_queue.data.feature_specs import Category, Date, Number, Spec
from sl_queue.data.feature_values import Floats, Unusable, days, numbers, part, rounded, texts
from sl_queue.errors import JobError
from sl_queue.protocol.text import counted

FORMAT = 1  # of features.json
OTHER, MISSING, FIRST = 0, 1, 2  # places of a category: rare or never seen, a gap, the first one known
MOST_CATEGORIES = 1000  # as columns of their own

Learned = Mapping[str, Any]  # of one column; JSON values
Rows = npt.NDArray[np.int64]
Place = Callable[[tuple[int, int], Any], npt.NDArray[Any]]  # an array of zeros of a shape and dtype


@dataclass(frozen=True, slots=True)
class Fitted:
    """Parameters learned from the training rows, by raw column in order; JSON gives them back exactly."""

    columns: Mapping[str, Learned] = field(repr=False)
    rows: int  # how many it was fitted on

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that come out, in order."""
        return tuple(name for column, learned in self.columns.items() for name in _names(column, learned))

    @property
    def indexed(self) -> tuple[int, ...]:
        """Positions of the columns that hold whole numbers for an embedding."""
        kinds = [learned.get("encode") == "index" for c, learned in self.columns.items() for _ in _names(c, learned)]
        return tuple(place for place, is_index in enumerate(kinds) if is_index)

    @property
    def digest(self) -> str:
        """SHA-256 of its JSON, hexadecimal."""
        return sha256(self.as_json().encode()).hexdigest()

    def as_json(self) -> str:
        """Return the text of features.json."""
        columns = [{"column": name, **learned} for name, learned in self.columns.items()]
        found = {"format": FORMAT, "rows": self.rows, "columns": columns}
        return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def of_json(cls, text: str) -> "Fitted":
        """Read features.json. Raises JobError for anything else."""
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise JobError(f"features.json has format {found['format']!r}; this version of sl_queue reads {FORMAT}")
            columns = {learned.pop("column"): learned for learned in found["columns"]}
            return cls(columns, int(found["rows"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"features.json cannot be read ({type(error).__name__}); restore it") from None


def fit(specs: Mapping[str, Spec], columns: Mapping[str, Any], rows: Rows) -> tuple[Fitted, list[str]]:
    """Learn from the rows at these positions, taken in ascending order; and say what cannot be learned from.

    `columns` are Arrow arrays of one length. Gaps and values that are no numbers are counted, never shown.
    """
    taken, learned, faults = pa.array(np.sort(rows)), dict[str, Learned](), []
    for name, spec in specs.items():
        try:
            learned[name] = _fit(spec, columns[name].take(taken))
        except Unusable as error:
            faults.append(f"[features] {name}: {error}")
    return Fitted(learned, len(rows)), faults


def apply(fitted: Fitted, columns: Mapping[str, Any]) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Make (rows, columns) float32 of Arrow arrays, and say what cannot be made numbers."""
    n_rows = len(next(iter(columns.values()))) if columns else 0
    out = np.zeros((n_rows, len(fitted.names)), np.float32)
    place, faults = 0, []
    for name, learned in fitted.columns.items():
        width = len(_names(name, learned))
        try:
            _write(learned, columns[name], out[:, place : place + width])
        except Unusable as error:
            faults.append(f"[features] {name}: {error}")
        place += width
    return out, faults


def fit_and_apply(
    specs: Mapping[str, Spec], columns: Mapping[str, Any], rows: Rows, n_rows: int, place_for: Place = np.zeros
) -> tuple[Fitted, npt.NDArray[np.float32], list[str], list[str]]:
    """Fit on some rows and apply to all, one column in memory at a time; only categories are read twice.

    `place_for` makes the array that is written to, column by column. Returns faults, and notes on what was rounded.
    """
    categories = {name: spec for name, spec in specs.items() if isinstance(spec, Category)}
    known, faults = fit(categories, columns, rows)
    widths = {
        name: len(_names(name, known.columns[name])) if name in known.columns else _width(spec)
        for name, spec in specs.items()
    }
    out = place_for((n_rows, sum(widths.values())), np.float32)
    place, taken, learned, notes = 0, pa.array(np.sort(rows)), dict[str, Learned](), list[str]()
    for name, spec in specs.items():
        width = widths[name]
        if name not in categories or name in known.columns:
            column = columns[name]
            try:
                learned[name] = known.columns[name] if name in categories else _fit(spec, column.take(taken))
                _write(learned[name], column, out[:, place : place + width])
                notes += rounded(name, column, out[:, place]) if learned[name].get("scale") == "none" else []
            except Unusable as error:
                faults.append(f"[features] {name}: {error}")
            del column
        place += width
    return Fitted(learned, len(rows)), out, faults, notes


def _width(spec: Spec) -> int:
    """Count the columns of what is no category; one that could not be fitted takes none."""
    match spec:
        case Number():
            return 1 + spec.indicator
        case Date():
            return len(spec.parts) * (1 + spec.number.indicator)
        case Category():
            return 0


# One column -----------------------------------------------------------------------------------------------------


def _names(column: str, learned: Learned) -> list[str]:
    match learned["kind"]:
        case "category" if learned["encode"] == "one-hot":
            return [f"{column}=other", f"{column} missing", *(f"{column}={c}" for c in learned["categories"])]
        case "category":
            return [column]
        case "date":
            return [name for part_, of in learned["parts"].items() for name in _names(f"{column}.{part_}", of)]
        case _:
            return [column, f"{column} missing"] if learned["indicator"] else [column]


def _fit(spec: Spec, column: Any) -> Learned:
    match spec:
        case Number():
            return _fit_number(spec, numbers(column))
        case Category():
            return _fit_category(spec, texts(column))
        case Date():
            dates = days(column, spec.format)
            parts = {name: _fit_number(spec.number, part(dates, name, spec.at)) for name in spec.parts}
            return {"kind": spec.kind, "format": spec.format, "at": spec.at and spec.at.isoformat(), "parts": parts}


def _fit_number(spec: Number, values: Floats) -> Learned:
    gaps = int(np.isnan(values).sum())
    seen = values[~np.isnan(values)] if gaps else values
    if not len(seen):
        raise Unusable("no training row has a value; exclude it")
    if gaps and spec.missing == "error":
        told = counted(gaps, "training row", "training rows")
        raise Unusable(f'missing in {told}; say missing = "median", "mean" or "zero"')
    with np.errstate(over="ignore", invalid="ignore"):
        learned = _learned(spec, seen)
        known = np.hstack([np.ptp(seen), *(number for number in learned.values() if number is not None)])
    if not np.isfinite(known).all():
        raise Unusable("its values are too large to be averaged in float64; write them in a larger unit")
    return {"kind": spec.kind, **asdict(spec), "gaps": gaps, **learned}


def _learned(spec: Number, seen: Floats) -> Learned:
    found: dict[str, Any] = {"fill": _fill(spec, seen)}
    match spec.scale:
        case "standard":
            constant = seen.min() == seen.max()
            found |= {"mean": float(seen.mean()), "std": 1.0 if constant else float(seen.std())}
            if not found["std"]:
                raise Unusable('its values differ by too little for a standard deviation; say scale = "quantile"')
        case "minmax":
            found |= {"low": float(seen.min()), "high": float(seen.max())}
        case "quantile":
            found["at"] = [float(q) for q in np.quantile(seen, np.linspace(0, 1, spec.knots))]
    return found


def _fill(spec: Number, seen: Floats) -> float | None:
    match spec.missing:
        case "median":
            return float(np.median(seen))
        case "mean":
            return float(np.mean(seen))
        case "zero":
            return 0.0
        case "error":
            return None


def _fit_category(spec: Category, column: Any) -> Learned:
    counts = {c["values"].as_py(): c["counts"].as_py() for c in pc.value_counts(column.drop_null())}
    common = sorted((c for c, count in counts.items() if count >= spec.rare), key=str.encode)
    rare = sorted((c for c, count in counts.items() if count < spec.rare), key=str.encode)
    if spec.encode == "one-hot" and len(common) > MOST_CATEGORIES:
        raise Unusable(
            f'{len(common)} categories would be as many columns; say encode = "index" for an embedding, a larger rare, '
            "or exclude it"
        )
    found = {"kind": spec.kind, "encode": spec.encode, "least": spec.rare, "gaps": column.null_count}
    return {**found, "categories": common, "counts": [counts[c] for c in common], "rare": rare}


def _write(learned: Learned, column: Any, out: npt.NDArray[np.float32]) -> None:
    """Write a column into its place, (rows, width)."""
    match learned["kind"]:
        case "number":
            _write_number(learned, numbers(column), out)
        case "category":
            places = _places(learned, texts(column))
            if learned["encode"] == "index":
                out[:, 0] = places
            else:
                out[np.arange(len(places)), places] = 1.0
        case _:
            dates = days(column, learned["format"])
            at = None if learned["at"] is None else date.fromisoformat(learned["at"])
            place = 0
            for name, of in learned["parts"].items():
                width = len(_names("", of))
                _write_number(of, part(dates, name, at), out[:, place : place + width])
                place += width


def _write_number(learned: Learned, values: Floats, out: npt.NDArray[np.float32]) -> None:
    gaps = np.isnan(values)
    if count := int(gaps.sum()):
        if learned["fill"] is None:
            raise Unusable(f'missing in {counted(count, "row", "rows")}; say missing = "median", "mean" or "zero"')
        values = np.where(gaps, learned["fill"], values)
    with np.errstate(over="ignore"):
        out[:, 0] = _scaled(learned, values)
    if beyond := int((~np.isfinite(out[:, 0])).sum()):
        other = '"quantile"' if learned["scale"] == "standard" else '"standard" or "quantile"'
        raise Unusable(f"{counted(beyond, 'value is', 'values are')} beyond float32; say scale = {other}")
    if learned["indicator"]:
        out[:, 1] = gaps


def _scaled(learned: Learned, values: Floats) -> Floats:
    scaled = values
    match learned["scale"]:
        case "standard":
            scaled = (values - learned["mean"]) / learned["std"]
        case "minmax":
            scaled = (values - learned["low"]) / ((learned["high"] - learned["low"]) or 1.0)
        case "quantile":
            scaled = _ranks(values, np.array(learned["at"]))
    return scaled


def _ranks(values: Floats, at: Floats) -> Floats:
    """Return the share of training rows below, 0 to 1; a value that many rows share gets the middle of its ranks.

    But the smallest is 0 and the largest 1, as in scikit-learn.
    """
    ranks = np.linspace(0, 1, len(at))
    found: Floats = 0.5 * (np.interp(values, at, ranks) - np.interp(-values, -at[::-1], -ranks[::-1]))
    found[values >= at[-1]] = 1.0
    found[values <= at[0]] = 0.0
    return found


def _places(learned: Learned, column: Any) -> Rows:
    """Return the place of each row's category."""
    known = pc.index_in(column, pa.array(learned["categories"], pa.large_string()))
    places: Rows = pc.fill_null(pc.add(known, FIRST), OTHER).to_numpy(zero_copy_only=False).astype(np.int64)
    places[column.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return places


def pieces(fitted: Fitted) -> Iterator[tuple[str, Learned, list[str]]]:
    """Yield every raw column, what was learned of it, and the columns that come of it."""
    for column, learned in fitted.columns.items():
        yield column, learned, _names(column, learned)

"""Declared features: what is fitted, and on which rows."""

import json
import tomllib
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sl_queue.config.job import Job, PartyFile
from sl_queue.config.resolve import table_spec
from sl_queue.config.user_code import Importer
from sl_queue.data.feature_report import propose
from sl_queue.data.feature_specs import Category, Date, Number, Spec, resolve
from sl_queue.data.features import Fitted, apply, fit
from sl_queue.data.spec import Rows
from sl_queue.data.to_predict import read_to_predict
from sl_queue.data.unseen import unseen
from sl_queue.errors import JobError

AGE = Date(("age",), date(2026, 1, 1))


def fitted(specs: dict[str, Spec], columns: dict[str, Any], rows: Any = None) -> Fitted:
    arrays = {name: pa.array(values) for name, values in columns.items()}
    n_rows = len(next(iter(arrays.values())))
    found, faults = fit(specs, arrays, np.arange(n_rows) if rows is None else np.array(rows))
    assert faults == []
    return found


def applied(found: Fitted, columns: dict[str, Any]) -> np.ndarray[Any, Any]:
    out, faults = apply(found, {name: pa.array(values) for name, values in columns.items()})
    assert faults == []
    return out


def faults_of(specs: dict[str, Spec], columns: dict[str, Any]) -> list[str]:
    arrays = {name: pa.array(values) for name, values in columns.items()}
    return fit(specs, arrays, np.arange(len(next(iter(arrays.values())))))[1]


FEATURE = {"role": "feature", "cut": [1]}


def test_a_gap_gets_the_median_of_the_training_rows_alone_and_is_scaled_by_them() -> None:
    ages = [10.0, 20.0, None, 60.0, 1000.0]  # the last is held out
    found = fitted({"age": Number(missing="median", indicator=True)}, {"age": ages}, rows=[3, 1, 0, 2])
    out = applied(found, {"age": ages})
    seen = np.array([10.0, 20.0, 60.0])
    assert found.names == ("age", "age missing")
    assert np.allclose(out[:, 0], (np.array([10, 20, 20, 60, 1000]) - seen.mean()) / seen.std())
    assert out[:, 1].tolist() == [0, 0, 1, 0, 0]


def test_altering_held_out_rows_changes_no_fitted_value() -> None:
    specs: dict[str, Spec] = {
        "x": Number(scale="quantile"),
        "c": Category(rare=2),
        "d": Date(("age",), date(2026, 1, 1)),
    }
    rows = np.arange(8)

    def columns(x: float, c: str, d: date) -> dict[str, Any]:
        days = [date(2020, 1, day) for day in range(1, 9)]
        return {"x": [*map(float, rows), x], "c": [*"aabbaabb", c], "d": [*days, d]}

    one = fitted(specs, columns(1e9, "z", date(1900, 1, 1)), rows)
    other = fitted(specs, columns(-4.0, "a", date(2024, 5, 5)), rows)
    assert one.as_json() == other.as_json()
    assert one.digest == other.digest


def test_what_was_fitted_is_the_same_in_any_order_of_the_rows_and_comes_back_from_json() -> None:
    rng = np.random.default_rng(1)
    columns = {"x": rng.normal(size=500), "c": rng.choice(list("abc"), 500)}
    specs: dict[str, Spec] = {"x": Number(), "c": Category()}
    rows = rng.permutation(500)[:400]
    found = fitted(specs, columns, rows)
    assert found == fitted(specs, columns, rows[::-1])
    assert Fitted.of_json(found.as_json()) == found
    assert np.array_equal(applied(Fitted.of_json(found.as_json()), columns), applied(found, columns))


def test_rare_unseen_and_missing_categories_have_places_of_their_own() -> None:
    found = fitted({"r": Category(rare=2)}, {"r": ["a", "b", "a", "b", "rare", None]})
    assert found.names == ("r=other", "r missing", "r=a", "r=b")
    out = applied(found, {"r": ["b", "rare", "never", None, "", "a"]})
    assert out.argmax(axis=1).tolist() == [3, 0, 0, 1, 1, 2]
    assert (out.sum(axis=1) == 1).all()
    index = fitted({"r": Category("index", rare=2)}, {"r": ["a", "b", "a", "b", "rare", None]})
    assert (index.names, index.indexed) == (("r",), (0,))
    assert applied(index, {"r": ["b", "rare", "never", None, "", "a"]})[:, 0].tolist() == [3, 0, 0, 1, 1, 2]


def test_a_category_is_the_same_as_a_whole_number_a_float_and_its_text() -> None:
    found = fitted({"r": Category()}, {"r": [7, 8]})
    texts = [applied(found, {"r": values}).argmax(axis=1).tolist() for values in ([8, 7], [8.0, 7.0], ["8", "7"])]
    assert texts == [[3, 2]] * 3
    gap = applied(found, {"r": [8.0, None]}).argmax(axis=1).tolist()  # which pandas makes floating
    assert gap == [3, 1]


def test_the_word_nan_and_the_country_na_are_categories_and_nan_is_a_gap() -> None:
    found = fitted({"r": Category()}, {"r": ["NA", "nan", None]})
    assert found.names == ("r=other", "r missing", "r=NA", "r=nan")
    assert applied(found, {"r": np.array([1.0, np.nan])}).argmax(axis=1).tolist() == [0, 1]


def test_a_value_that_many_rows_share_gets_the_middle_of_its_ranks() -> None:
    values = [0.0, 1.0, 1.0, 1.0, 2.0]
    found = fitted({"x": Number(scale="quantile", knots=5)}, {"x": values})
    assert applied(found, {"x": [*values, -9.0, 9.0]})[:, 0].tolist() == [0, 0.5, 0.5, 0.5, 1, 0, 1]


def test_parts_of_dates_do_not_depend_on_today_nor_on_how_the_date_is_written() -> None:
    days = [date(2024, 2, 29), date(2025, 12, 31), date(2026, 1, 1)]
    spec = Date(("year", "month", "day", "weekday", "age"), date(2026, 1, 1), number=Number(scale="none"))
    german = Date(spec.parts, spec.at, "%d.%m.%Y", spec.number)
    expected = [[2024, 2, 29, 3, 672], [2025, 12, 31, 2, 1], [2026, 1, 1, 3, 0]]
    assert applied(fitted({"d": spec}, {"d": days}), {"d": days}).tolist() == expected
    texts = [day.isoformat() for day in days]
    assert applied(fitted({"d": spec}, {"d": texts}), {"d": texts}).tolist() == expected
    packed = [int(day.strftime("%Y%m%d")) for day in days]
    assert applied(fitted({"d": replace(spec, format="%Y%m%d")}, {"d": packed}), {"d": packed}).tolist() == expected
    dotted = [day.strftime("%d.%m.%Y") for day in days]
    assert applied(fitted({"d": german}, {"d": dotted}), {"d": dotted}).tolist() == expected
    assert fitted({"d": spec}, {"d": days}).names == ("d.year", "d.month", "d.day", "d.weekday", "d.age")


@pytest.mark.parametrize(
    ("spec", "values", "told"),
    [
        (Number(), [1.0, None, None], 'missing in 2 training rows; say missing = "median", "mean" or "zero"'),
        (Number(), [1.0, float("inf")], "infinity in 1 of 2 rows"),
        (Number(), ["1", "secret"], "text: 1 of 2 values are not numbers"),
        (Number(missing="mean"), [None, None], "no training row has a value"),
        (Date(("year",)), ["2024-01-01", "31.12.2024"], "1 of 2 values are not dates like 2026-01-31"),
        (Date(("year",)), [1, 2], "is int64, not dates"),
        (Date(("year",)), ["2024-02-30", "2024-02-30", "2024-02-29"], "2 of 3 values are not dates like 2026-01-31"),
        (Date(("year",), format="%d.%m.%Y"), ["29.02.2023", "31.4.2024", "1.3.2024"], "no month has such a day"),
        (Date(("year",), format="%d.%m.%Y"), ["2024-03-01", "1.3.2024"], "; correct them, or leave them empty"),
        (Number(), [1e308, -1e308, 5.0], "its values are too large to be averaged"),
        (Number(scale="minmax"), [1e308, -1e308], "its values are too large to be averaged"),
        (Number(), [1e-310, 2e-310, 0.0], 'differ by too little for a standard deviation; say scale = "quantile"'),
        (Number(), ["1.5", "2"], "holds no numbers (numbers as text; of a CSV, see data.csv.decimal"),
        (Category(), [str(n) for n in range(1001)], "1001 categories would be as many columns"),
    ],
)
def test_what_cannot_be_learned_from_is_named_by_column_and_count_and_no_value(
    spec: Spec, values: list[Any], told: str
) -> None:
    (fault,) = faults_of({"col": spec}, {"col": values})
    assert fault.startswith("[features] col: ")
    assert told in fault
    assert "secret" not in fault


def test_a_gap_in_held_out_rows_and_a_value_beyond_float32_are_faults_too() -> None:
    found = fitted({"x": Number(scale="none")}, {"x": [1.0, 2.0]})
    assert apply(found, {"x": pa.array([1.0, None])})[1] == [
        '[features] x: missing in 1 row; say missing = "median", "mean" or "zero"'
    ]
    assert '"standard" or "quantile"' in apply(found, {"x": pa.array([1e300])})[1][0]
    standard = fitted({"x": Number()}, {"x": [1.0, 2.0]})
    assert 'value is beyond float32; say scale = "quantile"' in apply(standard, {"x": pa.array([1e300])})[1][0]


def test_at_prediction_another_recipe_is_said_to_need_another_training() -> None:
    job = Job(name="t", seed=1, epochs=1, batch_size=2, parties={"a": FEATURE, "b": {"role": "label"}})
    rows = Rows([1, 2], pa.table({"x": [1.0, None]}))
    file = PartyFile(party="a", data=rows, features={"x": {"kind": "number"}})
    recipe = fitted({"x": Number()}, {"x": [1.0, 2.0]}).as_json()
    with pytest.raises(
        JobError, match=r"x: missing in 1 row; say missing = .* \(another line of .features. takes effect when"
    ):
        read_to_predict(table_spec(job, file, Importer()), None, recipe, None)


@pytest.mark.parametrize(
    ("new", "lacking"),
    [
        ({"x": [1.0]}, ["y", "z"]),
        ({"x": [1.0], "z": [1.0], "more": ["text"]}, ["y"]),
    ],
)
def test_columns_that_a_pattern_matched_in_training_are_named_if_they_lack(new: Any, lacking: list[str]) -> None:
    job = Job(name="t", seed=1, epochs=1, batch_size=2, parties={"a": FEATURE, "b": {"role": "label"}})
    file = PartyFile(party="a", data=Rows([1], pa.table(new)), features={"*": {"kind": "number"}})
    recipe = fitted(dict.fromkeys("xyz", Number()), {name: [1.0, 2.0] for name in "xyz"}).as_json()
    with pytest.raises(JobError) as raised:
        read_to_predict(table_spec(job, file, Importer()), None, recipe, None)
    told = [f"the model was trained with the column {name!r}, which is not there" for name in lacking]
    several = ["party 'a', data: 2 things are wrong", *(f"  {each}" for each in told)]
    assert str(raised.value) == (f"party 'a', data: {told[0]}" if len(told) == 1 else "\n".join(several))


def test_new_categories_are_noted_and_refused_where_they_are_many() -> None:
    found = fitted({"region": Category(rare=2)}, {"region": ["a"] * 9 + ["seldom"]})
    rows = ["a"] * 859 + ["b"] * 41 + ["seldom"] * 100
    assert unseen(found, {"region": pa.array(rows)}) == (
        ['[features] region: 41 of 1000 new rows hold a category that training had not seen: they count as "other"'],
        [],
    )
    notes, faults = unseen(found, {"region": pa.array(["a"] * 8 + ["b"] * 2)})
    assert notes == []
    assert "2 of 10 new rows" in faults[0]


def test_the_first_pattern_that_matches_wins_and_a_column_without_one_is_named() -> None:
    specs, faults = resolve({"x1": Category(), "x*": Number()}, ["x1", "x2"])
    assert (specs, faults) == ({"x1": Category(), "x2": Number()}, [])
    _, faults = resolve({"agee": Number()}, ["age"])
    assert faults == [
        "[features] agee: there is no such column among the features; did you mean 'age'?",
        "[features] declares nothing for column 'age'; add a line for it, or leave it out: data.exclude = [\"age\"]",
    ]


def test_features_json_of_another_format_or_torn_is_refused() -> None:
    found = fitted({"x": Number()}, {"x": [1.0, 2.0]})
    with pytest.raises(JobError, match="format 2"):
        Fitted.of_json(json.dumps({**json.loads(found.as_json()), "format": 2}))
    with pytest.raises(JobError, match="cannot be read"):
        Fitted.of_json(found.as_json()[:40])


def proposed(**columns: list[Any]) -> str:
    said = propose({name: pa.chunked_array([values]) for name, values in columns.items()})
    tomllib.loads(said)
    return said


def test_a_proposal_tells_numbers_beside_marks_for_a_gap_from_other_text_and_names_columns_readably() -> None:
    said = proposed(
        größe=[" NA" if i % 20 == 0 else f"{i / 7:.2f}" for i in range(200)],
        age=["?" if i % 20 == 0 else str(18 + i % 70) for i in range(1000)],
        preis=[f"{i},5" for i in range(200)],
        name=[f"name {i}" for i in range(200)],
    )
    assert "# \"größe\" is numbers but for ' NA':" in said
    assert 'write csv = { missing = [" NA"] } under [data], or empty those fields' in said
    assert "# age is numbers but for '?':" in said
    assert '# preis is text: numbers with a decimal comma; write a decimal point, or say data.csv.decimal = ","' in said
    assert "# name: 200 different texts in 200 rows:" in said
    assert list(tomllib.loads(propose({'a "b"\x7f': pa.array([0.5, 1.5, 7])}))["features"]) == ['a "b"\x7f']


def test_a_proposal_shows_no_text_that_may_be_the_value_of_a_row() -> None:
    numbers = [str(i) for i in range(200)]
    for texts in (["Anna, +49 171"], ["Anna Schmidt-Lorenz"] * 5, ["x1"] * 5, ["0,5", "1,5"] * 3, list("abcd") * 3):
        said = proposed(phone=[*numbers, *texts])
        assert "missing" not in said and repr(texts[0]) not in said, said
    assert "marks" not in proposed(word=[f"word {i}" for i in range(199)] + ["12"])


@pytest.mark.parametrize("last", ["9999-12-31", date(9999, 12, 31)])
def test_a_proposal_for_dates_up_to_the_last_one_that_there_is_can_be_read(last: Any) -> None:
    said = proposed(until=[last, "2026-01-01" if isinstance(last, str) else date(2026, 1, 1)])
    assert tomllib.loads(said)["features"]["until"]["at"] == date(9999, 12, 31)
    assert "some dates are 9999-12-31 or later; if that stands for no date, empty it" in said
    far = propose({"until": pa.array([2**30, 0], pa.date32()), "since": pa.array([-(2**30)], pa.date32())})
    assert tomllib.loads(far)["features"]["until"]["at"] == date.max
    assert tomllib.loads(far)["features"]["since"]["at"] == date.min

"""Scaled numbers and one-hot columns are those of scikit-learn."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn import preprocessing as sklearn

from sl_queue.data.feature_specs import Category, Number
from tests.pure.test_features import applied, fitted

finite = st.integers(-(10**6), 10**6).map(lambda n: n / 8)


@given(st.lists(st.one_of(finite, st.none()), min_size=2, max_size=60).filter(lambda v: any(x is not None for x in v)))
def test_scaled_numbers_are_those_of_scikit_learn(values: list[float | None]) -> None:
    array = np.array([np.nan if v is None else v for v in values], np.float64)[:, None]
    seen = array[~np.isnan(array[:, 0])]
    knots = len(seen)
    theirs = {
        "standard": sklearn.StandardScaler(),
        "minmax": sklearn.MinMaxScaler(),
        "quantile": sklearn.QuantileTransformer(n_quantiles=knots, subsample=None),
    }
    for scale, transformer in theirs.items():
        expected = transformer.fit(seen).transform(seen)[:, 0]
        spec = Number(missing="zero", scale=scale, knots=knots)  # type: ignore[arg-type]
        ours = applied(fitted({"x": spec}, {"x": values}), {"x": seen[:, 0]})[:, 0]
        ties = scale == "quantile" and len(np.unique(seen)) < knots  # theirs depend on how a percentile was rounded
        assert ties or np.allclose(ours, expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.sampled_from(["a", "b", "Ä", "zz"]), min_size=1, max_size=40))
def test_one_hot_columns_are_those_of_scikit_learn(values: list[str]) -> None:
    array = np.array(values, object)[:, None]
    expected = sklearn.OneHotEncoder(sparse_output=False).fit_transform(array)
    assert np.array_equal(applied(fitted({"c": Category()}, {"c": values}), {"c": values})[:, 2:], expected)

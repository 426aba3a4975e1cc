"""Tables of pandas, polars and pyarrow: columns by name, like the same arrays."""

import datetime
import json

import flax.linen as nn
import numpy as np
import pytest
from helpers.sources import as_inputs_source, as_source, as_whole, split_data

from flaxfit import DataError, Trainer
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data.binding.binding import Binding
from flaxfit.data.binding.dataframes import as_column, labels
from flaxfit.data.datasets.columns import Columns

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")
pa = pytest.importorskip("pyarrow")


ONE = Binding(CallSpec(("x",), (), ("x",)))
TWO = Binding(CallSpec(("left", "right"), (), ("left", "right")))
X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int64)
DF = pd.DataFrame(X.astype(np.float64), columns=["a", "b", "c"]).assign(label=Y)
KINDS = {
    "pandas": lambda df: df,
    "arrow dtypes": lambda df: df.convert_dtypes(dtype_backend="pyarrow"),
    "nullable": lambda df: df.convert_dtypes(),
    "polars": pl.from_pandas,
    "pyarrow": lambda df: pa.Table.from_pandas(df, preserve_index=False),
    "record batch": lambda df: pa.RecordBatch.from_pandas(df, preserve_index=False),
    "chunked": lambda df: pa.concat_tables(
        [pa.Table.from_pandas(part, preserve_index=False) for part in (df[:7], df[7:])]
    ),
}


def history(*data, trainer=None, **arguments):
    trainer = trainer or Trainer(nn.Dense(2))
    return trainer.fit(*data, epochs=2, batch_size=8, verbose=0, **arguments).history


def batch_of(*data, binding=ONE, **arguments):
    return as_source(*data, binding=binding, batch_size=20, **arguments).example


@pytest.fixture(scope="module")
def expected():
    """The losses of the same arrays."""
    return history(X, Y)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_like_its_arrays(kind, expected):
    assert history(KINDS[kind](DF))["loss"] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_apart(kind):
    table = KINDS[kind](DF)
    x = KINDS[kind](DF[["a", "b", "c"]])
    for y in (table["label"], KINDS[kind](DF[["label"]]), Y, Y.tolist()):
        for data in ((x, y), ((x, y),)):
            batch = batch_of(*data)
            np.testing.assert_array_equal(batch.inputs[0], X)
            np.testing.assert_array_equal(batch.targets, Y)
            assert batch.targets.dtype == np.int32


def test_validation_and_split(expected):
    split = history(DF, validation_split=0.3)
    assert split == history(X, Y, validation_split=0.3)
    val = DF[DF.columns[::-1]].assign(more="text")
    validated = history(DF, validation_data=val)
    assert validated["loss"] == expected
    assert validated == history(X, Y, validation_data=(X, Y))
    assert history(DF, validation_data=(val.drop(columns="label"), Y)) == validated
    assert history(DF[["a", "b", "c"]], DF["label"], validation_data=val) == validated


@pytest.mark.parametrize("kind", KINDS)
def test_later_tables_go_by_name(kind):
    trainer = Trainer(nn.Dense(2))
    history(KINDS[kind](DF), trainer=trainer)
    outputs = trainer.predict(X, verbose=0)
    mixed = KINDS[kind](DF[["c", "label", "a", "b"]].assign(a2=0.0, name="text"))
    for data in (mixed, (mixed, Y), KINDS[kind](DF[["b", "c", "a"]])):
        np.testing.assert_array_equal(trainer.predict(data, verbose=0), outputs)
    loss = trainer.evaluate(X, Y, verbose=0)
    assert trainer.evaluate(mixed, verbose=0) == loss
    assert trainer.test_on_batch(mixed) == trainer.test_on_batch(X, Y)
    with pytest.raises(DataError, match=r"has no column 'b', which is among the mo"):
        trainer.predict(KINDS[kind](DF[["a", "c", "label"]]), verbose=0)
    with pytest.raises(DataError, match=r"has no column 'label', which is among its"):
        trainer.evaluate(KINDS[kind](DF[["a", "b", "c"]]), verbose=0)


def test_a_saved_trainer_keeps_its_columns(tmp_path):
    trainer = Trainer(nn.Dense(2), targets="kind")
    table = DF[["b", "a"]].assign(kind=pd.Categorical.from_codes(Y, ["no", "yes"]))
    history(table, trainer=trainer)
    path = tmp_path / "run.msgpack"
    trainer.save(path)
    mixed = table[["kind", "a", "b"]].assign(kind=np.where(Y, "yes", "no"))
    wanted = trainer.evaluate(table, verbose=0)
    for loaded in (Trainer.load(path, nn.Dense(2)), Trainer(nn.Dense(2))):
        loaded.restore(path)
        assert loaded.evaluate(mixed, verbose=0) == wanted
        np.testing.assert_array_equal(
            loaded.predict(mixed, verbose=0), trainer.predict(table, verbose=0)
        )


def test_a_resumed_run_keeps_its_columns(tmp_path):
    fit = {"batch_size": 8, "verbose": 0, "run_dir": tmp_path / "run"}
    Trainer(nn.Dense(2)).fit(DF, epochs=1, **fit)
    resumed = Trainer(nn.Dense(2))
    losses = resumed.fit(DF[DF.columns[::-1]], epochs=2, **fit).history["loss"]
    assert losses == history(DF)["loss"]


def test_nothing_is_remembered_before_anything_is_learnt():
    trainer = Trainer(nn.Dense(2))
    trainer.predict(DF[["c", "a"]], verbose=0)
    assert history(DF, trainer=trainer) == history(X, Y)
    trainer.fit(X, Y, epochs=1, verbose=0)
    np.testing.assert_array_equal(
        trainer.predict(DF[["c", "b", "a"]], verbose=0), trainer.predict(X, verbose=0)
    )


def test_one_batch_is_remembered_too():
    trainer = Trainer(nn.Dense(2))
    trainer.train_on_batch(DF)
    np.testing.assert_array_equal(
        trainer.predict(DF[["c", "b", "a"]], verbose=0), trainer.predict(X, verbose=0)
    )


def test_inputs_chosen_and_ordered():
    chosen = Binding(ONE.call, inputs=["c", "a"])
    np.testing.assert_array_equal(batch_of(DF, binding=chosen).inputs[0], X[:, [2, 0]])
    source = as_source(DF.assign(city="x"), binding=chosen)
    assert source.info.unused == ("b", "city")
    assert source.info.table == "c, a · targets: label"
    alone = batch_of(DF, binding=Binding(ONE.call, inputs="c")).inputs[0]
    np.testing.assert_array_equal(alone, X[:, 2])
    function = Binding(ONE.call, inputs=lambda df: df[["b", "a"]])
    np.testing.assert_array_equal(
        batch_of(DF.assign(city="x"), binding=function).inputs[0], X[:, [1, 0]]
    )


def test_inputs_by_name():
    table = DF.rename(columns={"a": "right", "b": "left"}).assign(n=np.arange(20))
    batch = batch_of(table, binding=TWO)
    assert list(batch.inputs) == ["left", "right"]
    np.testing.assert_array_equal(batch.inputs["left"], X[:, 1])
    assert as_source(table, binding=TWO).info.unused == ("c", "n")
    several = Binding(TWO.call, inputs={"left": ["b", "a"], "right": "n"})
    mixed = DF.assign(n=np.arange(20))[["n", "label", "a", "b"]]
    batch = batch_of(mixed, binding=several)
    np.testing.assert_array_equal(batch.inputs["left"], X[:, [1, 0]])
    np.testing.assert_array_equal(batch.inputs["right"], np.arange(20))
    assert batch.inputs["right"].dtype == np.int32
    with pytest.raises(DataError, match=r"inputs=\{'left': 'a', 'right': 'b'\}"):
        batch_of(DF, binding=TWO)
    with pytest.raises(DataError, match=r"inputs='x'\) for that column, or"):
        batch_of(DF.rename(columns={"a": "x"}))


def test_a_layer_that_names_no_input_takes_a_matrix(expected):
    trainer = Trainer(nn.Sequential([nn.Dense(2)]))
    assert (
        history(DF, trainer=trainer)["loss"]
        == history(X, Y, trainer=Trainer(nn.Sequential([nn.Dense(2)])))["loss"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_target_takes_the_axis_of_the_output(kind):
    expected = history(X[:, :2], X[:, 2:], trainer=Trainer(nn.Dense(1)))
    table = KINDS[kind](DF[["a", "b", "c"]])
    trainer = Trainer(nn.Dense(1), targets="c")
    assert history(table, trainer=trainer) == expected
    apart = KINDS[kind](DF[["a", "b"]]), table["c"]
    assert history(*apart, trainer=Trainer(nn.Dense(1))) == expected
    assert trainer.evaluate(*apart, verbose=0) == trainer.evaluate(table, verbose=0)
    binary = history(table, KINDS[kind](DF)["label"], trainer=Trainer(nn.Dense(1)))
    assert binary == history(X, Y[:, None], trainer=Trainer(nn.Dense(1)))


def test_several_targets_by_name():
    expected = history(X[:, :1], X[:, 1:], trainer=Trainer(nn.Dense(2)))
    trainer = Trainer(nn.Dense(2), targets=["b", "c"])
    assert history(DF[["c", "a", "b"]], trainer=trainer) == expected
    assert trainer.evaluate(DF[["a"]], DF[["c", "b"]], verbose=0) == trainer.evaluate(
        X[:, :1], X[:, 1:], verbose=0
    )
    heads = Binding(
        ONE.call,
        targets=["b", "label"],
        outputs=lambda inputs: {"b": np.zeros((20, 1)), "label": np.zeros((20, 3))},
    )
    targets = batch_of(DF, binding=heads).targets
    np.testing.assert_array_equal(targets["b"], X[:, 1:2])
    np.testing.assert_array_equal(targets["label"], Y)


def test_weights_are_a_column_or_apart():
    weights = np.arange(20) % 3
    batch = batch_of(DF.assign(sample_weight=weights))
    np.testing.assert_array_equal(batch.weights, weights)
    np.testing.assert_array_equal(batch.inputs[0], X)
    for data in (((DF[["a", "b", "c"]], Y, pd.Series(weights)),), (DF, None, weights)):
        np.testing.assert_array_equal(batch_of(*data).weights, weights)
    with pytest.raises(ValueError, match="sample_weight is given twice"):
        batch_of(DF.assign(weights=1.0), None, weights)


@pytest.mark.parametrize("inputs", [["a", "weights", "label"], {"x": ["a", "weights"]}])
def test_a_column_that_the_user_calls_an_input_is_nothing_else(inputs):
    table = pd.DataFrame({"a": [1.0, 2.0], "weights": [5.0, 7.0], "label": [0, 1]})
    binding = Binding(ONE.call, inputs=inputs)
    batch = batch_of(table, np.array([3, 4]), binding=binding)
    np.testing.assert_array_equal(batch.weights, [1, 1])
    np.testing.assert_array_equal(batch.targets, [3, 4])
    if isinstance(inputs, dict):
        batch = batch_of(table, binding=binding)
        np.testing.assert_array_equal(batch.weights, [1, 1])
        np.testing.assert_array_equal(batch.targets, [0, 1])


def test_a_column_as_input_has_the_order_of_its_targets():
    column, targets = pd.Series([1.0, 2.0, 3.0]), pd.Series([10.0, 20.0, 30.0])
    with pytest.raises(DataError, match="y has the rows of x in another order"):
        batch_of(column, targets[[2, 0, 1]])
    np.testing.assert_array_equal(batch_of(column, targets).targets, [10, 20, 30])


def as_kinds(names, codes):
    """A category in every library; its codes follow `names`."""
    text = [names[code] for code in codes]
    return {
        "pandas": pd.DataFrame({"label": pd.Categorical(text, names)}),
        "polars": pl.DataFrame({"label": pl.Series(text, dtype=pl.Enum(names))}),
        "pyarrow": pa.table(
            {"label": pa.DictionaryArray.from_arrays(pa.array(codes), names)}
        ),
    }


@pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow"])
def test_a_category_as_target(kind):
    names, codes = ["low", "high", "mid"], np.arange(20) % 3
    y = as_kinds(names, codes)[kind]
    source = as_source(X, y["label"], binding=ONE)
    np.testing.assert_array_equal(source.example.targets, codes)
    assert source.info.class_names == tuple(names)
    trainer = Trainer(nn.Dense(3))
    history(DF[["a", "b", "c"]], y, trainer=trainer)
    assert trainer.class_names == tuple(names)
    assert trainer.evaluate(X, codes, verbose=0) == trainer.evaluate(X, y, verbose=0)
    # The same classes in another order have other codes.
    other = as_kinds(["high", "low", "mid"], [[1, 0, 2][c] for c in codes])[kind]
    for again in (other, other["label"]):
        result = trainer.evaluate(DF, again, verbose=0)
        assert result == trainer.evaluate(X, codes, verbose=0)
    with pytest.raises(DataError, match="this trainer was not trained on"):
        trainer.evaluate(DF, as_kinds(["low", "new"], codes % 2)[kind], verbose=0)


def test_categories_without_an_order_of_their_own():
    values, names = labels(as_column(pl.Series(["b", "a", "b"], dtype=pl.Categorical)))
    assert (values.tolist(), names) == ([1, 0, 1], ("a", "b"))
    chunks = pa.chunked_array(
        [pa.array(part).dictionary_encode() for part in (["b", "a"], ["c", "a"])]
    )
    values, names = labels(as_column(chunks))
    assert (values.tolist(), names) == ([0, 1, 2, 1], ("b", "a", "c"))
    numbered = as_column(pd.Series([3, 5]))
    with pytest.raises(DataError, match="could be its value or its code"):
        labels(numbered, ("3", "5"))
    values, _ = labels(numbered, ("low", "high"))
    assert values.tolist() == [3, 5]


def test_dtypes_of_few_libraries():
    words = pa.chunked_array([pa.array(["b", None]).dictionary_encode()])
    arrow = pd.Series(pd.arrays.ArrowExtensionArray(words))
    with pytest.raises(DataError, match="y has no value at row 1"):
        labels(as_column(arrow))
    assert labels(as_column(arrow[:1]))[1] == ("b",)
    assert as_column(pa.array(["a"]).cast(pa.string_view())).kind == "text"
    assert as_column(pl.Series([1], dtype=pl.Int128)).kind == "object"
    assert as_column(pd.Index([1, 2], name="i"))[:2] == ("i", "number")
    assert as_column(pd.Categorical(["a"])).categories == ("a",)


NOW = datetime.datetime(2020, 1, 1)
WRONG = {
    "text": (["p", "q", "r"], "the column 'z' is text"),
    "missing": ([1, None, 3], "the column 'z' has no value at row 1"),
    "none at all": ([None, None, None], "the column 'z' has no value at row 0"),
    "nan": ([1.0, 2.0, float("nan")], "the column 'z' has no value at row 2"),
    "infinite": ([1.0, float("inf"), 2.0], "the column 'z' holds inf at row 1"),
    "too large": ([1.0, 2.0, 1e300], r"the column 'z' holds 1e\+300 at row 2"),
    "missing bool": ([None, True, False], "the column 'z' "),
    "date": ([NOW, NOW, NOW], "the column 'z' is a point or a span of time"),
    "lists": ([[1], [2], [3]], r"the column 'z' is not plain numbers.*np\.stack"),
}


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
@pytest.mark.parametrize("wrong", WRONG)
def test_columns_that_are_no_numbers(library, wrong):
    values, message = WRONG[wrong]
    make = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "pyarrow": pa.table}
    table = make[library]({"a": [1.0, 2.0, 3.0], "z": values, "label": [0, 1, 0]})
    for read in (as_source, as_inputs_source):
        with pytest.raises(DataError, match=message):
            read(table, binding=ONE)
    # A column that nothing is read of may hold anything.
    assert as_source(table, binding=Binding(ONE.call, inputs=["a"])).info.unused == (
        "z",
    )
    with pytest.raises(DataError, match=r"the column 'z' |y holds inf at row 2"):
        as_source(table, binding=Binding(ONE.call, targets="z"))


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (pd.DataFrame({"a": [1.0], "label": ["p"]}), r"df\['label'\] = .*'category'\)"),
        (pl.DataFrame({"a": [1.0], "label": ["p"]}), r"cast\(pl\.Categorical\)"),
        (pa.table({"a": [1.0], "label": ["p"]}), r"\['label'\]\.dictionary_encode\(\)"),
    ],
)
def test_text_as_target_says_the_line_to_write(table, line):
    with pytest.raises(DataError, match=line):
        as_source(table, binding=ONE)


def test_lines_to_write_work():
    table = pd.DataFrame({"a": [1.0, None], "city": ["p", "q"], "label": [0, 1]})
    with pytest.raises(DataError, match=r"df\['a'\]\.fillna\(0\)"):
        as_source(table, binding=Binding(ONE.call, inputs=["a"]))
    table["a"] = table["a"].fillna(0)
    with pytest.raises(DataError, match=r"pd\.get_dummies\(df, columns=\['city'\]\)"):
        as_source(table, binding=ONE)
    dummies = pd.get_dummies(table, columns=["city"])
    inputs = as_source(dummies, binding=ONE).example.inputs[0]
    assert inputs.tolist() == [[1, 1, 0], [0, 0, 1]]
    category = table.assign(city=table["city"].astype("category"))
    with pytest.raises(DataError, match="whose codes are not quantities"):
        as_source(category, binding=ONE)
    missing = table.assign(label=pd.Categorical(["p", None]))
    with pytest.raises(DataError, match="'label' has no value at row 1"):
        as_source(missing, binding=Binding(ONE.call, inputs=["a"]))
    objects = table.assign(city=pd.Series([1, 2.5], dtype=object))
    with pytest.raises(DataError, match=r"pd\.to_numeric\(df\['city'\]\)"):
        as_source(objects, binding=ONE)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((pd.DataFrame([[1, 2]], columns=["a", "a"]),), DataError, "2 columns named"),
        ((pd.DataFrame([[1]], columns=[("a", "b")]),), DataError, "a column named"),
        ((DF[:0],), DataError, "no examples"),
        ((pl.from_pandas(DF).lazy(),), TypeError, r"Write df\.collect\(\)"),
        (({"x": DF, "label": Y},), DataError, "holds a DataFrame inside a tuple"),
        (((DF, DF), Y), DataError, "holds a DataFrame inside a tuple"),
        ((DF[["label"]],), DataError, "no column left for the inputs"),
        ((DF, DF["label"]), DataError, "the column 'label' of x equals y"),
        ((DF, Y), DataError, "the column 'label' of x equals y"),
        ((pl.from_pandas(DF), pl.from_pandas(DF)["label"]), DataError, "'label' of x"),
        ((DF[["a"]], DF["label"][::-1]), DataError, r"Write y\.loc\[x\.index\]"),
        ((DF[["a"]], Y, DF["label"][::-1]), DataError, r"Write sample_weight\.loc"),
        ((DF[["a"]], Y[:5]), DataError, "arrays of different length"),
        ((pd.DataFrame({"left": [2**40], "right": [1], "y": [0]}),), DataError, "x/le"),
    ],
)
def test_tables_that_cannot_be_read(data, error, message):
    binding = TWO if "x/le" in message else ONE
    with pytest.raises(error, match=message):
        as_source(*data, binding=binding)


def test_rows_are_taken_as_they_come():
    shuffled = DF.sample(frac=1, random_state=0)
    batch = batch_of(shuffled[["a", "b", "c"]], shuffled["label"])
    np.testing.assert_array_equal(batch.targets, Y[shuffled.index])
    # Other labels say nothing of the order.
    moved = shuffled["label"].set_axis(range(100, 120))
    batch = batch_of(shuffled[["a", "b", "c"]], moved)
    np.testing.assert_array_equal(batch.targets, Y[shuffled.index])


def test_names_that_are_numbers_and_dtypes_that_are_odd():
    table = pd.DataFrame(X).assign(y=Y)
    np.testing.assert_array_equal(batch_of(table).inputs[0], X)
    chosen = Binding(ONE.call, inputs=[2, 0])
    np.testing.assert_array_equal(
        batch_of(table, binding=chosen).inputs[0], X[:, [2, 0]]
    )
    odd = pd.DataFrame(
        {
            "b": pd.array([True, False], "boolean"),
            "i": np.array([1, 2], np.uint8),
            "s": pd.arrays.SparseArray([0.0, 1.5]),
            "h": np.array([0.5, 1], np.float16),
        }
    )
    wanted = [[1, 1, 0, 0.5], [0, 2, 1.5, 1]]
    inputs = as_inputs_source(odd, binding=ONE).example.inputs[0][:2]
    assert (inputs.tolist(), inputs.dtype) == (wanted, np.float32)


def test_batches_that_are_tables():
    parts = [DF[:8], DF[8:16][DF.columns[::-1]], DF[16:]]
    source = as_source(parts, binding=ONE)
    batches = list(source.batches(0))
    np.testing.assert_array_equal(
        np.concatenate([b.inputs[0] for b in batches][:2]), X[:16]
    )
    np.testing.assert_array_equal(batches[1].targets, Y[8:16])
    assert source.info.columns == Columns((("a", "b", "c"),), "label")
    trainer = Trainer(nn.Dense(2))
    stream = pa.Table.from_pandas(DF).to_batches(max_chunksize=8)
    trainer.fit(lambda: iter(stream), epochs=1, verbose=0)
    np.testing.assert_array_equal(
        trainer.predict(DF[["c", "b", "a"]], verbose=0), trainer.predict(X, verbose=0)
    )
    np.testing.assert_array_equal(
        trainer.predict(iter(parts), verbose=0), trainer.predict(X, verbose=0)
    )
    assert len(source.info.unused) == 0


def test_examples_made_of_rows():
    rows = pd.DataFrame({"path": ["p", "qq"], "label": [1, 0]})
    dataset = Examples(
        rows, load=lambda row: (np.full(2, len(row["path"])), row["label"])
    )
    batch = as_source(dataset, binding=ONE, batch_size=2).example
    assert batch.inputs[0].tolist() == [[1, 1], [2, 2]]
    assert batch.targets.tolist() == [1, 0]


def test_files_of_pyarrow_are_told_how_to_be_read(tmp_path):
    dataset = pytest.importorskip("pyarrow.dataset")
    table = pa.Table.from_pandas(DF)
    dataset.write_dataset(table, tmp_path, format="arrow")
    for unread in (dataset.dataset(tmp_path, format="arrow"), dataset.dataset(table)):
        with pytest.raises(TypeError, match=r"holds no rows yet.*to_table\(\)"):
            as_source(unread, binding=ONE)


def test_a_target_that_is_misspelt_or_not_said_is_told_before_the_inputs():
    table = pd.DataFrame({"a": [1.0, 2.0], "diag": pd.Categorical(["no", "yes"])})
    misspelt = Binding(ONE.call, targets="dia")
    with pytest.raises(DataError, match=r"no column 'dia'.*Did you mean 'diag'"):
        as_source(table, binding=misspelt)
    with pytest.raises(DataError, match=r"Trainer\(model, targets='diag'\)"):
        as_source(table, binding=ONE)


def test_split_keeps_what_was_understood():
    table = DF.assign(city="x")
    chosen = Binding(ONE.call, inputs=["c", "a"])
    train, validation = split_data(table, None, None, 0.5, binding=chosen)
    assert train.x.info.unused == validation.x.info.unused == ("b", "city")
    assert train.x.info.columns == Columns((("c", "a"),), "label")
    whole = as_whole(table, binding=chosen)
    np.testing.assert_array_equal(
        validation.x.batch.inputs[0], whole.batch.inputs[0][10:]
    )


def test_columns_become_plain_values_and_back():
    for columns in (
        Columns((("a", 1),), "label", True, ("no", "yes")),
        Columns({"left": "a", "right": ("b", 2)}, {"p": ("q",), "r": "s"}),
        Columns(None, ("a", "b")),
    ):
        plain = json.loads(json.dumps(columns.to_plain()))
        assert Columns.from_plain(plain) == columns
    assert Columns.from_plain(None) is None


def test_what_is_said(capsys):
    Trainer(nn.Dense(2)).fit(DF.assign(city="x")[["a", "label"]], epochs=1, verbose=2)
    assert "columns: a · targets: label\n" in capsys.readouterr().out
    many = pd.DataFrame(np.zeros((4, 9))).assign(y=[0, 1, 0, 1])
    report = Trainer(nn.Dense(2)).check(many)
    assert report.rows["columns"] == "0, 1, 2, 3, 4, 5, … (9) · targets: y"

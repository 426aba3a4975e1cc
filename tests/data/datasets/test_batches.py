"""Loaders whose rows differ in length, and batches of graphs."""

import warnings
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sources import as_source

from flaxfit import Batch, DataError, Trainer
from flaxfit._core.types import CallSpec
from flaxfit.data import Batches, Examples
from flaxfit.data.binding.binding import Binding
from flaxfit.data.datasets.batches import open_batches
from flaxfit.data.datasets.stream import Stream

BINDING = Binding(CallSpec(("x",), (), ("x",)))
GRAPHS, REAL = 5, 4


class Graph(NamedTuple):
    """Several graphs in one, as jraph has them."""

    nodes: Any
    edges: Any
    senders: Any
    receivers: Any
    n_node: Any
    globals: Any = None


@flax.struct.dataclass
class Other:
    """The same in a dataclass."""

    nodes: Any
    edges: Any
    senders: Any
    receivers: Any
    n_node: Any


class Network(nn.Module):
    """One round of messages along the edges, and a sum over the nodes of a graph."""

    @nn.compact
    def __call__(self, graph):
        nodes, graphs = graph.nodes.shape[0], graph.n_node.shape[0]
        sent = jnp.concatenate([graph.nodes[graph.senders], graph.edges], -1)
        messages = nn.relu(nn.Dense(4)(sent))
        received = jax.ops.segment_sum(messages, graph.receivers, nodes)
        hidden = nn.relu(nn.Dense(4)(graph.nodes) + received)
        owner = jnp.repeat(jnp.arange(graphs), graph.n_node, total_repeat_length=nodes)
        return nn.Dense(1)(jax.ops.segment_sum(hidden, owner, graphs))


def graphs(number=0, edges=30):
    """Four graphs of four nodes, and a fifth that only fills up."""
    rng = np.random.default_rng(number)
    nodes = rng.normal(size=(24, 3)).astype(np.float32)
    graph = Graph(
        nodes,
        rng.normal(size=(edges, 2)).astype(np.float32),
        *(4 * rng.integers(0, 4, edges) + rng.integers(0, 4, (2, edges))).astype(int),
        n_node=np.array([4, 4, 4, 4, 8]),
    )
    labels = nodes[:16].reshape(4, -1).sum(1, keepdims=True)
    weights = np.array([1, 1, 1, 1, 0], np.float32)
    return graph, np.append(labels, [[9.0]], 0).astype(np.float32), weights


DATA = [graphs(number) for number in range(6)]


def size(raw):
    return raw[0].n_node.shape[0]


def mean_loss(trainer, data=DATA):
    """The mean squared error over the graphs that are real, in NumPy."""
    outputs = [Network().apply(trainer.variables, graph) for graph, _, _ in data]
    errors = [(o - y)[:REAL] for o, (_, y, _) in zip(outputs, data, strict=True)]
    return float(np.mean(np.square(np.concatenate(errors))))


# -------------------------------------------------------------------- graphs


@pytest.mark.parametrize("prefetch", [0, 2])
def test_graphs_are_trained_on_evaluated_and_predicted(prefetch):
    data = Batches(DATA, size=size)
    trainer = Trainer(Network(), learning_rate=0.01, prefetch=prefetch)
    history = trainer.fit(data, epochs=20, verbose=0, validation_data=data)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert trainer.evaluate(data)["loss"] == pytest.approx(mean_loss(trainer), rel=1e-5)
    outputs = trainer.predict(data)
    assert outputs.shape == (6 * GRAPHS, 1)
    expected = [Network().apply(trainer.variables, graph) for graph, _, _ in DATA]
    np.testing.assert_allclose(outputs, np.concatenate(expected), atol=1e-5)
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 1}
    report = trainer.check(data)
    assert "6 batches of 5" in report.rows["data"]


def test_several_devices_have_the_whole_batch(eight_devices):
    data = Batches(DATA, size=size)
    results = []
    for devices in (1, 8):
        trainer = Trainer(Network(), learning_rate=0.01, devices=devices)
        trainer.fit(data, epochs=2, verbose=0)
        results.append((trainer.evaluate(data)["loss"], trainer.predict(data)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


def test_compiled_ahead_saved_and_loaded(tmp_path):
    data = Batches(DATA, size=size)
    trainer = Trainer(Network())
    trainer.compile(data, verbose=0)
    trainer.fit(data, verbose=0)
    trainer.evaluate(data)
    trainer.predict(data)
    assert trainer.compiles == {"train": 1, "eval": 1, "predict": 1}
    trainer.save(tmp_path / "a.msgpack")
    loaded = Trainer.load(tmp_path / "a.msgpack", Network())
    assert loaded.evaluate(data) == trainer.evaluate(data)


def test_one_batch_at_a_time_and_a_loop_of_ones_own():
    one = Batches(DATA[:1], size=size)
    trainer = Trainer(Network())
    before = trainer.test_on_batch(one)
    assert trainer.train_on_batch(one) == before
    assert trainer.predict_on_batch(one).shape == (GRAPHS, 1)
    assert trainer.test_on_batch(one)["loss"] == pytest.approx(
        mean_loss(trainer, DATA[:1]), rel=1e-5
    )
    with pytest.raises(ValueError, match="takes one batch"):
        trainer.train_on_batch(Batches(DATA, size=size))

    graph, labels, weights = DATA[0]
    batch = Batch((graph,), labels, weights)
    state = trainer.init(batch)
    state, logs = trainer.train_step(state, batch)
    assert int(state.step) == 1
    assert float(logs["loss"].compute()) == pytest.approx(before["loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["tuple", "fields", "dataclass", "dict"])
def test_a_graph_in_any_kind_of_batch(kind):
    raw, options, count = DATA[0], {}, size
    graph, labels, weights = raw
    if kind == "fields":  # read by names: what the model is called with has to be said
        raw = graph._replace(globals=labels)
        options = {"inputs": lambda graph: graph, "targets": "globals"}
        count = lambda graph: len(graph.n_node)  # noqa: E731
    elif kind == "dataclass":
        raw = Other(*graph[:5]), labels, weights
    elif kind == "dict":
        raw = {"graph": graph, "label": labels, "weights": weights}
        count = lambda raw: len(raw["label"])  # noqa: E731
    trainer = Trainer(Network(), **options)
    value = trainer.evaluate(Batches([raw], size=count))["loss"]
    if kind == "fields":
        outputs = Network().apply(trainer.variables, graph)
        expected = float(np.mean(np.square(outputs - labels)))
    else:
        expected = mean_loss(trainer, DATA[:1])
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [lambda *fields: Graph(*fields), Other])
def test_graphs_alone_are_predicted_in_any_kind_of_container(kind):
    trainer = Trainer(Network())
    trainer.fit(Batches(DATA, size=size), verbose=0)
    alone = [kind(*raw[0][:5]) for raw in DATA]
    outputs = trainer.predict(Batches(alone, size=lambda graph: len(graph.n_node)))
    np.testing.assert_array_equal(outputs, trainer.predict(Batches(DATA, size=size)))


def test_without_weights_all_count():
    batch, *_ = as_source(Batches([DATA[0][:2]], size=size), binding=BINDING).batches(0)
    assert batch.weights.tolist() == [1.0] * GRAPHS
    assert batch.inputs[0].nodes.shape == (24, 3)
    assert batch.inputs[0].senders.dtype == np.int32


def test_other_shapes_compile_again_and_say_so(capsys):
    data = Batches([graphs(0, 30), graphs(1, 40), graphs(2, 30)], size=size)
    trainer = Trainer(Network())
    with pytest.warns(UserWarning, match="batch 1 of pass 0 has other shapes"):
        trainer.fit(data, epochs=2, verbose=2)
    assert trainer.compiles["train"] == 2
    assert "x/edges is float32[40,2], was float32[30,2]" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = trainer.evaluate(data)["loss"]
    expected = mean_loss(trainer, [graphs(0, 30), graphs(1, 40), graphs(2, 30)])
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("raw", "count", "match"),
    [
        (DATA[0], lambda raw: 4, r"size returned 4, but y has shape \(5, 1\)"),
        (DATA[0], lambda raw: None, "size returned None"),
        (DATA[0], lambda raw: 2.5, "size returned 2.5"),
        (DATA[0], lambda raw: np.int64(0), "size returned"),
        ((Graph("a", *DATA[0][0][1:]), *DATA[0][1:]), size, "x/nodes has dtype"),
    ],
)
def test_sizes_that_cannot_be(raw, count, match):
    with pytest.raises(DataError, match=match):
        as_source(Batches([raw], size=count), binding=BINDING)


def test_a_graph_without_size_is_refused():
    with pytest.raises(DataError, match=r"different length.*Batches\(.*size="):
        Trainer(Network()).fit(lambda: iter(DATA), verbose=0)


def test_other_fields_than_the_first_batch_has():
    other = DATA[0][0]._replace(globals=np.ones(1, np.float32))
    data = Batches([DATA[0], (other, *DATA[0][1:])], size=size)
    with pytest.raises(DataError, match="batch 1 of pass 0 differs"):
        list(as_source(data, binding=BINDING).batches(0))


# ------------------------------------------------------- rows of other lengths


class Tagger(nn.Module):
    """Tags every token by itself."""

    @nn.compact
    def __call__(self, tokens, attention_mask=None):
        x = nn.Embed(11, 4)(tokens)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return nn.Dense(3)(x)


def ragged(lengths=(3, 7, 12, 5, 9)):
    rng = np.random.default_rng(0)
    for length in lengths:
        tokens = rng.integers(0, 11, (4, length)).astype(np.int32)
        yield tokens, tokens % 3


class Resumable:
    """An iterator that tells where it stands."""

    def __init__(self):
        self.at = 0
        self.batches = list(ragged())

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def test_a_loader_that_pads_to_its_longest_compiles_once_per_bucket():
    data = Batches(ragged, pad_to=[8, 16])
    trainer = Trainer(Tagger())
    trainer.fit(data, epochs=3, verbose=0)
    value = trainer.evaluate(data)["loss"]
    assert trainer.compiles == {"train": 2, "eval": 2, "predict": 0}
    total, count = 0.0, 0
    for tokens, labels in ragged():
        scores = jax.nn.log_softmax(Tagger().apply(trainer.variables, tokens))
        total -= np.take_along_axis(np.asarray(scores), labels[..., None], -1).sum()
        count += labels.size
    assert value == pytest.approx(total / count, rel=1e-5)


def test_weights_and_masks_of_the_loader_s_own():
    def batches():
        for x, y in ragged():
            weights = (np.arange(x.shape[1]) < 3).astype(np.float32)
            yield {"tokens": x, "labels": y, "weights": np.tile(weights, (4, 1))}

    data = Batches(batches, pad_to=[8, 16], mask="attention_mask")
    binding = Binding(CallSpec(("tokens", "attention_mask"), (), ("tokens",)))
    found = list(as_source(data, binding=binding).batches(0))
    assert [b.inputs["tokens"].shape for b in found] == [
        (4, end) for end in (8, 8, 16, 8, 16)
    ]
    assert [b.weights.sum() for b in found] == [12] * 5
    masks = [b.inputs["attention_mask"] for b in found]
    assert [mask.sum() for mask in masks] == [4 * n for n in (3, 7, 12, 5, 9)]
    assert masks[0].dtype == np.bool_


def test_named_parts_and_labels_of_rows():
    batches = [(np.ones((2, n, 3)), np.eye(2)) for n in (3, 9)]
    data = Batches(batches, pad_to={0: [4, 10]}, pad_value=2.0)
    found = list(as_source(data, binding=BINDING).batches(0))
    assert [b.inputs[0].shape for b in found] == [(2, 4, 3), (2, 10, 3)]
    assert found[0].inputs[0][0, :, 0].tolist() == [1, 1, 1, 2]
    assert [b.weights.tolist() for b in found] == [[1, 1]] * 2
    with pytest.raises(DataError, match=r"pad_to={0: \[4, 10\]}"):
        as_source(Batches(batches, pad_to=[4, 10]), binding=BINDING)


def test_what_is_too_long_is_an_error_or_cut_off():
    with pytest.raises(DataError, match=r"length 12.*pad_to=\[8, 10, 12\]") as caught:
        list(as_source(Batches(ragged, pad_to=[8, 10]), binding=BINDING).batches(0))
    assert "batch 2" in "".join(caught.value.__notes__)
    cut = Batches(ragged, pad_to=[8, 10], truncate=True)
    found = list(as_source(cut, binding=BINDING).batches(0))
    assert [int(b.weights.sum()) for b in found] == [12, 28, 40, 20, 36]


def test_a_loader_that_tells_where_it_stands_goes_on_telling():
    source = as_source(Batches(lambda: Resumable(), pad_to=16), binding=BINDING)
    first = list(source.batches(0))
    assert source.bookmark == {"pass": 0, "number": 1, "state": {"at": 1}}
    rest = list(source.batches(0, 3, bookmark=source.bookmark))
    for one, other in zip(first[3:], rest, strict=True):
        np.testing.assert_array_equal(one.inputs[0], other.inputs[0])


@pytest.mark.parametrize("seed", [(), (3,)])
def test_a_loader_that_draws_by_the_seed_is_padded_too(seed):
    """As a `DataLoader` of torch is: what is opened then is another iterator."""

    def open_with(seed):
        return lambda pass_index, start: ragged()

    seeded = open_with if seed else None
    stream = Stream("loader", lambda *unused: ragged(), seeded=seeded)
    padded = open_batches(Batches(stream, pad_to=[8, 16]), stream)
    source = as_source(padded, binding=BINDING, seed=seed)
    want = as_source(Batches(ragged, pad_to=[8, 16]), binding=BINDING)
    for one, other in zip(source.batches(0), want.batches(0), strict=True):
        assert one.inputs[0].shape[1] in (8, 16)
        np.testing.assert_array_equal(one.inputs[0], other.inputs[0])
        np.testing.assert_array_equal(one.weights, other.weights)


def test_what_goes_with_padded_rows_need_not_be_padded():
    tokens, labels = np.ones((4, 6), np.int32), np.ones((4, 6), np.float32)
    data = [{"count": np.int32(3), "x": tokens, "y": np.ones((4, 1), np.float32)}]
    named = Binding(CallSpec(("x",), (), ("x",)), inputs="x")
    source = as_source(Batches(data, pad_to={"x": 8}), binding=named)
    assert source.example.inputs[0].shape == (4, 8)
    for rows in (1, 3):
        weighted = [(tokens, labels, np.ones(rows, np.float32))]
        with pytest.raises(DataError, match=rf"weights: {rows}"):
            as_source(Batches(weighted, pad_to={0: 8, 1: 8}), binding=BINDING)


# ------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([],), ValueError, "either size=.*or pad_to="),
        (([], len, 128), ValueError, "either size=.*or pad_to="),
        (([], 3), TypeError, "expected a function of a batch"),
        (((np.ones(3), np.ones(3)), len), TypeError, r"Batches\(\[batch\]"),
        (({"x": np.ones(3)}, len), TypeError, r"Batches\(\.\.\.\) of a dict"),
        ((np.ones((3, 3)), len), TypeError, r"Batches\(\.\.\.\) of a ndarray"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, match):
    with pytest.raises(error, match=match):
        Batches(*arguments)


def test_single_examples_are_refused():
    data = Batches(Examples([np.ones(3)]), pad_to=8)
    with pytest.raises(TypeError, match=r"fit\(Examples\(dataset, pad_to=...\)\)"):
        Trainer(Tagger()).fit(data)
    with pytest.raises(TypeError, match="Unsupported data type"):
        Trainer(Tagger()).fit(Batches(3, pad_to=8))
    with pytest.raises(DataError, match="no batches"):
        Trainer(Tagger()).fit(Batches([], pad_to=8))


def test_arrays_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    data = Batches(str(tmp_path / "x.npy"), pad_to=8)
    with pytest.raises(TypeError, match=r"which holds arrays.*fit\(x, y\)"):
        Trainer(Tagger()).fit(data)

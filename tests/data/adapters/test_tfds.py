"""TFDS: names with splits, builders and data sources, prepared and read offline."""

import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers.sources import as_source

from flaxfit import Trainer
from flaxfit._core.errors import DataError
from flaxfit._core.types import CallSpec
from flaxfit.data import Examples
from flaxfit.data import tfds as named
from flaxfit.data.adapters.registry import adapt
from flaxfit.data.adapters.tfds import _info, matches
from flaxfit.data.binding.binding import Binding
from flaxfit.data.datasets.stream import NO_INFO

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("PIL")

from helpers import tfds_datasets  # noqa: E402

ONE = Binding(CallSpec(("x",), (), ("x",)))
TWO = Binding(CallSpec(("first", "second"), (), ("first", "second")))
HAS = r"few_digits 1\.0\.0 has train \(300 examples\), validation \(40\), test \(60\)"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds_datasets.prepare_all(folder)
    return folder


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, first, second):
        return nn.Dense(2)(first) - nn.Dense(2)(second)


def source_of(x, data_dir=None, binding=ONE, **arguments):
    return as_source(x, binding=binding, data_dir=data_dir, **arguments)


def rows(source, pass_index=0, start=0):
    """The pictures and labels of a pass, without the fill of its last batch."""
    batches = list(source.batches(pass_index, start))
    real = [batch.weights > 0 for batch in batches]
    pairs = zip(batches, real, strict=True)
    images, labels = zip(
        *((b.inputs[0][r], b.targets[r]) for b, r in pairs), strict=True
    )
    return np.concatenate(images), np.concatenate(labels)


def stored(data_dir, split):
    """The same split as arrays, in the order in which it is stored."""
    found = list(tfds.builder("few_digits", data_dir=data_dir).as_data_source(split))
    return np.stack([e["image"] for e in found]), np.array([e["label"] for e in found])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("few_digits", "train"),
        ("FewDigits", "train"),
        ("few_digits/test", "test"),
        ("few_digits:1.0.0", "train"),
        ("few_digits:1.0.0/test", "test"),
        ("few_digits:1.*.*/test", "test"),
        ("few_digits/train+test", "train+test"),
        ("few_digits/train[:90%]", "train[:90%]"),
        ("few_digits/train[10:20]", "train[10:20]"),
        ("few_digits/train[:10]+test[-5:]", "train[:10]+test[-5:]"),
    ],
)
def test_names(data_dir, name, split):
    source = source_of(name, data_dir)
    images, labels = stored(data_dir, split)
    assert source.kind == f"few_digits/{split} 1.0.0 (TFDS)"
    assert source.num_examples == len(labels)
    assert source.info.unused == ("id",)
    read = rows(source)
    assert read[0].dtype == np.uint8
    np.testing.assert_array_equal(read[0], images)
    np.testing.assert_array_equal(read[1], labels)


def test_every_example_of_a_split_is_read(data_dir):
    images, labels = rows(source_of("few_digits/test", data_dir))
    x, y = tfds_datasets.digits("test")
    assert sorted(zip(map(bytes, images), labels, strict=True)) == sorted(
        zip(map(bytes, x), y, strict=True)
    )


def test_configs(data_dir):
    for name, kind, count in (
        ("few_patients", "few_patients/small/train", 64),
        ("few_patients/train", "few_patients/small/train", 64),
        ("few_patients/small", "few_patients/small/train", 64),
        ("few_patients/large", "few_patients/large/train", 128),
        ("few_patients/large:2.1.0", "few_patients/large/train", 128),
        ("few_patients/large/train[:9]", "few_patients/large/train[:9]", 9),
    ):
        source = source_of(name, data_dir, TWO)
        assert source.kind == f"{kind} 2.1.0 (TFDS)"
        assert source.num_examples == count
    batch = source.example
    assert [each.shape for each in batch.inputs] == [(9, 10), (9, 10)]
    assert batch.targets.dtype == np.int32


def test_folders_of_prepared_datasets(data_dir):
    folder = data_dir / "few_digits" / "1.0.0"
    for given in (folder, str(folder), folder / "train", f"{folder}/train"):
        assert source_of(given).kind == "few_digits/train 1.0.0 (TFDS)"
    source = source_of(folder / "test[:7]", name="evaluate")
    np.testing.assert_array_equal(rows(source)[1], stored(data_dir, "test[:7]")[1])


def test_builders_and_data_sources(data_dir):
    builder = tfds.builder("few_digits", data_dir=data_dir)
    assert source_of(builder).kind == "few_digits/train 1.0.0 (TFDS)"
    source = source_of(builder.as_data_source("test[:7]"), name="evaluate")
    assert source.kind == "few_digits/test[:7] 1.0.0 (TFDS)"
    np.testing.assert_array_equal(rows(source)[1], stored(data_dir, "test[:7]")[1])


def test_a_dataset_is_read_without_its_code(data_dir):
    code = (
        "from flaxfit.data.adapters.registry import adapt; import sys; "
        "from flaxfit.data import tfds; "
        f"examples = adapt(tfds('few_digits/test', data_dir={str(data_dir)!r})); "
        "print(examples.kind, examples.length, 'tfds_datasets' in sys.modules, "
        "'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "few_digits/test 1.0.0 (TFDS) 60 False False"


def test_facts(data_dir):
    info = source_of("few_digits", data_dir).info
    assert set(info.keys) == {"image", "label", "id"}
    assert (info.inputs, info.targets) == ("image", "label")
    assert info.class_names == tfds_datasets.NAMES
    assert info.pictures
    info = source_of("few_patients", data_dir, TWO).info
    assert (info.inputs, info.targets) == (("mean", "worst"), "benign")
    assert info.class_names == ()  # "0" and "1" are no names
    assert not info.pictures


def of_features(features, supervised_keys=None, method="DESERIALIZE_AND_DECODE"):
    return SimpleNamespace(
        dataset_info=SimpleNamespace(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=supervised_keys,
        ),
        deserialize_method=SimpleNamespace(name=method),
    )


def test_facts_of_other_features():
    picture, classes = tfds.features.Image(), tfds.features.ClassLabel(names=["a", "b"])
    mask = tfds.features.LabeledImage(labels=2, shape=(None, None, 1))
    counts = tfds.features.Tensor(shape=(3,), dtype=np.uint8)
    assert _info(of_features({"x": picture, "y": classes})).pictures
    assert _info(of_features({"x": picture, "y": classes})).class_names == ("a", "b")
    assert _info(of_features({"x": picture, "y": classes})).inputs is None
    assert not _info(of_features({"x": mask, "y": classes})).pictures
    assert not _info(of_features({"x": counts, "y": classes})).pictures
    # Bytes that are no picture must not be scaled: then neither is.
    keys = (("x", {"z": "n"}), "m")
    info = _info(of_features({"x": picture, "n": counts, "m": mask}, keys))
    assert (info.inputs, info.targets) == (("x", "n"), "m")
    assert not info.pictures
    assert _info(of_features({"x": picture, "m": mask}, ("x", "m"))).pictures
    nested = {"a": tfds.features.Text(), "b": tfds.features.Sequence({"c": np.int64})}
    assert _info(of_features({"x": picture, "y": classes, "n": nested})).pictures
    assert _info(of_features({"x": picture}, method="RAW_BYTES")) is NO_INFO


def test_every_pass_is_a_shuffle_of_its_own_and_seeks(data_dir):
    images, labels = stored(data_dir, "test")
    source = source_of("few_digits/test", data_dir, shuffle=True, seed=(3,))
    whole = [rows(source, index) for index in range(2)]
    arrays = as_source(images, labels, binding=ONE, shuffle=True, seed=(3,))
    for index in range(2):
        expected = rows(arrays, index)
        np.testing.assert_array_equal(whole[index][0], expected[0])
        np.testing.assert_array_equal(whole[index][1], expected[1])
    assert not np.array_equal(whole[0][1], whole[1][1])
    assert source.seeks
    np.testing.assert_array_equal(rows(source, 1, start=1)[1], whole[1][1][32:])


def test_fit_is_that_of_the_same_arrays(data_dir):
    images, labels = stored(data_dir, "train")
    held_out = stored(data_dir, "validation")

    def trained(*data, **arguments):
        trainer = Trainer(Classifier(), metrics=["accuracy"], scale_images=True)
        history = trainer.fit(*data, epochs=2, batch_size=64, verbose=0, **arguments)
        return trainer, history

    by_name, history = trained(
        named("few_digits", data_dir=data_dir),
        validation_data=named("few_digits/validation", data_dir=data_dir),
    )
    by_arrays, expected = trained(images, labels, validation_data=held_out)
    for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert history.history[key] == expected.history[key]
    jax.tree.map(
        np.testing.assert_array_equal, by_name.state.params, by_arrays.state.params
    )
    x, y = stored(data_dir, "test")
    test = named("few_digits/test", data_dir=data_dir)
    assert by_name.evaluate(test, verbose=0) == by_arrays.evaluate(x, y, verbose=0)
    np.testing.assert_array_equal(
        by_name.predict(test, verbose=0), by_arrays.predict(x, verbose=0)
    )
    assert by_name.class_names == tfds_datasets.NAMES


def test_two_inputs_go_by_position(data_dir):
    trainer = Trainer(TwoInputs())
    dataset = named("few_patients/large", data_dir=data_dir)
    history = trainer.fit(dataset, epochs=1, batch_size=128, verbose=0)
    source = source_of("few_patients/large", data_dir, TWO, batch_size=128)
    other = Trainer(TwoInputs())
    batch = source.example
    expected = other.fit(batch.inputs, batch.targets, epochs=1, batch_size=128)
    assert history.history["loss"] == expected.history["loss"]


def test_loaders_of_examples(data_dir):
    def load(example):
        return example["image"][:, ::-1], example["label"]

    images, labels = stored(data_dir, "test")
    test = named("few_digits/test", data_dir=data_dir)
    for items in (test, tfds.builder("few_digits", data_dir=data_dir)):
        source = source_of(Examples(items, load, threads=2))
        count = source.num_examples
        if items is test:
            read = rows(source)
            np.testing.assert_array_equal(read[0], images[:, :, ::-1])
            np.testing.assert_array_equal(read[1], labels)
        else:
            assert count == 300


def test_one_source_is_read_by_many_threads_and_by_processes(data_dir):
    examples = adapt(named("few_digits", data_dir=data_dir))
    images, labels = stored(data_dir, "train")
    tasks = [np.random.default_rng(n).permutation(300)[:50] for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for task, items in zip(tasks, pool.map(examples.take, tasks), strict=True):
            np.testing.assert_array_equal([e["image"] for e in items], images[task])
    take = pickle.loads(pickle.dumps(examples.take))
    assert [e["label"] for e in take(np.array([7, 3]))] == labels[[7, 3]].tolist()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("few_digitz", ValueError, r"no dataset 'few_digitz'.*mean 'few_digits'"),
        ("few_digitz/test", ValueError, r"Stored in .*few_digits, few_pat"),
        ("mnits", ValueError, "no dataset 'mnits': .*Did you mean 'mnist'"),
        ("a b", ValueError, "no dataset 'a b': .*A str is the name of a dataset"),
        ("", ValueError, "no dataset ''"),
        ("test", ValueError, "Write a split after the name .*: 'mnist/test'"),
        ("few_digits/tset", ValueError, rf"there is no split 'tset': {HAS}.*'test'\?"),
        (
            "few_digits/train[5]",
            ValueError,
            r"Write parts as 'few_digits/train\[:90%\]'",
        ),
        ("few_digits/train[:9000]", ValueError, "incompatible with 300 examples"),
        ("few_digits/train[:0%]", DataError, rf"no examples in .*: {HAS}"),
        ("few_digits/train[9:3]", DataError, "no examples in the split"),
        ("few_digits:2.0.0", ValueError, r"at version 2\.0\.0, only: 1\.0\.0"),
        ("few_patients/larg", ValueError, "not a config of few_patients.*mean 'large'"),
        ("few_patients/larg/train", ValueError, "Its configs are small, large"),
        ("/no/such/folder", ValueError, "'/no/such/folder' does not exist"),
        ("./no.csv", ValueError, r"'\./no\.csv' does not exist"),
        (Path("no.csv"), ValueError, r"'no\.csv' does not exist"),
        (Path(__file__), ValueError, r"is a file\. Give the arrays"),
        (Path(__file__).parent, ValueError, r"without dataset_info\.json.*image_fold"),
        ("huggingface:glue", ValueError, r"Write datasets\.load_dataset\('glue'"),
    ],
)
def test_what_cannot_be_read(data_dir, given, error, text):
    with pytest.raises(error, match=text):
        source_of(given, data_dir)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("evaluate", r"evaluate\('few_digits/test'\)"),
        ("predict", r"predict\('few_digits/test'\)"),
        ("predict_batches", r"predict_batches\('few_digits/test'\)"),
        ("validation_data", "validation_data='few_digits/validation'"),
    ],
)
def test_only_training_has_a_split_of_its_own(data_dir, what, line):
    with pytest.raises(ValueError, match=f"does not say which split: {HAS}.*{line}"):
        source_of("few_digits", data_dir, name=what)


def test_outputs_need_a_split_and_a_summary_does_not(data_dir):
    trainer = Trainer(Classifier())
    given = named("few_digits", data_dir=data_dir)
    assert "Dense" in str(trainer.summary(given))
    with pytest.raises(ValueError, match=r"Write predict\('few_digits/test'\)"):
        trainer.predict(given)
    with pytest.raises(ValueError, match=r"Write predict_batches\('few_digits/test'\)"):
        trainer.predict_batches(given)
    with pytest.raises(ValueError, match=r"Write evaluate\('few_digits/test'\)"):
        trainer.evaluate(Examples(given))


def test_a_name_is_looked_up_in_the_folder_given_or_in_that_of_tfds(
    data_dir, monkeypatch
):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(data_dir))
    assert source_of("few_digits/test").num_examples == 60
    with pytest.raises(TypeError, match="data_dir"):
        Trainer(Classifier()).fit("few_digits", data_dir=data_dir)


def test_builders_and_dicts_of_sources_need_a_split(data_dir):
    builder = tfds.builder("few_digits", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"Write .*builder\.as_data_source\('test'\)"):
        source_of(builder, name="evaluate")
    sources = tfds.data_source("few_digits", data_dir=data_dir)
    counts = r"train \(300 examples\), validation \(40\), test \(60\)"
    with pytest.raises(ValueError, match=rf"{counts}\. Write fit\(sources\['train'\]"):
        source_of(sources)
    with pytest.raises(ValueError, match=r"validation_data=sources\['validation'\]"):
        source_of(sources, name="validation_data")


def test_errors_come_through_the_trainer(data_dir):
    dataset = named("few_digits", data_dir=data_dir)
    trainer = Trainer(Classifier())
    with pytest.raises(ValueError, match="validation_data='few_digits/validation'"):
        trainer.fit(dataset, validation_data=dataset)
    with pytest.raises(ValueError, match="y is given together with a few_digits/train"):
        trainer.fit(dataset, np.zeros(300, int))


def test_array_files_and_what_else_is_no_dataset():
    for x in ("x.npy", Path("x.npz"), {}, {"x": np.zeros(3)}, None, b"mnist", 3, []):
        assert not matches(x)


def test_an_unprepared_dataset_is_prepared_once(tmp_path, capsys):
    source = source_of("few_digits/test", tmp_path)
    assert source.num_examples == 60
    shown = capsys.readouterr().out
    assert f"few_digits:1.0.0 is not prepared in {tmp_path}: TFDS prepares" in shown
    assert list(tmp_path.glob("few_digits/1.0.0/*test.array_record*"))
    assert source_of("few_digits/test", tmp_path).num_examples == 60
    assert capsys.readouterr().out == ""


def test_a_failing_download_says_what_to_run(tmp_path, monkeypatch):
    def fail(*unused, **options):
        raise OSError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(
        DataError, match=r"mnist:3\.0\.1 in .*: OSError: no net"
    ) as caught:
        source_of("mnist/test", tmp_path)
    [note] = caught.value.__notes__
    assert f"copy {tmp_path}/mnist/3.0.1 here" in note
    assert (
        '    python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('mnist:3.0.1', data_dir='{tmp_path}')"
        ".download_and_prepare(file_format='array_record')\""
    ) in note
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (
            ModuleNotFoundError("No module named 'beam'", name="beam"),
            r"ModuleNotFoundError: No module named 'beam'",
        ),
        (
            OSError("no space left"),
            r"OSError: no space left\. Preparing may .*tensorflow",
        ),
    ],
)
def test_a_failing_preparation_says_what_to_run(tmp_path, monkeypatch, failure, text):
    def fail(*unused):
        raise failure

    monkeypatch.setattr(tfds_datasets.FewDigits, "_split_generators", fail)
    with pytest.raises(DataError, match=text) as caught:
        source_of("few_digits", tmp_path)
    assert (
        "from helpers.tfds_datasets import FewDigits; "
        f"FewDigits(data_dir='{tmp_path}').download_and_prepare("
    ) in caught.value.__notes__[0]
    assert caught.value.__cause__ is not None


def test_a_folder_in_the_way_is_no_dataset(tmp_path):
    (tmp_path / "few_digits" / "1.0.0").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"few_digits/1\.0\.0 holds no prepared.*Delete"
    ):
        source_of("few_digits", tmp_path)


def test_a_dataset_stored_as_tfrecord_says_how_to_convert_it(data_dir, tmp_path):
    folder = tmp_path / "few_digits" / "1.0.0"
    shutil.copytree(data_dir / "few_digits" / "1.0.0", folder)
    file = folder / "dataset_info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    line = f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array"
    with pytest.raises(
        DataError, match=rf"is stored as tfrecord, (?s:.*){line}_record"
    ):
        source_of("few_digits", tmp_path)


def test_names_go_before_folders_that_lie_around(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few_digits" / "test").mkdir(parents=True)
    assert source_of("few_digits/test", data_dir).num_examples == 60
    assert source_of("few_digits", data_dir).num_examples == 300
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match=r"'table\.csv' is a file\. Give the arrays"):
        source_of("table.csv", data_dir)


def test_only_datasets_of_tfds_import_it():
    code = (
        "import sys, numpy as np; from flaxfit.data.adapters.registry import adapt; "
        "adapt([np.zeros(3)]); adapt({'x': np.zeros(3)}); "
        "print('tensorflow_datasets' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("arguments", [{"name": 5}, {"name": "mnist", "data_dir": 5}])
def test_a_name_and_a_folder_of_another_type_are_refused_at_once(arguments):
    with pytest.raises(TypeError, match=r"Expected a name and the path of a folder"):
        named(**arguments)

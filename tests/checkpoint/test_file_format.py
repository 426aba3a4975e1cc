"""The bytes of a file: Flax's, checked, and safe to read whatever they are."""

import contextlib
import os
import struct
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization

from flaxfit import checkpoint
from flaxfit._core.errors import CheckpointCorruptError, CheckpointError
from flaxfit._core.types import TrainState
from flaxfit.checkpoint import file_format


def make_state():
    return TrainState(
        step=jnp.int32(7),
        params={"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)},
        collections={"none": None},
        opt_state=(jnp.ones(3),),
        rng=jax.random.key(3),
    )


LEAVES = [
    "int32[] step",
    "float32[2,3] params/w",
    "bfloat16[2] params/b",
    "float32[3] opt_state/0",
    "key<threefry2x32>[] rng",
    "int8[4] extra/mask",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("format") / "run"
    checkpoint.save(path, make_state(), {"a": 1}, extra={"mask": np.zeros(4, "i1")})
    return path.read_bytes()


def marks(data):
    """The end of meta and of each leaf."""
    at = data.rfind(b"\xa6leaves") + 7
    return list(struct.iter_unpack("<QI", data[at + 2 : at + 2 + data[at + 1]]))


def sealed(body):
    """A hostile file whose checksum is right."""
    body += msgpack.packb("crc32") + b"\x82\xa6leaves\xc4\x00\xa5whole\xce"
    return body + zlib.crc32(body).to_bytes(4, "big")


def with_state(raw):
    return sealed(b"\x83\xa4meta\x81\xa6format\x01\xa5state" + raw)


def test_the_parts_and_the_checksums(data):
    content = msgpack.unpackb(data)
    assert list(content) == ["meta", "state", "extra", "crc32"]
    assert content["meta"] == {"a": 1, "format": 1, "leaves": LEAVES}
    assert content["crc32"]["whole"] == zlib.crc32(data[:-4])
    assert data[-5] == 0xCE
    assert data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "big")
    assert len(marks(data)) == 1 + len(LEAVES)
    assert [crc for _, crc in marks(data)] == [
        zlib.crc32(data[:at]) for at, _ in marks(data)
    ]


def test_the_state_is_what_flax_writes(data):
    read = file_format.read(data, "run")
    assert serialization.msgpack_serialize(read.state, in_place=True) in data
    back = serialization.from_bytes({"state": make_state()}, data)["state"]
    np.testing.assert_array_equal(back.params["w"], np.arange(6.0).reshape(2, 3))


SHAPES = {
    "noncontiguous": np.arange(60000, dtype="f4").reshape(200, 300).T,
    "strided": np.arange(60000, dtype="i2")[::2],
    "empty": np.zeros((0, 3)),
    "scalar": np.zeros(()),
    "sixteen": np.zeros(1, "i1"),
    "bfloat16": np.arange(60000).reshape(200, 300).astype(jnp.bfloat16).T,
    "large": np.arange(200000, dtype="f8"),
}


@pytest.mark.parametrize("chunk", [2**30, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_any_layout_and_size(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    array, path = SHAPES[name], tmp_path / "run"
    params = {"a": array, "j": 1 + 2j, "f": 0.5, "i": -3, "t": True}
    checkpoint.save(path, {"params": params}, {})
    assert serialization.to_bytes({"params": params}) in path.read_bytes()
    read = checkpoint.load(path).state["params"]
    np.testing.assert_array_equal(read["a"], array)
    assert read["a"].dtype == array.dtype
    assert {k: read[k] for k in "jfit"} == {k: params[k] for k in "jfit"}


def test_every_flipped_bit_is_found_and_its_leaf_is_named(data):
    ends = [at for at, _ in marks(data)]
    for at in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[at] ^= 1 << bit
            with pytest.raises(CheckpointCorruptError) as caught:
                file_format.read(bytes(bad), "run")
            assert caught.value.path == "run"
            index = next((i for i, end in enumerate(ends) if at < end), None)
            if index is None:
                continue
            if index == 0:
                assert caught.value.leaf is None
                assert "its description" in str(caught.value)
            else:
                name = LEAVES[index - 1].partition(" ")[2]
                assert caught.value.leaf == name
                assert f"'run' is damaged: leaf {name} (" in str(caught.value)


@pytest.mark.parametrize("at", [-1, -20, -100])
def test_damaged_checksums_are_called_that(at, data):
    bad = bytearray(data)
    bad[at] ^= 4
    with pytest.raises(CheckpointCorruptError, match="checksums"):
        file_format.read(bytes(bad), "run")


def test_every_truncation_is_called_that(data):
    for length in range(1, len(data)):
        with pytest.raises(CheckpointCorruptError, match="cut off"):
            file_format.read(data[:length], "run")


def test_more_bytes_after_the_end(data):
    with pytest.raises(CheckpointCorruptError, match="3 bytes follow its end"):
        file_format.read(data + b"abc", "run")


@pytest.mark.parametrize("start", range(0, 600, 64))
def test_zeroed_pages(start, data):
    start = min(start, len(data) - 64)
    with pytest.raises(CheckpointCorruptError):
        file_format.read(data[:start] + bytes(64) + data[start + 64 :], "run")


def test_nothing_but_zeros():
    with pytest.raises(CheckpointError, match="all its bytes are zero"):
        file_format.read(bytes(4096), "run")


def test_a_newer_format(tmp_path):
    raw = sealed(b"\x83\xa4meta\x81\xa6format\x02\xa3new\x80")
    text = r"newer flaxfit \(format 2; this one reads 1\): pip install -U flaxfit"
    with pytest.raises(CheckpointError, match=text):
        file_format.read(raw, "run")
    (tmp_path / "run").write_bytes(raw)
    with pytest.raises(CheckpointError, match=text):
        checkpoint.read_meta(tmp_path / "run")


def array(shape=(2,), dtype="float32", raw=bytes(8), code=1):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb((shape, dtype, raw))))


def one(raw):
    return b"\x81\xa1a" + raw


def split(shape, chunks):
    return one(
        b"\x83\xb9__msgpack_chunked_array__\xc3\xa5shape"
        + msgpack.packb({str(i): n for i, n in enumerate(shape)})
        + b"\xa6chunks"
        + b"\x81\xa10"
        + array(raw=chunks)
    )


HOSTILE = {
    "list": (b"\x91\x01", "a list"),
    "bomb": (b"\xdd\x00\xa0\x00\x00" + b"\x90" * 10485760, "a list"),
    "deep": (b"\x81\xa0" * 1100 + b"\x80", "nested more than 64"),
    "huge map": (b"\xdf\xff\xff\xff\xff", "bytes end"),
    "huge bin": (one(b"\xc6\xff\xff\xff\xff"), "bytes end"),
    "huge ext": (one(b"\xc9\xff\xff\xff\xff\x01"), "bytes end"),
    "duplicate": (b"\x82\xa1a\x01\xa1a\x02", "the name 'a' twice"),
    "int key": (b"\x81\x01\x02", "a name of type int"),
    "negative": (one(array((-1,))), "an invalid shape"),
    "lying": (one(array((3,))), "of 8 bytes"),
    "overflow": (one(array((2**63, 2**63))), "of 8 bytes"),
    "too large": (one(array((2**62, 0), raw=b"")), "an array float32"),
    "65 dims": (one(array((1,) * 65, raw=bytes(4))), "without a shape"),
    "float shape": (one(array((2.0,))), "an invalid shape"),
    "object": (one(array(dtype="O")), "the dtype 'O'"),
    "structured": (one(array(dtype="i4,f4")), "the dtype 'i4,f4'"),
    "swapped": (one(array(dtype=">f4")), "the dtype '>f4'"),
    "string": (one(array(dtype="str32")), "the dtype"),
    "datetime": (one(array(dtype="datetime64[s]")), "the dtype"),
    "void": (one(array(dtype="V4")), "the dtype"),
    "no scalar": (one(array(code=3)), "a scalar that has a shape"),
    "unknown ext": (one(msgpack.packb(msgpack.ExtType(9, b""))), "extension type 9"),
    "timestamp": (one(b"\xd6\xff\x00\x00\x00\x00"), "extension type 255"),
    "complex": (one(msgpack.packb(msgpack.ExtType(2, b"\x92\x01\x02"))), "complex"),
    "reserved": (one(b"\xc1"), "unknown type"),
    "no text": (one(b"\xa1\xff"), "not UTF-8"),
    "split lies": (split((5,), bytes(8)), "do not fit its shape"),
    "split of none": (one(b"\x81\xb9__msgpack_chunked_array__\xc3"), "split array"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_states(name):
    raw, text = HOSTILE[name]
    for read in (
        lambda: file_format.read(with_state(raw), "run"),
        lambda: file_format.read_plain(raw, "run"),
    ):
        with pytest.raises(CheckpointError, match=text):
            read()


@pytest.mark.parametrize(
    "raw",
    [
        b"\xdd\x00\xa0\x00\x00" + b"\x90" * 10485760,
        b"\xdd\x00\xa0\x00\x00" + b"\x80" * 10485760,
        b"\xdd\x00\x04\x00\x00" + (b"\xdc\x00\x08" + b"\xa0" * 8) * 2**18,
        b"\xdb\x00\x80\x00\x04\xf0\x9f\x98\x80" + b"a" * 2**23,
    ],
    ids=["lists", "maps", "strings", "wide"],
)
def test_a_bomb_builds_little_more_than_its_size(raw):
    bomb = sealed(b"\x83\xa4meta\x81\xa1a" + raw + b"\xa5state\x80")
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            file_format.read(bomb, "run")
        assert tracemalloc.get_traced_memory()[1] < len(bomb) + 64 * 2**20
    finally:
        tracemalloc.stop()


def fuzz(data, trials):
    """Mutates a file, with its checksum put right or not; returns what was read."""
    rng = np.random.default_rng(0)
    read = 0
    for trial in range(trials):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(bad)))
            kind = rng.integers(4)
            if kind == 0:
                bad[at] = int(rng.integers(256))
            elif kind == 1:
                del bad[at : at + int(rng.integers(1, 20))]
            elif kind == 2:
                bad[at:at] = rng.bytes(int(rng.integers(1, 9)))
            else:
                bad[at] = int(rng.choice([0xC1, 0xC6, 0xC9, 0xDB, 0xDD, 0xDF, 0xFF]))
        if trial % 4:
            bad[-4:] = zlib.crc32(bad[:-4]).to_bytes(4, "big")
        for call in (file_format.read, file_format.read_plain):
            try:
                call(bytes(bad), "run")
                read += 1
            except CheckpointError:
                pass
    return read


def test_a_mutated_file_raises_nothing_else(data):
    assert fuzz(data, 3_000) < 3_000


@pytest.mark.slow
def test_a_mutated_file_raises_nothing_else_in_many_trials(data):
    assert fuzz(data, 100_000) < 100_000


def test_meta_at_the_front_is_enough(tmp_path):
    path = tmp_path / "run"
    meta = {"long": "x" * 200_000}
    checkpoint.save(path, make_state(), meta)
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.truncate(size - 100)
    assert checkpoint.read_meta(path)["long"] == meta["long"]
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointCorruptError, match="cut off"):
        checkpoint.read_meta(path)


def test_verify_is_as_strict_as_load(data, tmp_path):
    path = tmp_path / "run"
    path.write_bytes(data)
    assert checkpoint.verify(path) == file_format.read(data, "run").meta
    at = marks(data)[2][0] - 1
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(CheckpointCorruptError, match="leaf params/w") as caught:
        checkpoint.verify(path)
    assert caught.value.leaf == "params/w"

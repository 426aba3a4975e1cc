"""Files that are damaged by accident (F5) or made to do harm (F17)."""

import ast
import contextlib
import pickle
import random
import resource
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from content import STEPS, digest_of, state_of
from flax import serialization
from harness import Outcome, Tally, fresh

import flaxfit
from flaxfit import checkpoint

_PAGE = 4096
_SIZE = 2**17
_FORBIDDEN_IMPORTS = frozenset(
    "pickle cPickle marshal shelve yaml dill cloudpickle joblib runpy".split()
)
_FORBIDDEN_CALLS = frozenset({"eval", "exec", "__import__"})
_HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


# By accident


class _Damage(NamedTuple):
    """One damaged file.

    Attributes:
      label: what was done.
      data: its bytes.
      start: the first byte that may differ.
      end: the first byte from which on none differs.
      is_foreign: whether it is no damaged checkpoint, but no checkpoint at all.
    """

    label: str
    data: bytes
    start: int
    end: int
    is_foreign: bool = False


def f5_damage(trials: int, seed: int, folder: Path) -> Outcome:
    """Bits flipped, ends cut off, pages zeroed (5 : 1 : 1), and other files."""
    return fresh(_f5_damage, trials, seed, folder, timeout=3600)


def _f5_damage(trials: int, seed: int, folder: Path) -> Outcome:
    tally = Tally()
    for step in (1, 2):
        STEPS.save(folder, step, _SIZE)
    path = sorted(folder.glob("*.msgpack"))[-1]
    whole = path.read_bytes()
    spans = _spans(whole, checkpoint.load(path).state)
    assert len(spans) > 5
    for damage in _damages(whole, trials, random.Random(seed)):
        with tally.trial(damage.label):
            path.write_bytes(damage.data)
            _assert_noticed(path, damage, spans)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                assert STEPS.newest(folder) == 1
            assert [path.name in str(w.message) for w in warned] == [True]
    path.write_bytes(whole)
    _swapped(tally, folder)
    return tally.outcome()


def _damages(whole: bytes, trials: int, chance: random.Random) -> Iterator[_Damage]:
    others = trials // 7
    for _ in range(trials - 2 * others):
        bit = chance.randrange(len(whole) * 8)
        data, at = bytearray(whole), bit // 8
        data[at] ^= 1 << bit % 8
        yield _Damage(f"bit {bit} flipped", bytes(data), at, at + 1)
    for _ in range(others):
        at = chance.randrange(len(whole))
        yield _Damage(f"cut off at {at}", whole[:at], at, len(whole))
    for _ in range(others):
        at = chance.randrange(len(whole) // _PAGE + 1) * _PAGE
        data = whole[:at] + bytes(len(whole[at : at + _PAGE])) + whole[at + _PAGE :]
        end = min(len(whole), at + _PAGE)
        if data != whole:
            yield _Damage(f"page at {at} zeroed", data, at, end)
    yield _Damage("empty", b"", 0, len(whole), True)
    for label, data in (("HTML", _HTML), ("an LFS pointer", _LFS), ("text", b"hi\n")):
        yield _Damage(label, data, 0, len(whole), True)
    yield _Damage("all zeros", bytes(len(whole)), 0, len(whole), True)
    yield _Damage("too long", whole + b"\0", len(whole), len(whole) + 1)


def _assert_noticed(
    path: Path, damage: _Damage, spans: dict[str, tuple[int, int]]
) -> None:
    """Loading and verifying refuse it and name the leaf the damage lies in."""
    for read in (checkpoint.load, checkpoint.verify):
        try:
            read(path)
        except flaxfit.CheckpointCorruptError as err:
            assert str(err.path) == str(path), err.path
            assert path.name in str(err)
            _assert_leaf(err.leaf, damage, spans)
        except flaxfit.CheckpointError as err:
            assert damage.is_foreign, f"no CheckpointCorruptError: {err}"
        else:
            raise AssertionError(f"{read.__name__} noticed nothing")


def _assert_leaf(
    leaf: str | None, damage: _Damage, spans: dict[str, tuple[int, int]]
) -> None:
    touched = {n for n, (a, b) in spans.items() if damage.start < b and a < damage.end}
    inside = any(a <= damage.start and damage.end <= b for a, b in spans.values())
    if inside and not damage.label.startswith("cut"):
        assert {leaf} == touched, f"named {leaf}, damaged {touched}"
    else:
        # Near or between leaves; what is said must not be wrong.
        assert leaf is None or leaf in touched or not touched, (leaf, touched)


def _spans(whole: bytes, state: Any, path: str = "") -> dict[str, tuple[int, int]]:
    """Where in the file the data of each leaf lies, by its path."""
    found: dict[str, tuple[int, int]] = {}
    for name, node in state.items():
        place = f"{path}/{name}" if path else name
        if isinstance(node, dict):
            found |= _spans(whole, node, place)
        elif isinstance(node, np.ndarray) and node.nbytes >= 8:
            data = node.tobytes()
            assert whole.count(data) == 1
            start = whole.index(data)
            found[place] = (start, start + len(data))
    return found


def _swapped(tally: Tally, folder: Path) -> None:
    """The names of two good files are swapped: the step inside counts."""
    with tally.trial("swapped names"):
        old, new = sorted(folder.glob("*.msgpack"))[-2:]
        between = folder / "between"
        old.rename(between)
        new.rename(old)
        between.rename(new)
        assert STEPS.newest(folder) == 2
    with tally.trial("a copy of the older under the newer name"):
        new.unlink()
        new.write_bytes(old.read_bytes())
        assert STEPS.newest(folder) == 2


# On purpose


def f17_hostile(trials: int, seed: int, folder: Path) -> Outcome:
    """Pickles, bombs, tricks, and mutations whose checksums are right again."""
    tally = Tally()
    with tally.trial("the same file without harm in it is read"):
        path = folder / "hostile.msgpack"
        path.write_bytes(_file(msgpack.packb({"w": None})))
        assert checkpoint.load(path).state == {"w": None}
    for label, data in _hostile_files():
        with tally.trial(label):
            path = folder / "hostile.msgpack"
            path.write_bytes(data)
            fresh(_assert_harmless, path)
    source = Path(flaxfit.__file__).parent
    # Its pickles are no files: they are made and read by flaxfit's own processes.
    files = set(source.rglob("*.py")) - {source / "data" / "datasets" / "processes.py"}
    for file in sorted(files):
        with tally.trial(f"the source of {file.name}"):
            _assert_runs_no_data(file)
    tally.add(fresh(_mutate, trials, seed, folder, timeout=3600))
    return tally.outcome()


def _assert_harmless(path: Path) -> None:
    """It is refused, and cost no more than twice its size and 64 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(flaxfit.CheckpointError):
        checkpoint.verify(path)  # It looks at checksums, and these are right.
    try:
        checkpoint.load(path)
    except flaxfit.CheckpointError:
        pass
    else:
        raise AssertionError("it was read")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    allowed = 2 * path.stat().st_size + 2**26
    assert grown <= allowed, f"{grown / 2**20:.0f} of {allowed / 2**20:.0f} MiB"


def _file(state: bytes, meta: bytes | None = None, more: bytes = b"") -> bytes:
    """A file with these bytes in it, otherwise as it should be; its checksum is right.

    Nothing but the reader of the content can find anything wrong with it.
    """
    described = msgpack.packb({"format": 1, "leaves": []}) if meta is None else meta
    head = bytes([0x84 if more else 0x83]) + b"\xa4meta" + described
    sums = b"\xa5crc32\x82\xa6leaves\xc4\x00\xa5whole\xce"
    return _with_sum(head + b"\xa5state" + state + more + sums + bytes(4))


def _with_sum(data: bytes) -> bytes:
    return data[:-4] + struct.pack(">I", zlib.crc32(data[:-4]))


def _array(shape: Any, dtype: Any, data: bytes) -> bytes:
    """Flax's array, whatever it says of itself."""
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, dtype, data))))


class _Exploit:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return open, (self._path, "w")


def _hostile_files() -> Iterator[tuple[str, bytes]]:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        exploit = pickle.dumps(_Exploit("/tmp/flaxfit-was-here"), protocol)
        yield f"pickle {protocol}", exploit
        inside = msgpack.packb({"w": msgpack.ExtType(4, exploit)})
        yield f"pickle {protocol} as an extension", _file(inside)
    yield from _bombs()
    yield from _tricks()


def _bombs() -> Iterator[tuple[str, bytes]]:
    size = 10 * 2**20
    counted = struct.pack(">I", size)
    for name, byte in (("lists", b"\x90"), ("maps", b"\x80"), ("nils", b"\xc0")):
        yield f"10 MiB of empty {name}", _file(b"\xdd" + counted + byte * size)
        yield (
            f"the same in meta, {name}",
            _file(b"\x80", b"\xdd" + counted + byte * size),
        )
        yield f"10 MiB of {name} alone", byte * size
    many = b"".join(b"\xa6%06d\x80" % i for i in range(10**6))
    yield "a million maps", _file(b"\xdf" + struct.pack(">I", 10**6) + many)
    for kind in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"):
        yield f"4 G of {kind.hex()}", _file(kind + b"\xff" * 4)
        yield f"4 G of {kind.hex()} in meta", _file(b"\x80", kind + b"\xff" * 4)
    for depth in (100, 1100, 200_000):
        yield f"lists {depth} deep", _file(b"\x91" * depth + b"\xc0")
        yield f"maps {depth} deep", _file(b"\x81\xa1a" * depth + b"\xc0")
        yield f"meta {depth} deep", _file(b"\x80", b"\x81\xa1a" * depth + b"\xc0")
    big = msgpack.packb({"w": None})[:-1]
    for shape in ((2**40,), (2**31, 2**31), (0, 2**62, 2**62), (-1,), (2**63,)):
        yield f"an array of shape {shape}", _file(big + _array(shape, "float32", b"x"))
    parts = {str(i): np.zeros(0, np.int8) for i in range(3)}
    split = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2**40},
        "chunks": parts,
    }
    yield "a split array of 1 TiB", _file(serialization.msgpack_serialize({"w": split}))


def _tricks() -> Iterator[tuple[str, bytes]]:
    key = b"\xa1w"
    zero = _array((1,), "float32", bytes(4))
    yield "the same name twice", _file(b"\x82" + key + zero + key + zero)
    yield "meta twice", _file(b"\x80", more=b"\xa4meta\x80")
    yield "state twice", _file(b"\x80", more=b"\xa5state\x80")
    for dtype in (
        "O",
        "object",
        "S4",
        "V4",
        "U1",
        "i4,f4",
        "M8[s]",
        ">f4",
        "float32\0",
    ):
        yield f"dtype {dtype!r}", _file(b"\x81" + key + _array((1,), dtype, bytes(4)))
    for code in (0, 4, 42, 127):
        value = msgpack.packb(msgpack.ExtType(code, b"abcd"))
        yield f"extension {code}", _file(b"\x81" + key + value)
    yield "a time", _file(b"\x81" + key + b"\xd6\xff" + bytes(4))
    yield "a list for a state", _file(b"\x91" + zero)
    yield "a name that is a number", _file(b"\x81\x01" + zero)
    yield "a name that is no text", _file(b"\x81\xa2\xff\xfe" + zero)
    yield "data too short", _file(b"\x81" + key + _array((2,), "float32", bytes(4)))
    yield "data too long", _file(b"\x81" + key + _array((1,), "float32", bytes(8)))
    yield "something behind it", _file(b"\x80") + b"\x80"
    yield "no checksum", b"\x82\xa4meta\x80\xa5state\x80"


def _assert_runs_no_data(file: Path) -> None:
    """No import and no call in `file` could run what is read from another file."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in _FORBIDDEN_IMPORTS, name
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in _FORBIDDEN_CALLS, node.func.id
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle":
                    assert ast.unparse(keyword.value) == "False", node.lineno


def _mutate(trials: int, seed: int, folder: Path) -> Tally:
    """Mutations of a good file; three in four get a checksum that is right again."""
    tally, chance = Tally(), random.Random(seed)
    path = folder / "mutated.msgpack"
    names = {"../../escaped": np.ones(2, np.float32), "/etc/x": np.zeros(1, np.int8)}
    state = state_of(1, 256).replace(collections={"../..": names})
    checkpoint.save(path, state, {"step": 1, "history": {"loss": [0.5, None]}})
    whole = path.read_bytes()
    with tally.trial("names that look like paths"):
        assert digest_of(checkpoint.load(path).state) == digest_of(state)
        assert sorted(p.name for p in folder.iterdir()) == [
            "hostile.msgpack",
            "mutated.msgpack",
        ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(trials):
        data = _mutated(whole, chance)
        if chance.randrange(4) and len(data) > 4:
            data = _with_sum(data)
        path.write_bytes(data)
        with tally.trial(f"mutation {trial} of seed {seed}"):
            try:
                found = checkpoint.load(path)
                checkpoint.restore(found.state, state)
            except flaxfit.CheckpointError:
                pass
    with tally.trial("memory"):
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 <= 2**27, f"{grown / 1024:.0f} MiB"  # jax's own in it
    return tally


def _mutated(whole: bytes, chance: random.Random) -> bytes:
    """One to four changes: bytes, pieces dropped, doubled, moved, or grown numbers."""
    data = bytearray(whole)
    for _ in range(chance.randrange(1, 5)):
        # The head of the file has the most structure to break.
        at = min(chance.randrange(len(data)), chance.randrange(len(data)))
        size = chance.choice((1, 1, 2, 4, 16))
        kind = chance.randrange(5)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + size] = chance.randbytes(size)
        elif kind == 2 and len(data) > 64:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        else:
            marks = b"\x80\x8f\x90\x9f\xc0\xc1\xc4\xc6\xc7\xc9\xca\xcf\xd3\xdb\xdd\xdf"
            data[at : at + 1] = bytes([chance.choice(marks)]) + b"\xff" * (size - 1)
    return bytes(data)

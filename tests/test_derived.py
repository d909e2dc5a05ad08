"""The cache of derived arrays gives back what was put in, and never runs what somebody else put in."""

from __future__ import annotations

import os
import pickle
import sqlite3
from pathlib import Path

import diskcache
import numpy as np
import pytest

from backend.derived import Derived
from backend.errors import LayerscopeError


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def derived(tmp_path: Path) -> Derived:
    return Derived(tmp_path / "cache")


def plant(derived: Derived, **row: object) -> None:
    """Write a row into the cache's own database, as somebody with access to the file could."""
    full = {"key": "planted", "raw": 1, "store_time": 0.0, "access_time": 0.0, "access_count": 0, "size": 0, "mode": 1, **row}
    with sqlite3.connect(Path(derived._cache.directory) / "cache.db") as db:
        db.execute(f"INSERT OR REPLACE INTO Cache ({', '.join(full)}) VALUES ({', '.join('?' * len(full))})", tuple(full.values()))


@pytest.mark.parametrize("dtype", ["float32", "float16", ">f8", "uint8", "int32", "complex64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5), (300, 300)])
def test_an_array_comes_back_bit_for_bit(derived: Derived, dtype: str, shape: tuple[int, ...]):
    values = (np.random.default_rng(0).normal(size=shape) * 100).astype(dtype)
    derived.put_array(("lens", "abcdefgh", 3), values)
    back = derived.get_array(("lens", "abcdefgh", 3))
    assert back is not None and back.shape == values.shape and back.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, values)


def test_keys_that_differ_in_any_part_are_apart(derived: Derived):
    keys = [("a", 1), ("a", "1"), ("a", 1.5), ("a",), ("a", None), ("a", True)]
    for number, key in enumerate(keys):
        derived.put_json(key, {"number": number, "text": "‹s›\0"})
    assert [derived.get_json(key)["number"] for key in keys] == list(range(len(keys)))
    assert derived.get_json(("b",)) is None and derived.get_array(("b",)) is None and derived.get_bytes(("b",)) is None


def test_what_is_kept_stays_within_the_limit(tmp_path: Path):
    derived = Derived(tmp_path / "cache", size_limit=2 << 20)
    for number in range(20):
        derived.put_bytes(("tile", number), bytes(1 << 19))
    assert derived._cache.volume() < 4 << 20
    assert derived.get_bytes(("tile", 19)) is not None, "the newest is kept"


def test_the_folder_is_private(tmp_path: Path, derived: Derived):
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_objects_are_refused_on_the_way_in(derived: Derived):
    with pytest.raises(TypeError, match="Only arrays of numbers"):
        derived.put_array(("a",), np.array([{}], dtype=object))
    with pytest.raises(TypeError, match="must be bytes"):
        derived._cache.set("a", {"a": 1})
    with pytest.raises(TypeError, match="must be text"):
        derived._cache.set(("a", 1), b"")


def test_a_planted_pickle_is_refused_as_value_and_as_key(derived: Derived, tmp_path: Path):
    """CVE-2025-69872: diskcache unpickles a value whose row says mode 4, and a key whose row says raw 0."""
    marker = tmp_path / "pwned"
    payload = sqlite3.Binary(pickle.dumps(Payload(marker)))
    plant(derived, key='["a"]', mode=4, value=payload)
    with pytest.raises(LayerscopeError, match="holds a pickled value, which Layerscope never writes"):
        derived.get_array(("a",))
    (Path(derived._cache.directory) / "v.val").write_bytes(bytes(payload))
    plant(derived, key='["b"]', mode=4, filename="v.val")
    with pytest.raises(LayerscopeError, match="pickled value"):
        derived.get_bytes(("b",))
    plant(derived, key=payload, raw=0, value=sqlite3.Binary(b"x"))
    with pytest.raises(LayerscopeError, match="holds a pickled key"):
        list(derived._cache)
    assert not marker.exists()


def test_the_same_row_runs_in_diskcache_as_it_comes(derived: Derived, tmp_path: Path):
    """The negative control: without PlainDisk the planted row of the test above is executed, JSONDisk or not."""
    marker = tmp_path / "pwned"
    plant(derived, key="planted", mode=4, value=sqlite3.Binary(pickle.dumps(Payload(marker))))
    diskcache.Cache(derived._cache.directory, disk=diskcache.Disk).get("planted")
    assert marker.exists()


def test_a_planted_file_name_leads_nowhere(derived: Derived, tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"secret")
    for mode in (2, 3):
        for name in ("../secret", str(tmp_path / "secret"), "aa/bb/../../../secret"):
            plant(derived, key='["a"]', mode=mode, filename=name)
            with pytest.raises(LayerscopeError, match="file name"):
                derived.get_bytes(("a",))


@pytest.mark.parametrize(
    "data", [b"", b"{}\n", b'{"dtype":"|O","shape":[1]}\n12345678', b'{"dtype":"<f4","shape":[1099511627776]}\n1234', b'{"dtype":"<f4","shape":[3]}\n12345']
)
def test_a_damaged_array_is_one_sentence(derived: Derived, data: bytes):
    derived.put_bytes(("a",), data)
    with pytest.raises(LayerscopeError, match="A cached array cannot be read"):
        derived.get_array(("a",))

"""Claims about GGUF models in several files: any part opens the whole model, which is the unsplit one to the bit, and parts that do
not belong together are refused before llama.cpp sees them."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from backend.engines import OpenOptions
from backend.engines.gguf import GgufEngine
from backend.errors import LayerscopeError
from backend.estimate import estimate
from backend.experiments.capture import CaptureSpec, capture
from backend.files.gguf_format import read_file
from backend.files.gguf_header import model_info, read_header
from backend.files.gguf_split import MAX_PARTS, parts_of, whole_name
from backend.model_files import Shelf, describe, fingerprint
from backend.trace import open_trace
from backend.weights import open_weights
from tests.gguf_cases import I32, U16, U32, pair, string
from tests.test_hf_engine import capture as values_of
from tests.tiny_models import TinyModel

OPTIONS = OpenOptions(kv_cache="f32", n_threads=1, n_gpu_layers=0)
IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77]


def part_file(source: Path, names: Sequence[str], number: int, count: int, n_tensors: int, extra: Sequence[bytes] = ()) -> bytes:
    """The bytes of one part: the tensors `names` of `source`, with its metadata if it is the first."""
    reader, whole = gguf.GGUFReader(source), source.read_bytes()
    metadata = whole[24 : reader.tensors[0].field.offset] if number == 0 else b""
    n_keys = struct.unpack_from("<q", whole, 16)[0] if number == 0 else 0
    pairs = [pair("split.no", U16, number), pair("split.count", U16, count), pair("split.tensors.count", I32, n_tensors), *extra]
    tensors = [tensor for tensor in reader.tensors if tensor.name in names]
    declared, data = b"", b""
    for tensor in tensors:
        data += bytes(-len(data) % 32)
        ne = tensor.shape.tolist()
        declared += string(tensor.name) + struct.pack(f"<I{len(ne)}qIQ", len(ne), *ne, int(tensor.tensor_type), len(data))
        data += tensor.data.tobytes()
    head = struct.pack("<4sIqq", b"GGUF", 3, len(tensors), n_keys + len(pairs)) + metadata + b"".join(pairs) + declared
    return head + bytes(-len(head) % 32) + data


def split(source: Path, prefix: Path, count: int = 3, **first_tensors: int) -> list[Path]:
    """Write `source` in `count` parts beside `prefix`; `none_in_first`: the first part holds metadata alone, as llama-gguf-split can do."""
    names = list(read_file(source).tensors)
    shares = [names[i::count] for i in range(count)]
    if first_tensors:
        shares = [[], *(names[i :: count - 1] for i in range(count - 1))]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = [prefix.with_name(f"{prefix.name}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    for number, (path, share) in enumerate(zip(paths, shares, strict=True)):
        path.write_bytes(part_file(source, share, number, count, len(names)))
    return paths


@pytest.fixture
def parts(tiny_llama: TinyModel, tmp_path: Path) -> list[Path]:
    return split(tiny_llama.gguf, tmp_path / "models" / "tiny")


# The whole model from any part


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma2", "gpt2"])
def test_a_split_model_gives_the_values_and_weights_of_the_whole_one_to_the_bit(tiny_model: Callable[[str], TinyModel], kind: str, tmp_path: Path) -> None:
    source = tiny_model(kind).gguf
    parts = split(source, tmp_path / "tiny")
    whole = GgufEngine(source, OPTIONS)
    expected, logits = values_of(whole, IDS), whole.unembed(np.eye(3, 64, dtype=np.float32))
    for path in (parts[0], parts[2]):
        engine = GgufEngine(path, OPTIONS)
        values = values_of(engine, IDS)
        assert set(values) == set(expected) and all(np.array_equal(values[key], expected[key]) for key in expected)
        assert np.array_equal(engine.unembed(np.eye(3, 64, dtype=np.float32)), logits)
        engine.close()
    weights, other = open_weights(source), open_weights(parts[1])
    assert list(weights) == list(other) and set(weights.native_names) == set(other.native_names)
    assert all(np.array_equal(weights[name], other[name]) for name in weights)
    whole.close()


def test_sizes_count_all_parts_and_the_name_is_without_the_number(tiny_llama: TinyModel, parts: list[Path]) -> None:
    whole = describe(tiny_llama.gguf)
    for path in parts:
        info = describe(path)
        assert (info.name, info.source) == ("tiny", str(parts[0]))
        assert {**whole.to_json(), "name": "", "source": ""} == {**info.to_json(), "name": "", "source": ""}
        assert estimate(info, 10, available_bytes=1 << 40) == estimate(whole, 10, available_bytes=1 << 40)
    places = {tensor.path for tensor in read_header(parts[1]).tensors.values()}
    assert places == set(parts) and read_header(parts[1]).files == tuple(parts)


def test_a_first_part_without_tensors_and_parts_that_gguf_py_wrote_open_too(tiny_llama: TinyModel, tmp_path: Path) -> None:
    expected = values_of(engine := GgufEngine(tiny_llama.gguf, OPTIONS), IDS)
    engine.close()
    bare = split(tiny_llama.gguf, tmp_path / "bare", none_in_first=1)
    assert not read_file(bare[0]).tensors
    rewrite(tiny_llama.gguf, tmp_path / "theirs.gguf")
    theirs = sorted(tmp_path.glob("theirs-*.gguf"))
    assert len(theirs) > 2
    for path in (bare[1], theirs[1]):
        engine = GgufEngine(path, OPTIONS)
        values = values_of(engine, IDS)
        assert all(np.array_equal(values[key], expected[key]) for key in expected)
        engine.close()


def rewrite(source: Path, out: Path) -> None:
    """`source` again, in parts of at most 12 tensors, by gguf-py's own writer."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama", split_max_tensors=12)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_trace_of_a_split_model_reads_its_weights_from_the_right_part(parts: list[Path], tmp_path: Path) -> None:
    engine = GgufEngine(parts[1], OPTIONS)
    path = capture(engine, CaptureSpec(token_ids=tuple(IDS), precision="float32"), tmp_path / "traces")
    engine.close()
    with open_trace(path) as trace:
        assert all(check["ok"] for check in trace.integrity.values()) and trace.integrity["unembed"]["checked"]
        b_o = open_weights(trace.info.source)["blocks.1.attn.b_O"]
        assert np.allclose(trace["result", 1].sum(axis=1) + b_o, trace["attn_out", 1], atol=1e-4)


# The shelf


def test_the_shelf_lists_a_split_model_once_without_its_number(parts: list[Path], tiny_mistral: TinyModel, tmp_path: Path) -> None:
    models = tmp_path / "models"
    split(tiny_mistral.gguf, models / "sub" / "other", 2)
    shelf = Shelf([models], tmp_path / "v", None, ())
    assert [entry.name for entry in shelf.entries()] == ["sub/other.gguf", "tiny.gguf"]
    assert not any(entry.error for entry in shelf.entries())
    for source in ("tiny.gguf", *map(str, parts)):
        entry = shelf.resolve(source)
        assert (entry.name, entry.path) == ("tiny.gguf", parts[0]) and entry.info is not None and entry.info.name == "tiny.gguf"
    assert Shelf([], tmp_path / "v", None, ()).resolve(str(parts[1]), confined=False).name == "tiny"


def test_a_split_model_beside_a_whole_one_of_its_name_hides_neither(parts: list[Path], tiny_mistral: TinyModel, tmp_path: Path) -> None:
    shutil.copy(tiny_mistral.gguf, parts[0].with_name("tiny.gguf"))
    entries = Shelf([tmp_path / "models"], tmp_path / "v", None, ()).entries()
    assert {entry.name: entry.path.name for entry in entries} == {"tiny.gguf": parts[0].name, "models/tiny.gguf": "tiny.gguf"}


def test_parts_in_a_folder_of_the_hugging_face_cache_are_one_model(tiny_llama: TinyModel, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--big" / "snapshots" / "abc"
    split(tiny_llama.gguf, snapshot / "Q8_0" / "big")
    shutil.copy(tiny_llama.gguf, snapshot / "small.gguf")
    shelf = Shelf([], tmp_path / "v", tmp_path / "hub", ())
    assert [entry.name for entry in shelf.entries()] == ["org/big/Q8_0/big.gguf", "org/big/small.gguf"]
    assert shelf.resolve("org/big/Q8_0/big.gguf").info is not None


def test_a_missing_part_is_listed_with_its_name_and_noticed_when_it_comes(parts: list[Path], tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "models"], tmp_path / "v", None, ())
    for lost in (parts[0], parts[2]):
        data = lost.read_bytes()
        before = fingerprint(parts[1])
        lost.unlink()
        assert fingerprint(parts[1]) != before
        (entry,) = shelf.entries()
        assert entry.name == "tiny.gguf" and entry.error is not None and f"{lost.name} is missing" in entry.error
        with pytest.raises(LayerscopeError, match=f"{lost.name} is missing"):
            GgufEngine(parts[1], OPTIONS)
        lost.write_bytes(data)
        assert shelf.entries()[0].info is not None
    for lost in parts[1:]:
        lost.unlink()
    with pytest.raises(LayerscopeError, match=f"is part 1 of 3, and {parts[1].name} and 1 more are missing from its folder"):
        describe(parts[0])


def test_a_part_that_leads_outside_the_model_folders_is_refused(parts: list[Path], tmp_path: Path) -> None:
    outside = tmp_path / parts[1].name
    parts[1].rename(outside)
    parts[1].symlink_to(outside)
    with pytest.raises(LayerscopeError, match="lies outside the configured model folders"):
        Shelf([tmp_path / "models"], tmp_path / "v", None, ()).resolve("tiny.gguf")


# Parts that do not belong together


def rewritten(number: int, count: int = 3, more: int = 0, total: int | None = None, extra: Sequence[bytes] = ()) -> Callable[[Path, list[Path]], None]:
    """Write part `number` (from 0) anew, saying something else of itself; `more`: with the next part's first tensors too."""

    def spoil(source: Path, parts: list[Path]) -> None:
        names = list(read_file(parts[number]).tensors) + list(read_file(parts[(number + 1) % 3]).tensors)[:more]
        n_tensors = len(read_file(source).tensors) if total is None else total
        parts[number].write_bytes(part_file(source, names, number, count, n_tensors, extra))

    return spoil


def lie_together(source: Path, parts: list[Path]) -> None:
    for number in range(3):
        rewritten(number, total=7)(source, parts)


def swapped(source: Path, parts: list[Path]) -> None:
    first, second = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(second)
    parts[2].write_bytes(first)


def cut(source: Path, parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-100])


def whole_for_part(source: Path, parts: list[Path]) -> None:
    shutil.copy(source, parts[1])


def wrong_type(key: str, kind: int) -> Callable[[Path, list[Path]], None]:
    def spoil(source: Path, parts: list[Path]) -> None:
        data = parts[1].read_bytes()
        at = data.index(string(key)) + len(string(key))
        parts[1].write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (rewritten(1, count=2), r"tiny-00002-of-00003.gguf has split.count = 2, and by its name it must be 3"),
        (rewritten(0, count=4), r"tiny-00001-of-00003.gguf is part 1 of 4 by its keys, and by its name part 1 of 3"),
        (lie_together, r"tiny-00001-of-00003.gguf has split.tensors.count = 7, and its 3 parts hold 42 tensors"),
        (rewritten(2, total=7), r"tiny-00003-of-00003.gguf belongs to another model .* they differ in split.tensors.count"),
        (rewritten(1, more=1), r"The tensor '.+' stands both in tiny-00002-of-00003.gguf and in tiny-00003-of-00003.gguf"),
        (rewritten(1, extra=[pair("llama.block_count", U32, 7)]), r"00002-of-00003.gguf belongs to another model .* they differ in llama.block_count"),
        (swapped, r"tiny-00002-of-00003.gguf has split.no = 2, and by its name it must be 1"),
        (cut, r"tiny-00003-of-00003.gguf is truncated: tensor"),
        (whole_for_part, r"tiny-00002-of-00003.gguf has split.no = None, and by its name it must be 1"),
        (wrong_type("split.no", U32), r"tiny-00002-of-00003.gguf is not a valid GGUF file: split.no has type 4, it must be uint16"),
        (wrong_type("split.tensors.count", U32), r"split.tensors.count has type 4, it must be int32"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_in_one_sentence(tiny_llama: TinyModel, parts: list[Path], spoil: Callable[[Path, list[Path]], None], sentence: str) -> None:
    spoil(tiny_llama.gguf, parts)
    with pytest.raises(LayerscopeError, match=sentence) as refusal:
        describe(parts[0])
    assert "\n" not in str(refusal.value)


def test_parts_of_two_models_are_refused(tiny_llama: TinyModel, tiny_mistral: TinyModel, parts: list[Path], tmp_path: Path) -> None:
    """Another model's part brings other tensors: too many, too few, or those of the first again."""
    shutil.copy(split(tiny_mistral.gguf, tmp_path / "other")[1], parts[1])
    with pytest.raises(LayerscopeError, match=r"belongs to another model|stands both in|parts hold"):
        describe(parts[0])


def test_a_part_under_another_name_says_what_names_are_needed(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("renamed.gguf"))
    with pytest.raises(LayerscopeError, match=r"renamed.gguf is part 1 of 3 by its keys, and its name does not end in -00001-of-00002.gguf or the like"):
        describe(renamed)


def test_a_whole_model_under_the_name_of_a_part_is_refused_and_one_part_of_one_is_a_model(tiny_llama: TinyModel, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_llama.gguf, tmp_path / "x-00001-of-00002.gguf"))
    with pytest.raises(LayerscopeError, match=r"a whole model by its keys .*, and by its name part 1 of 2"):
        describe(path)
    only = Path(shutil.copy(tiny_llama.gguf, tmp_path / "x-00001-of-00001.gguf"))
    assert describe(only).name == "x-00001-of-00001"
    (alone,) = split(tiny_llama.gguf, tmp_path / "alone", 1)
    assert model_info(alone, read_header(alone)).n_layers == 3
    engine = GgufEngine(alone, OPTIONS)
    assert engine.info.n_layers == 3
    engine.close()


@pytest.mark.parametrize(
    "name", ["a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-1-of-3.gguf", "a-00001-of-00002.GGUF", f"a-00001-of-{MAX_PARTS + 1:05}.gguf", "-00001-of-00002.gguf"]
)
def test_a_name_that_llama_cpp_would_not_take_for_a_part_is_none(name: str) -> None:
    assert parts_of(Path(name)) == (Path(name),) and whole_name(Path(name)) == name


def test_too_many_parts_are_refused_before_any_is_looked_for(tiny_llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "a-00001-of-60000.gguf"
    path.write_bytes(part_file(tiny_llama.gguf, ["token_embd.weight"], 0, 60_000, 31))
    with pytest.raises(LayerscopeError, match=r"split.count = 60,000, and the limit is 1,000 parts"):
        describe(path)


def test_what_is_computed_of_a_model_is_kept_under_a_name_that_changes_with_its_file(tmp_path: Path) -> None:
    from backend.model_files import identity

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    first = identity(file)
    assert identity(file) == first
    file.write_bytes(b"GGUF" + bytes(61))
    assert identity(file) != first
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes())
    assert identity(other) != identity(file)

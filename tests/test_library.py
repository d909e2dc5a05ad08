"""The shelf finds models and refuses what it must in one sentence; the index of traces is the truth about what is listed."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from backend.errors import LayerscopeError
from backend.library import OPEN_TRACES, Library
from backend.model_files import FOLDER, HUB, PRESET, Preset, Prompt, Shelf, describe, read_presets
from tests.small_traces import write_trace
from tests.tiny_models import TinyModel

KEY = b"k" * 32


def save_header_only(folder: Path, **changes: object) -> Path:
    """A Llama folder with an embedding and no other weights: enough for everything that reads headers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, **changes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [10, 8], "data_offsets": [0, 320]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(320))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def shelf(tmp_path: Path, models: Path) -> Shelf:
    save_header_only(models / "alpha")
    save_header_only(models / "group" / "beta")
    hub = tmp_path / "hub" / "models--org--gamma"
    save_header_only(hub / "snapshots" / "old")
    save_header_only(hub / "snapshots" / "new", num_hidden_layers=3)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("new")
    presets = (Preset("demo", "A preset.", models / "alpha", prompts=(Prompt("Capital", "The capital of France is"),)),
               Preset("demo-q4_k_m", variant_of="demo", quantization="Q4_K_M"))  # fmt: skip
    return Shelf([models], tmp_path / "data" / "models", tmp_path / "hub", presets)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "data", Shelf([], tmp_path / "none", None, ()), KEY)


# -- finding models ----------------------------------------------------------------------------------------------------------


def test_models_come_from_presets_folders_and_the_cache_each_once(shelf: Shelf):
    found = {entry.name: entry for entry in shelf.entries()}
    assert {name: entry.origin for name, entry in found.items()} == {"demo": PRESET, "demo-q4_k_m": PRESET, "group/beta": FOLDER, "org/gamma": HUB}
    assert found["demo"].prompts[0].text == "The capital of France is"
    gamma = found["org/gamma"]
    assert gamma.info is not None and gamma.info.n_layers == 3, "refs/main names the snapshot"
    assert all(entry.info is not None and entry.info.name == name for name, entry in found.items())


def test_a_variant_is_described_before_it_is_made(shelf: Shelf):
    entry = shelf.resolve("demo-q4_k_m")
    assert entry.made_on_first_use and entry.kind == "gguf" and not entry.path.exists()
    assert entry.info is not None
    assert (entry.info.engine, entry.info.quantization, entry.info.d_model) == ("gguf", "Q4_K_M", 8)


def test_the_committed_presets_are_listed_without_making_anything(tmp_path: Path):
    shelf = Shelf([], tmp_path / "variants", None, read_presets())
    assert [entry.name for entry in shelf.entries()] == [preset.name for preset in shelf.presets]
    assert not (tmp_path / "variants").exists()


def test_a_real_gguf_file_is_found_by_name_and_by_path(tiny_llama: TinyModel, tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(tiny_llama.gguf, models / "tiny.gguf")
    shelf = Shelf([models], tmp_path / "v", None, ())
    entry = shelf.resolve("tiny.gguf")
    assert entry.info is not None and (entry.info.n_layers, entry.info.n_kv_heads, entry.info.engine) == (3, 2, "gguf")
    assert shelf.resolve(str(models / "tiny.gguf")).path == entry.path == shelf.path_for("tiny.gguf")


def test_a_header_is_read_again_only_when_the_file_changed(shelf: Shelf, models: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    real = describe
    monkeypatch.setattr("backend.model_files.describe", lambda path: read.append(path) or real(path))
    shelf.entries()
    first = len(read)
    shelf.entries()
    assert first == 3 and len(read) == first
    save_header_only(models / "alpha", num_hidden_layers=4)
    os.utime(models / "alpha" / "config.json", ns=(1, 1))
    alpha = next(entry for entry in shelf.entries() if entry.name == "demo")
    assert alpha.info is not None and alpha.info.n_layers == 4


def test_a_broken_model_is_listed_with_its_reason_and_hides_no_other(shelf: Shelf, models: Path, tiny_llama: TinyModel):
    (models / "short.gguf").write_bytes(tiny_llama.gguf.read_bytes()[:-1000])
    (models / "zero.gguf").write_bytes(b"")
    found = {entry.name: entry for entry in shelf.entries()}
    for name in ("short.gguf", "zero.gguf"):
        assert found[name].info is None and name in (found[name].error or "")
        with pytest.raises(LayerscopeError):
            shelf.resolve(name)
    assert found["demo"].info is not None


# -- refusals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p / "nothing.gguf", "There is no model file or folder at "),
        (lambda p: touch(p / "model.bin"), "holds pickled weights, which can run code"),
        (lambda p: touch(p / "model.safetensors"), "name the folder that holds it"),
        (lambda p: touch(p / "notes.txt"), "notes.txt is no model: Layerscope opens .gguf files and folders"),
        (lambda p: touch(p / "empty" / "x").parent, "no config.json"),
        (lambda p: pickled(p / "pickled"), "only pickled weights .pytorch_model.bin., which can run code"),
        (lambda p: save_header_only(p / "strange", model_type="mystery"), "mystery"),
        (lambda p: save_header_only(p / "remote", auto_map={"AutoModel": "code.py"}), "asks to run code of its own"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(tmp_path: Path, make, sentence: str):
    with pytest.raises(LayerscopeError, match=sentence) as caught:
        describe(make(tmp_path))
    assert "\n" not in str(caught.value)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def pickled(folder: Path) -> Path:
    save_header_only(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def test_a_browser_reaches_nothing_outside_the_model_folders(shelf: Shelf, models: Path, tmp_path: Path):
    outside = save_header_only(tmp_path / "outside")
    (models / "link").symlink_to(outside)
    (models / "link.gguf").symlink_to(touch(tmp_path / "secret.gguf"))
    inner = save_header_only(models / "inner")
    (inner / "model.safetensors").unlink()
    (inner / "model.safetensors").symlink_to(outside / "model.safetensors")
    names = (outside, models / ".." / "outside", models / "link", "link", "link.gguf", "inner", "../outside", "/etc/passwd", "~/x", f"{models}-evil")
    for name in names:
        with pytest.raises(LayerscopeError, match="lies outside the configured model folders"):
            shelf.resolve(str(name))
    for name in ("", "a\0b", "x" * 5000):
        with pytest.raises(LayerscopeError, match="is no model's name"):
            shelf.resolve(name)
    with pytest.raises(LayerscopeError, match="There is no model"):
        shelf.resolve(str(models / "nothing"))


def test_the_command_line_may_name_any_path(shelf: Shelf, tmp_path: Path):
    outside = save_header_only(tmp_path / "outside")
    assert shelf.path_for(str(outside)) == outside
    assert shelf.resolve(str(outside), confined=False).name == "outside"


def test_a_snapshot_of_links_into_the_cache_is_within_bounds(shelf: Shelf, tmp_path: Path):
    """The Hugging Face cache keeps blobs apart and snapshots as links to them."""
    repository = tmp_path / "hub" / "models--org--gamma"
    (repository / "blobs").mkdir()
    weights = repository / "snapshots" / "new" / "model.safetensors"
    weights.rename(repository / "blobs" / "abc")
    weights.symlink_to("../../blobs/abc")
    assert shelf.resolve("org/gamma").error is None


def test_damaged_presets_are_named(tmp_path: Path):
    file = tmp_path / "presets.toml"
    for text, sentence in (("[[preset]\n", "are damaged"), ('[[preset]]\nnam = "x"\n', "are damaged"), ('[[preset]]\nname = "x"\nvariant_of = "y"\n', "variant of 'y'")):
        file.write_text(text)
        with pytest.raises(LayerscopeError, match=sentence):
            read_presets(file)


# -- traces ------------------------------------------------------------------------------------------------------------------------


def test_a_trace_is_listed_when_it_was_added_and_not_before(library: Library):
    path = write_trace(library.traces_dir, "The capital of France is", "geography", ("capital", "première"))
    assert library.traces() == [] and library.count_traces() == 0
    added = library.add(path)
    assert library.add(path) == added, "adding twice changes nothing"
    assert library.traces() == [added]
    assert (added.prompt, added.category, added.tags, added.n_tokens, added.n_prompt) == ("The capital of France is", "geography", ["capital", "première"], 4, 3)
    assert added.sites == ["embed", "resid_post"] and added.integrity_ok is True and added.n_bytes == path.stat().st_size
    assert library.past_runs("toy") == [(4, 2.0)]


def test_search_finds_text_as_it_is_written(library: Library):
    for prompt, category, tags, name in (("100% sure", "sums", ("a_b",), "toy"), ("100 sure", "sums", ("axb",), "toy"), ("Hello", "greeting", (), "Toy-2")):
        library.add(write_trace(library.traces_dir, prompt, category, tags, name=name))
    assert [t.prompt for t in library.traces(search="100%")] == ["100% sure"], "a percent sign is no wildcard"
    assert [t.prompt for t in library.traces(search="a_b")] == ["100% sure"], "an underscore is none either"
    assert {t.prompt for t in library.traces(category="sums")} == {"100% sure", "100 sure"}
    assert [t.prompt for t in library.traces(search="toy-2")] == ["Hello"], "capitals do not matter"
    assert library.count_traces(search="sure", model="toy") == 2 and library.count_traces(model="Toy-2") == 1
    assert library.categories() == ["greeting", "sums"] and library.trace_models() == ["Toy-2", "toy"]
    assert library.traces(search="' OR 1=1 --") == []
    pages = [library.traces(limit=2), library.traces(limit=2, offset=2)]
    assert [len(page) for page in pages] == [2, 1] and len({t.id for page in pages for t in page}) == 3


@pytest.mark.parametrize("trace_id", ["../../etc/passwd", "..%2fx", "short", "x" * 65, "ABCDEFGH", "abcdefg\n", "abcdefgh\0", "", "/abcdefgh", "abcd efgh"])
def test_an_id_is_checked_before_any_path_is_formed(library: Library, trace_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Library, "_file", lambda *_: pytest.fail("a path was formed"))
    for call in (library.open, library.path_of, library.delete, library.summary):
        with pytest.raises(LayerscopeError, match="is not a trace id"):
            call(trace_id)


def test_a_file_that_is_not_in_the_index_is_not_opened(library: Library):
    path = write_trace(library.traces_dir)
    with pytest.raises(LayerscopeError, match="There is no trace"):
        library.open(path.stem)


def test_only_traces_of_the_own_folder_are_added(library: Library, tmp_path: Path):
    path = write_trace(tmp_path / "elsewhere")
    with pytest.raises(LayerscopeError, match="is not in the traces folder"):
        library.add(path)
    renamed = library.traces_dir / "anothername.h5"
    shutil.copy(path, renamed)
    with pytest.raises(LayerscopeError, match="is named after its id"):
        library.add(renamed)


def test_traces_stay_open_and_the_oldest_can_still_be_read_after_it_left_the_cache(library: Library):
    ids = [library.add(write_trace(library.traces_dir)).id for _ in range(OPEN_TRACES + 1)]
    first = library.open(ids[0])
    assert library.open(ids[0]) is first
    for trace_id in ids[1:]:
        library.open(trace_id)
    assert len(library._open) == OPEN_TRACES and ids[0] not in library._open
    assert first["resid_post", 1].shape == (4, 8), "a reader that still has it is not cut off"


def test_a_deleted_trace_leaves_nothing(library: Library):
    path = write_trace(library.traces_dir)
    library.add(path)
    library.open(path.stem)
    library.delete(path.stem)
    assert list(library.traces_dir.iterdir()) == [] and library.count_traces() == 0
    with pytest.raises(LayerscopeError, match="There is no trace"):
        library.open(path.stem)


def test_one_flipped_bit_is_noticed(library: Library):
    trace_id = library.add(write_trace(library.traces_dir)).id
    assert library.is_intact(trace_id)
    data = bytearray(library.path_of(trace_id).read_bytes())
    data[len(data) // 2] ^= 1
    library.path_of(trace_id).write_bytes(data)
    assert not library.is_intact(trace_id)


def test_a_lost_index_is_rebuilt_from_what_was_written_here_and_from_nothing_else(library: Library, tmp_path: Path):
    ours, changed, foreign = (write_trace(library.traces_dir, name) for name in ("ours", "changed", "foreign"))
    library.add(ours)
    library.add(changed)
    for file in (tmp_path / "data").glob("library.sqlite*"):
        file.unlink()
    with open(changed, "ab") as file:
        file.write(b"x")
    (library.traces_dir / f"{foreign.stem}.seal").write_text("0" * 64)
    again = Library(tmp_path / "data", library.shelf, KEY)
    assert again.traces() == []
    assert again.rescan() == [ours.stem]
    assert [t.prompt for t in again.traces()] == ["ours"]


def test_a_rescan_drops_rows_without_a_file_and_files_of_dead_writers(library: Library):
    gone, kept = (library.add(write_trace(library.traces_dir)) for _ in range(2))
    gone.path.unlink()
    stale = library.traces_dir / "abcdefgh.h5.part"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    library.rescan()
    assert [t.id for t in library.traces()] == [kept.id]
    assert not stale.exists()


def test_a_damaged_index_says_what_to_do(library: Library, tmp_path: Path):
    for file in (tmp_path / "data").glob("library.sqlite*"):
        file.unlink()
    (tmp_path / "data" / "library.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(LayerscopeError, match="delete it and restart"):
        library.traces()

"""Weights changed in a loaded model: the model runs with them, in both engines alike, and is afterwards what it was to the bit.

The oracles: PyTorch for llama.cpp and the other way round; gguf's own dequantization of the stored bytes; files written with the change.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend.engines import Engine, OpenOptions, open_engine
from backend.engines.ggml import can_dequantize, dequantize, quantize, read_bytes
from backend.engines.ggml_codes import code_bits, codes_of
from backend.engines.gguf import GgufEngine
from backend.engines.gguf_weight_edits import _spans
from backend.engines.hf import HfEngine
from backend.engines.weight_edits import WeightChange
from backend.errors import LayerscopeError
from backend.files.ggml_types import GGML_TYPES
from backend.weights import open_weights
from tests.phimoe import as_in_llama_cpp
from tests.test_engines_agree import IDS, NMSE, nmse
from tests.test_hf_engine import logits_with
from tests.tiny_models import TinyModel, save_tiny

OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1, editable_weights=True)
# rows reordered, fused, transposed, 1 + w, experts stacked, interleaved and apart, latent attention, norms of each head
KINDS = ("llama", "mixtral", "gemma2", "phi3", "gpt2", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3", "stablelm, parallel")


def drawn(engine: Engine, name: str, n: int = 6, seed: int = 0) -> NDArray[np.int64]:
    """Places in a weight that runs over IDS meet: of embeddings only rows that are looked up."""
    shape = engine.weight(name).shape
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    if name in ("embed.W_E", "pos_embed.W_pos"):
        rows = np.array(IDS[:n] if name == "embed.W_E" else range(n))
        return np.unique(rows) * shape[1] + 3
    return np.sort(rng.choice(size, min(n, size), replace=False)).astype(np.int64)


def stored_bytes(engine: Engine) -> dict[str, bytes]:
    """Every byte of every weight in the model's memory."""
    if isinstance(engine, HfEngine):
        return {name: value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, value in engine._model.state_dict().items()}
    assert isinstance(engine, GgufEngine)
    with engine.perturbed([]):
        pass
    weights = engine._weights
    found = {}
    for name in weights.native_names:
        for i, tensor in enumerate(engine._stored.of(weights.stored(name))):
            found[f"{name}/{i}"] = read_bytes(tensor, 0, weights.stored(name).nbytes).tobytes()
    return found


def refusal(engine: Engine, *changes: WeightChange) -> str:
    """What is said, and nothing is changed by it."""
    before = stored_bytes(engine) if not isinstance(engine, GgufEngine) or engine._options.editable_weights else {}
    with pytest.raises(LayerscopeError) as error, engine.perturbed(changes):
        raise AssertionError("the block must not be entered")
    assert not before or stored_bytes(engine) == before
    return str(error.value)


# -- the map from canonical places to stored ones -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_at_a_canonical_place_is_the_stored_one_at_its_stored_place(tiny_model: Callable[[str], TinyModel], kind: str) -> None:
    tiny = tiny_model(kind)
    for path in (tiny.hf, tiny.gguf):
        weights = open_weights(path)
        for name in weights:
            weight, values = weights.lazy(name), weights[name].reshape(-1)
            stored = np.concatenate([weights[native].reshape(-1) for native in weight.native])
            places = weight.places(np.arange(values.size))
            assert np.array_equal(stored[places] + np.float32(weight.plus), values), (path.name, name)
            assert len(np.unique(places)) == len(places), "two entries are never one"


# -- both engines -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[tuple[Engine, Engine]]:
    tiny = tiny_model(request.param)
    engines = open_engine(tiny.hf, OPTIONS), open_engine(tiny.gguf, OPTIONS)
    as_in_llama_cpp(engines[0])
    yield engines
    for engine in engines:
        engine.close()


def test_the_same_change_of_every_weight_gives_the_same_logits_in_both_engines(pair: tuple[Engine, Engine]) -> None:
    """A wrong row, head, section or expert in either map is another model: what is set is large enough to be seen."""
    plain, stored = [logits_with(engine, ids=IDS) for engine in pair], [stored_bytes(engine) for engine in pair]
    for name in open_weights(pair[1]._files[0]):  # type: ignore[attr-defined]
        at = drawn(pair[1], name)
        values = (np.random.default_rng(1).uniform(5, 9, len(at)) * np.where(np.arange(len(at)) % 2, 1, -1)).astype(np.float32)
        for change in (WeightChange(name, at, values), WeightChange(name, at, np.zeros(len(at), np.float32))):
            got = []
            for engine in pair:
                was = engine.weight(name).reshape(-1)[at]
                with engine.perturbed([change]) as (written,):
                    assert np.array_equal(written.before, was) and np.array_equal(written.wanted, change.values) and written.n_others == 0
                    assert np.allclose(written.after, change.values, rtol=0, atol=1e-6)
                    got.append(logits_with(engine, ids=IDS))
            assert nmse(got[1], got[0]) < NMSE, name
            # the same bias in every key adds the same to all scores of a query; rotated it does not
            without_effect = name.endswith("b_K") and pair[0].info.architecture == "gpt2"
            assert change.values is not values or without_effect or nmse(got[0], plain[0]) > 50 * NMSE, name
    assert [stored_bytes(engine) for engine in pair] == stored
    assert all(np.array_equal(logits_with(engine, ids=IDS), before) for engine, before in zip(pair, plain, strict=True))


def test_canonical_row_r_of_a_reordered_matrix_is_row_r_and_no_other(tiny_llama: TinyModel) -> None:
    """llama.cpp keeps the rows of W_Q and W_K in another order; the neighbouring row is another model by far."""
    hf, gguf_engine = open_engine(tiny_llama.hf, OPTIONS), open_engine(tiny_llama.gguf, OPTIONS)
    assert isinstance(gguf_engine, GgufEngine)
    for name, row in (("blocks.0.attn.W_Q", 21), ("blocks.1.attn.W_K", 9)):
        n = hf.weight(name).shape[1]

        def logits(engine: Engine, at_row: int, name: str = name, n: int = n) -> NDArray[np.float32]:
            with engine.perturbed([WeightChange(name, np.arange(n) + n * at_row, np.linspace(-4, 4, n, dtype=np.float32))]):
                return logits_with(engine, ids=IDS)

        assert gguf_engine._weights.lazy(name).places(np.array([row * n]))[0] != row * n
        assert nmse(logits(gguf_engine, row), logits(hf, row)) < NMSE
        assert nmse(logits(gguf_engine, row + 1), logits(hf, row)) > 100 * NMSE
    hf.close(), gguf_engine.close()


# -- put back -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["hf", "gguf"])
def llama(request: pytest.FixtureRequest, tiny_llama: TinyModel) -> Iterator[Engine]:
    engine = open_engine(tiny_llama.hf if request.param == "hf" else tiny_llama.gguf, OPTIONS)
    yield engine
    engine.close()


def test_everything_is_put_back_after_an_exception_in_the_block(llama: Engine) -> None:
    plain, before = logits_with(llama, ids=IDS), stored_bytes(llama)
    change = WeightChange("blocks.0.mlp.W_in", np.arange(5), np.full(5, 3.0, np.float32))
    with pytest.raises(ZeroDivisionError), llama.perturbed([change]):
        assert stored_bytes(llama) != before
        raise ZeroDivisionError
    assert stored_bytes(llama) == before and np.array_equal(logits_with(llama, ids=IDS), plain)


def test_blocks_inside_blocks_are_undone_in_reverse(llama: Engine) -> None:
    name, at = "blocks.1.attn.W_O", np.array([7, 8, 70])
    first, second = (WeightChange(name, at, np.full(3, value, np.float32)) for value in (1.0, 2.0))
    untouched = stored_bytes(llama)
    with llama.perturbed([first]) as (outer,):
        between = stored_bytes(llama)
        with llama.perturbed([second]) as (inner,):
            assert np.array_equal(inner.before, outer.after) and stored_bytes(llama) not in (between, untouched)
        assert stored_bytes(llama) == between != untouched
    assert stored_bytes(llama) == untouched


def test_two_sign_flips_of_floats_are_none(llama: Engine) -> None:
    """Zeros too, whose sign no comparison sees."""
    name, at, before = "blocks.1.mlp.W_gate", np.arange(200), stored_bytes(llama)
    values = np.where(at % 3, llama.weight(name).reshape(-1)[at], np.float32(0))
    with llama.perturbed([WeightChange(name, at, values)]) as (start,):
        started = stored_bytes(llama)
        with llama.perturbed([WeightChange(name, at, -start.after)]) as (once,), llama.perturbed([WeightChange(name, at, -once.after)]):
            assert stored_bytes(llama) == started != before
    assert stored_bytes(llama) == before


def test_several_changes_hold_together_and_are_reported_in_order(llama: Engine) -> None:
    asked = [WeightChange("blocks.2.mlp.W_out", np.array([9, 3]), np.array([0.5, -0.5], np.float32)), WeightChange("blocks.0.ln1.w", np.array([0]), bit=31),
             WeightChange("blocks.2.mlp.W_out", np.array([4]), np.array([2.0], np.float32)),
             WeightChange("ln_final.w", np.zeros(0, np.int64), np.zeros(0, np.float32))]  # fmt: skip
    weights = [llama.weight(change.name).reshape(-1)[change.at] for change in asked]
    with llama.perturbed(asked) as written:
        assert [one.name for one in written] == [change.name for change in asked]
        assert all(np.array_equal(one.before, values) for one, values in zip(written, weights, strict=True))
        assert [one.after.tolist() for one in written] == [[0.5, -0.5], [-weights[1][0]], [2.0], []]
        assert written[1].wanted.tolist() == written[1].after.tolist() and {one.n_others for one in written} == {0}


def test_a_model_closed_inside_the_block_has_nothing_to_be_put_back(tiny_llama: TinyModel) -> None:
    for path in (tiny_llama.hf, tiny_llama.gguf):
        engine = open_engine(path, OPTIONS)
        with engine.perturbed([WeightChange("ln_final.w", np.array([1]), np.array([1.0], np.float32))]):
            engine.close()


def test_the_file_is_never_touched(tiny_llama: TinyModel) -> None:
    for path, file in ((tiny_llama.hf, tiny_llama.hf / "model.safetensors"), (tiny_llama.gguf, tiny_llama.gguf)):
        before = hashlib.sha256(file.read_bytes()).digest()
        engine = open_engine(path, OPTIONS)
        with engine.perturbed([WeightChange("embed.W_E", np.arange(4000), np.zeros(4000, np.float32))]):
            logits_with(engine, ids=IDS)
            assert hashlib.sha256(file.read_bytes()).digest() == before
        engine.close()
        assert hashlib.sha256(file.read_bytes()).digest() == before


def test_tied_matrices_are_one_weight(tmp_path: Path) -> None:
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    engines = open_engine(tied.hf, OPTIONS), open_engine(tied.gguf, OPTIONS)
    at, got = drawn(engines[0], "embed.W_E"), []
    for engine in engines:
        for name in ("embed.W_E", "unembed.W_U"):
            with engine.perturbed([WeightChange(name, at, np.full(len(at), 4.0, np.float32))]):
                got.append(logits_with(engine, ids=IDS))
        both = [WeightChange(name, at, np.full(len(at), value, np.float32)) for name, value in (("embed.W_E", 1.0), ("unembed.W_U", 2.0))]
        assert refusal(engine, *both).startswith(f"{len(at)} stored weights are named more than once in the changes of embed.W_E, unembed.W_U; each is changed once")
        engine.close()
    assert np.array_equal(got[0], got[1]) and np.array_equal(got[2], got[3]) and nmse(got[2], got[0]) < NMSE


# -- refused ------------------------------------------------------------------------------------------------------------------


def one(name: str = "blocks.0.mlp.W_in", at: int = 0, value: float | None = 1.0, bit: int | None = None) -> WeightChange:
    return WeightChange(name, np.array([at]), None if value is None else np.array([value], np.float32), bit)


@pytest.mark.parametrize(("changes", "said"), [
    ([one("blocks.9.mlp.W_in")], "tiny-llama(-f32)? has no weight 'blocks.9.mlp.W_in'"),
    ([one(at=6144)], "Place 6,144 is outside 0-6,143 of blocks.0.mlp.W_in"),
    ([one(at=-1)], "Place -1 is outside 0-6,143"),
    ([one(bit=3)], "has both values and a bit; it takes one"),
    ([one(value=None)], "has neither values nor a bit; it takes one"),
    ([one(value=None, bit=32)], "There is no bit 32 to flip in blocks.0.mlp.W_in: an entry stored as (F32|float32) has bits 0-31."),
    ([one(value=None, bit=-1)], "There is no bit -1 to flip"),
    ([one(value=float("nan"))], "Entry 0 of blocks.0.mlp.W_in cannot be set to nan: a weight is a finite number."),
    ([one(value=float("inf"))], "cannot be set to inf"),
    ([WeightChange("ln_final.w", np.array([1, 2]), np.ones(3, np.float32))], "The change of ln_final.w has 3 values for 2 places."),
    ([WeightChange("ln_final.w", np.array([1, 1]), np.ones(2, np.float32))], "1 stored weight is named more than once in the changes of ln_final.w;"),
    ([one(), one(value=2.0)], "1 stored weight is named more than once in the changes of blocks.0.mlp.W_in;"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_one_sentence(llama: Engine, changes: list[WeightChange], said: str) -> None:
    assert re.search(said, refusal(llama, *changes)), refusal(llama, *changes)


def test_a_mapped_file_is_not_written_to(tiny_llama: TinyModel) -> None:
    engine = open_engine(tiny_llama.gguf, replace(OPTIONS, editable_weights=False))
    assert "cannot be changed: its file is mapped into memory; open it with editable_weights" in refusal(engine, one())
    assert engine.code_bits("ln_final.w") == 32, "asking writes nothing"
    engine.close()


def test_packed_weights_are_refused_by_name(tiny_llama: TinyModel) -> None:
    engine = open_engine(tiny_llama.hf, OPTIONS)
    assert isinstance(engine, HfEngine)
    engine._model.get_submodule("model.layers.0.self_attn.o_proj").weight = torch.nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    assert "'blocks.0.attn.W_O' of tiny-llama can be neither handed out nor changed: its values are packed in memory" in refusal(engine, one("blocks.0.attn.W_O"))
    engine.close()


# -- torch dtypes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_stores_what_its_dtype_can_and_says_so(tiny_llama: TinyModel, dtype: Any) -> None:
    engine = open_engine(tiny_llama.hf, replace(OPTIONS, dtype=dtype))
    name, at, values = "blocks.1.mlp.W_out", np.array([5, 90, 91]), np.array([0.1, -1e-3, 3e38], np.float32)
    want = torch.tensor(values).clamp(max=torch.finfo(getattr(torch, dtype)).max).to(getattr(torch, dtype)).float().numpy()
    before = stored_bytes(engine)
    with engine.perturbed([WeightChange(name, at, values)]) as (written,):
        assert np.array_equal(written.after, want) and np.array_equal(written.wanted, values) and np.isfinite(written.after).all()
        assert written.storage == dtype and np.array_equal(engine.weight(name).reshape(-1)[at], want)
    top = engine.code_bits(name) - 1
    assert top == {"float32": 31, "float16": 15, "bfloat16": 15}[dtype]
    with engine.perturbed([WeightChange(name, at, bit=top)]) as (written,):
        assert np.array_equal(written.after, -written.before), "the most significant bit is the sign"
    with engine.perturbed([WeightChange(name, at, bit=0)]) as (written,):
        assert (written.after != written.before).all() and np.allclose(written.after, written.before, rtol=1e-2)
        flipped = stored_bytes(engine)
        with engine.perturbed([WeightChange(name, at, bit=0)]):
            assert stored_bytes(engine) == before != flipped
    assert stored_bytes(engine) == before
    engine.close()


def test_a_gain_of_one_plus_w_gets_the_gain_that_was_asked_for(tiny_model: Callable[[str], TinyModel]) -> None:
    engine = open_engine(tiny_model("gemma2").hf, OPTIONS)
    parameter = engine._model.get_submodule("model.norm").weight  # type: ignore[attr-defined]
    with engine.perturbed([WeightChange("ln_final.w", np.array([3]), np.array([1.25], np.float32))]) as (written,):
        assert parameter[3].item() == 0.25 and written.after.tolist() == [1.25]
    engine.close()


# -- quantized blocks ---------------------------------------------------------------------------------------------------------

# Every type that ggml has values of, one to each matrix of one model.
STORED = [name for number, (name, _, _) in GGML_TYPES.items() if name != "F32" and can_dequantize(number)]
TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
# Types that a sign flip leaves exactly, so that flipping twice gives the same bytes. The others have no mirror image of some of their values: the lowest
# code has no opposite (Q4_0, Q5_0, Q3_K, Q6_K), levels are uneven (IQ4_NL, IQ4_XS) or counted from a minimum (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K), or the signs of eight
# values are kept in seven bits (IQ2_XXS, IQ2_XS, IQ3_XXS) or in a codebook (IQ1_S, IQ1_M).
MIRRORED = {"F16", "BF16", "Q8_0", "MXFP4", "NVFP4", "TQ2_0", "TQ1_0", "Q1_0", "IQ2_S", "IQ3_S"}
CODE_BITS = {
    "F16": 16, "BF16": 16, "Q8_0": 8, "Q6_K": 6, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "IQ4_NL": 4, "IQ4_XS": 4, "MXFP4": 4, "NVFP4": 4,
    "Q3_K": 3, "Q2_K": 2, "TQ2_0": 2, "Q1_0": 1, "IQ2_S": 1, "IQ3_S": 1, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ3_XXS": 0, "IQ1_S": 0, "IQ1_M": 0, "TQ1_0": 0,
}  # fmt: skip


def with_types(source: Path, out: Path, types: dict[str, str], tensors: Mapping[str, NDArray[np.uint8]] = MappingProxyType({})) -> None:
    """The GGUF file `source` again, tensors stored as `types` says, or as the bytes in `tensors`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        raw = tensor.data if tensor.name not in types else quantized(np.array(tensor.data), types[tensor.name])
        writer.add_tensor(tensor.name, tensors.get(tensor.name, raw), raw_dtype=gguf.GGMLQuantizationType[types.get(tensor.name, tensor.tensor_type.name)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(values: NDArray[np.float32], type_name: str) -> NDArray[np.uint8]:
    number, block = TYPE_IDS[type_name], GGML_TYPES[TYPE_IDS[type_name]][1]
    return quantize(number, values.reshape(-1, block)).reshape(len(values), -1)


def told(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """What stored bytes stand for, as gguf says; Q1_0 it does not know, and ggml does."""
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name == "Q1_0":
        return dequantize(TYPE_IDS[type_name], raw, raw.size // 18 * 128)
    return gguf.quants.dequantize(raw.view(np.float16) if type_name == "F16" else raw, kind).astype(np.float32).reshape(-1)


class Quantized:
    """A model with a matrix of every type. name, bytes and values of the matrix of a type."""

    def __init__(self, folder: Path) -> None:
        self.f32 = save_tiny("llama", folder / "blocks", hidden_size=256, intermediate_size=256, num_hidden_layers=4, attention_bias=False).gguf
        matrices = [(f"blk.{i}.{native}.weight", f"blocks.{i}.{ours}") for i in range(4) for native, ours in
                    (("ffn_down", "mlp.W_out"), ("ffn_up", "mlp.W_in"), ("ffn_gate", "mlp.W_gate"), ("attn_q", "attn.W_Q"), ("attn_k", "attn.W_K"), ("attn_v", "attn.W_V"),
                     ("attn_output", "attn.W_O"))]  # fmt: skip
        self.native = {kind: native for kind, (native, _) in zip(STORED, matrices, strict=False)}
        self.name = {kind: ours for kind, (_, ours) in zip(STORED, matrices, strict=False)}
        assert len(self.native) == len(STORED)
        self.types = {native: kind for kind, native in self.native.items()}
        self.path = folder / "every-type.gguf"
        with_types(self.f32, self.path, self.types)
        engine = open_engine(self.path, OPTIONS)
        assert isinstance(engine, GgufEngine)
        self.engine = engine

    def bytes_of(self, kind: str) -> NDArray[np.uint8]:
        """What llama.cpp's memory holds now."""
        with self.engine.perturbed([]):
            pass
        weight = self.engine._weights.stored(self.native[kind])
        return read_bytes(self.engine._stored.of(weight)[0], 0, weight.nbytes)

    def places(self, kind: str, at: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.engine._weights.lazy(self.name[kind]).places(at)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quantized]:
    made = Quantized(tmp_path_factory.mktemp("models"))
    yield made
    made.engine.close()


AT = np.array([3, 4, 300, 517, 5000, 20000])


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("asked", ["zero", "negative", "a hundredth", "far beyond", "bit"])
def test_what_is_reported_is_what_the_bytes_say_and_all_of_them_are_put_back(every: Quantized, kind: str, asked: str) -> None:
    engine, raw = every.engine, every.bytes_of(kind)
    values, places = told(raw, kind), every.places(kind, AT)
    wanted = {"zero": values[places] * 0, "negative": -values[places], "a hundredth": values[places] / 100, "far beyond": values[places] * 20 + 1, "bit": None}[asked]
    if asked == "bit" and not CODE_BITS[kind]:
        assert f"an entry stored as {kind} has no code of its own" in refusal(engine, WeightChange(every.name[kind], AT, bit=0))
        return
    plain = logits_with(engine, ids=IDS)
    with engine.perturbed([WeightChange(every.name[kind], AT, wanted, 0 if wanted is None else None)]) as (written,):
        now_raw = every.bytes_of(kind)
        now = told(now_raw, kind)
        changed = logits_with(engine, ids=IDS)
    assert np.array_equal(written.before, values[places]) and np.array_equal(written.after, now[places]) and written.storage == kind
    assert np.array_equal(written.wanted, now[places] if wanted is None else wanted)
    others = np.delete(np.arange(values.size), places)
    moved = np.abs(now[others] - values[others])
    assert written.n_others == np.count_nonzero(moved) and written.worst_other == moved.max()
    assert np.array_equal(every.bytes_of(kind), raw) and np.array_equal(logits_with(engine, ids=IDS), plain)
    assert np.array_equal(changed, plain) == np.array_equal(now_raw, raw)
    block = GGML_TYPES[TYPE_IDS[kind]][1]
    assert not np.isin(others[moved > 0] // block, places // block, invert=True).any(), "only blocks with a named entry"
    if wanted is not None:
        assert (np.abs(written.after - wanted).sum() <= np.abs(written.before - wanted).sum()), "never further away than before"


def test_the_changed_model_is_the_model_of_a_file_written_with_the_change(every: Quantized, tmp_path: Path) -> None:
    changes = [WeightChange(every.name[kind], AT, np.full(len(AT), 0.3, np.float32)) for kind in STORED]
    with every.engine.perturbed(changes) as written:
        now = {every.native[kind]: every.bytes_of(kind) for kind in STORED}
        logits = logits_with(every.engine, ids=IDS)
    shapes = {tensor.name: tensor.data.view(np.uint8).shape for tensor in gguf.GGUFReader(every.path).tensors}
    with_types(every.f32, tmp_path / "changed.gguf", every.types, {name: raw.reshape(shapes[name]) for name, raw in now.items()})
    other, weights = open_engine(tmp_path / "changed.gguf", OPTIONS), open_weights(tmp_path / "changed.gguf")
    assert np.array_equal(logits_with(other, ids=IDS), logits)
    assert all(np.array_equal(weights[one.name].reshape(-1)[AT], one.after) for one in written)
    other.close()


def _low_nibble_first(start: int, half: int) -> Callable[[NDArray[np.uint8], int, int], None]:
    """Entries 0 to half - 1 of every 2 half in the low nibbles of `half` bytes, the next in the high ones."""

    def put(block: NDArray[np.uint8], entry: int, code: int) -> None:
        group, place = divmod(entry, 2 * half)
        byte, shift = start + group * half + place % half, 4 * (place // half)
        block[byte] = block[byte] & (255 ^ 15 << shift) | code << shift

    return put


def _byte(start: int) -> Callable[[NDArray[np.uint8], int, int], None]:
    def put(block: NDArray[np.uint8], entry: int, code: int) -> None:
        block[start + entry] = code

    return put


# where ggml-common.h says that these keep an entry's code
LAYOUTS = {"Q8_0": (_byte(2), 256), "Q4_0": (_low_nibble_first(2, 16), 16), "Q4_1": (_low_nibble_first(4, 16), 16), "IQ4_NL": (_low_nibble_first(2, 16), 16),
           "MXFP4": (_low_nibble_first(1, 16), 16), "Q4_K": (_low_nibble_first(16, 32), 16)}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_of_an_entrys_own_codes_the_nearest_is_taken_and_nothing_else_changes(every: Quantized, kind: str) -> None:
    put, n_codes = LAYOUTS[kind]
    _, block, n_bytes = GGML_TYPES[TYPE_IDS[kind]]
    raw = every.bytes_of(kind)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 256 * 128, 12):
        place = int(every.places(kind, np.array([at]))[0])
        owner, entry = divmod(place, block)
        values = []
        for code in range(n_codes):
            changed = raw.reshape(-1, n_bytes)[owner].copy()
            put(changed, entry, code)
            values.append(told(changed, kind)[entry])
        wanted = np.float32(rng.uniform(min(values), max(values)))
        with every.engine.perturbed([one(every.name[kind], int(at), wanted)]) as (written,):
            assert written.n_others == 0 and abs(written.after[0] - wanted) == np.abs(np.array(values) - wanted).min()


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q4_K", "IQ4_XS", "MXFP4", "IQ2_XXS"])
def test_a_value_beyond_the_codes_has_its_block_quantized_anew(every: Quantized, kind: str) -> None:
    values = told(every.bytes_of(kind), kind)
    block = GGML_TYPES[TYPE_IDS[kind]][1]
    place = int(every.places(kind, np.array([300]))[0])
    of_block = values[place // block * block : place // block * block + block]
    wanted = np.float32(6 * np.abs(of_block).max())
    with every.engine.perturbed([one(every.name[kind], 300, wanted)]) as (written,):
        assert abs(written.after[0] - wanted) < 0.2 * wanted and 0 < written.n_others < block


@pytest.mark.parametrize("kind", STORED)
def test_sign_flips_twice(every: Quantized, kind: str) -> None:
    """Bit for bit where the format has the mirror image of each of its values, and there only."""
    raw, at = every.bytes_of(kind), np.sort(np.random.default_rng(0).choice(256 * 128, 1000, replace=False))
    with every.engine.perturbed([WeightChange(every.name[kind], at, -told(raw, kind)[every.places(kind, at)])]) as (first,):
        between = every.bytes_of(kind)
        with every.engine.perturbed([WeightChange(every.name[kind], at, -first.after)]):
            back = every.bytes_of(kind)
    assert not np.array_equal(between, raw)
    assert np.array_equal(back, raw) == (kind in MIRRORED)
    assert np.array_equal(first.after, first.wanted) == (kind in MIRRORED)
    assert np.array_equal(every.bytes_of(kind), raw)


# -- bits ---------------------------------------------------------------------------------------------------------------------


def test_every_type_has_the_codes_that_it_is_known_for(every: Quantized) -> None:
    assert {kind: every.engine.code_bits(every.name[kind]) for kind in STORED} == CODE_BITS
    assert every.engine.code_bits("ln_final.w") == 32 and code_bits(TYPE_IDS["I32"]) == 0


@pytest.mark.parametrize("kind", [kind for kind in STORED if CODE_BITS[kind]])
def test_a_flipped_bit_is_one_bit_of_one_entry_and_flips_back(every: Quantized, kind: str) -> None:
    name, raw = every.name[kind], every.bytes_of(kind)
    values, at = told(raw, kind), np.array([0, 77, 1000])
    places = every.places(kind, at)
    sizes = []
    for bit in range(CODE_BITS[kind]):
        with every.engine.perturbed([WeightChange(name, at, bit=bit)]) as (written,):
            now = every.bytes_of(kind)
            assert np.unpackbits(now ^ raw).sum() == len(at) and written.n_others == 0 and written.worst_other == 0
            with np.errstate(invalid="ignore"):
                assert set(np.flatnonzero(told(now, kind) != values)) <= set(places)
                sizes.append(np.abs(written.after - written.before))
            with every.engine.perturbed([WeightChange(name, at, bit=bit)]):
                assert np.array_equal(every.bytes_of(kind), raw)
    assert np.array_equal(every.bytes_of(kind), raw)
    limit = CODE_BITS[kind]
    assert f"There is no bit {limit} to flip in {name}: an entry stored as {kind} has bits 0-{limit - 1}." in refusal(every.engine, WeightChange(name, at, bit=limit))
    if kind in ("Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q5_K", "Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q2_K"):  # whole numbers: bit k counts 2^k
        assert np.allclose(np.array(sizes) / sizes[0], 2.0 ** np.arange(limit)[:, None], rtol=1e-3)


def test_values_and_bits_of_one_matrix_in_one_block(every: Quantized) -> None:
    raw = every.bytes_of("Q8_0")
    values = told(raw, "Q8_0")
    with every.engine.perturbed([one(every.name["Q8_0"], 5, value=0.0), one(every.name["Q8_0"], 6, value=None, bit=7)]) as (zeroed, flipped):
        now = told(every.bytes_of("Q8_0"), "Q8_0")
    assert zeroed.after.tolist() == [0.0] and flipped.after[0] == now[6] != values[6] and np.array_equal(np.flatnonzero(now != values), [5, 6])


def test_levels_are_those_of_the_formats() -> None:
    """The codes were found by flipping bits; these levels are printed in ggml-common.h."""
    iq4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    e2m1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
    for kind, levels in (("IQ4_NL", iq4), ("IQ4_XS", iq4), ("MXFP4", e2m1), ("NVFP4", e2m1), ("Q4_0", np.arange(16)), ("Q8_0", np.arange(256).astype(np.int8))):
        codes = codes_of(TYPE_IDS[kind])
        assert codes is not None
        mirrored = -levels.astype(float) if codes.lowest == levels.argmax() else levels.astype(float)
        assert np.allclose(codes.levels, (mirrored - mirrored.min()) / np.ptp(mirrored), atol=1e-4), kind


def test_blocks_that_lie_near_are_carried_in_one_piece() -> None:
    assert _spans(np.array([0, 1, 40, 200, 201])) == [(0, 41), (200, 2)]

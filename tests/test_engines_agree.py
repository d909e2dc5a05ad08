"""The strongest claim of all: the same weights, as a Hugging Face folder and as an F32 GGUF file, give the same value at every
site in both engines, with the same edits too. A wrong name, layer, head order, permutation or mask in either engine fails here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backend.analysis.identities import Identities
from backend.engines import Engine, OpenOptions, Piece, Request, Sampling, open_engine
from backend.engines.gguf import GgufEngine
from backend.engines.hf import HfEngine
from backend.experiments.capture import _weight_or_none, layers_with_shared_expert
from backend.files import hf_keys
from backend.intervention import Intervention
from backend.sites import SITES
from backend.weights import open_weights
from tests.phimoe import as_in_llama_cpp
from tests.test_hf_engine import Values, capture, no_hooks
from tests.tiny_models import TinyModel, architecture_of

IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12, 9, 9]
NMSE = 1e-6  # llama.cpp's check-nmse.py calls this identical


KINDS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "olmo2", "olmoe", "gemma2", "gemma3_text", "phi3", "gpt2",
    "starcoder2", "stablelm", "stablelm, parallel", "granite", "granitemoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(pair: tuple[Engine, Engine]) -> tuple[Values, Values]:
    """Every site of every layer of an unedited run, in both engines."""
    return capture(pair[0], IDS), capture(pair[1], IDS)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[tuple[Engine, Engine]]:
    """(PyTorch, llama.cpp) on the same float32 weights, llama.cpp with a float32 key/value cache; of phimoe with llama.cpp's norms and weights of experts."""
    tiny = tiny_model(request.param)
    options = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1)
    engines = open_engine(tiny.hf, options), open_engine(tiny.gguf, options)
    as_in_llama_cpp(engines[0])
    yield engines
    for engine in engines:
        engine.close()


def nmse(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Mean squared error over mean square, where both are finite; infinities must stand in the same places, NaN nowhere."""
    assert not np.isnan(actual).any() and not np.isnan(expected).any()
    finite = np.isfinite(expected)
    assert actual.shape == expected.shape
    assert np.array_equal(finite, np.isfinite(actual)) and np.array_equal(actual[~finite], expected[~finite])
    a, b = actual[finite].astype(np.float64), expected[finite].astype(np.float64)
    if not b.any():
        return float(np.inf if a.any() else 0.0)
    return float(((a - b) ** 2).mean() / (b**2).mean())


def test_every_architecture_is_held_to_the_contract() -> None:
    header = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text().split("| site | ")[1].splitlines()[0]
    assert set(map(architecture_of, KINDS)) == set(hf_keys.ARCHITECTURES) == set(map(architecture_of, header.removesuffix(" |").split(" | ")))


def test_both_engines_offer_the_same_sites(pair: tuple[Engine, Engine]) -> None:
    assert pair[0].places == pair[1].places


def test_the_same_weights_give_the_same_value_at_every_site(plain: tuple[Values, Values]) -> None:
    hf, gguf = plain
    assert set(hf) == set(gguf)
    wrong = {key: error for key in hf if (error := nmse(gguf[key], hf[key])) > NMSE}
    assert not wrong
    assert np.array_equal(gguf["logits", None].argmax(-1), hf["logits", None].argmax(-1))


def test_a_long_prompt_in_pieces_gives_the_same_value_too(pair: tuple[Engine, Engine]) -> None:
    """Rotations by large angles, windows that lie far back and keys out of the cache: a prompt of two pieces."""
    ids = np.random.default_rng(0).integers(2, 320, 560).tolist()
    hf, gguf = (capture(engine, ids, ("attn_pattern", "z", "resid_post", "logits")) for engine in pair)
    assert {key: error for key in hf if (error := nmse(gguf[key], hf[key])) > NMSE} == {}


def test_the_comparison_would_notice_a_wrong_layer_head_or_row(pair: tuple[Engine, Engine], plain: tuple[Values, Values]) -> None:
    """Negative controls: the neighbouring layer, transposed heads and a shifted position all exceed the limit by far."""
    values = plain[0]
    for site in {"resid_post", "q", "k", "rot_k", "z", "attn_pattern", "expert_out", "shared_expert_out"} & pair[0].sites:
        last = pair[0].info.n_layers - 1
        assert nmse(values[site, last], values[site, last - 1]) > 1e-3
        assert nmse(np.flip(values[site, last], axis=0 if site == "attn_pattern" else 1), values[site, last]) > 1e-3
    assert nmse(np.roll(values["resid_post", 1], 1, axis=0), values["resid_post", 1]) > 1e-3


EDITS = [
    Intervention("embed", None, "add", np.linspace(-1, 2, 64), pos=3),  # the same added to all would be nothing to a LayerNorm
    Intervention("ln1_out", 0, "scale", 1.5, pos=(2, 4)),
    Intervention("q", 1, "add", np.linspace(-1, 1, 16), head=1),
    Intervention("k", 1, "add", np.linspace(-1, 2, 16), head=1, pos=3),
    Intervention("v", 0, "zero", head=0),
    Intervention("rot_q", 1, "scale", 2.0, head=3),
    Intervention("rot_k", 2, "zero", head=1, pos=5),
    Intervention("attn_scores", 1, "zero", head=2),
    Intervention("attn_pattern", 1, "zero", head=(0, 2), pos=7),
    Intervention("attn_pattern", 0, "zero", dim=0),
    Intervention("z", 1, "zero", head=1),
    Intervention("attn_out", 2, "mean"),
    Intervention("resid_mid", 1, "set", 0.25, pos=-1),
    Intervention("resid_pre", 1, "add", np.linspace(1, -2, 64), pos=2),
    Intervention("ln2_out", 0, "noise", 0.1, seed=5),
    Intervention("mlp_out", 1, "zero"),
    Intervention("resid_post", 0, "add", np.linspace(-2, 2, 64), pos=-2),
    Intervention("ln_final_out", None, "scale", 0.5),
    Intervention("logits", None, "add", 3.0, dim=7),
    Intervention("mlp_pre", 1, "zero", dim=(0, 5)),
    Intervention("mlp_pre_linear", 1, "scale", -1.0),
    Intervention("mlp_post", 0, "zero", pos=(1, 6)),
    Intervention("router_logits", 1, "add", np.linspace(3, -3, 5)),
    Intervention("router_probs", 1, "scale", np.linspace(2, 0, 5)),
    Intervention("expert_weights", 0, "scale", 2.0, pos=5),
    Intervention("expert_out", 1, "scale", -2.0, pos=(2, 6)),
    Intervention("shared_expert_out", 1, "add", np.linspace(2, -1, 64), pos=4),
]


def fitted(edit: Intervention, engine: Engine) -> Intervention:
    """The edit with a value as wide as the model's site, in the first layer that has the site if the edit's own has not."""
    value, width = edit.value, engine.info.dims.get(SITES[edit.site].dims[-1])
    if isinstance(value, np.ndarray) and width and len(value) != width:
        value = np.linspace(value[0], value[-1], width)
    layers = sorted(layer for site, layer in engine.places if site == edit.site and layer is not None)
    return replace(edit, value=value, layer=edit.layer if not layers or edit.layer in layers else layers[0])


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.op} {edit.site}")
def test_the_same_edit_gives_the_same_answer(pair: tuple[Engine, Engine], plain: tuple[Values, Values], edit: Intervention) -> None:
    if edit.site not in pair[0].sites and edit.site != "resid_pre":
        return  # the architecture has no such site; test_hf_engine asserts that it is refused
    edit = fitted(edit, pair[0])
    hf, gguf = (capture(engine, IDS, edits=(edit,)) for engine in pair)
    assert nmse(hf["logits", None], plain[0]["logits", None]) > 100 * NMSE  # the edit does something
    assert {key: error for key in hf if (error := nmse(gguf[key], hf[key])) > NMSE} == {}


def test_a_residual_stream_patched_from_another_run_gives_the_same_answer(pair: tuple[Engine, Engine], plain: tuple[Values, Values]) -> None:
    """The answer of both engines, and where the patch is the embedding: the answer to the other prompt."""
    at, other = 5, [*IDS[:5], 42, *IDS[6:]]
    for engine, before in zip(pair, plain, strict=True):
        there = capture(engine, other)
        patched = capture(engine, IDS, ("logits",), (Intervention("resid_pre", 0, "set", there["embed", None][at], pos=at),))["logits", None]
        assert nmse(patched, there["logits", None]) < 1e-9 < 1e-3 < nmse(patched, before["logits", None])
    for site in ("resid_pre", "resid_post"):
        edit = Intervention(site, 1, "set", there["resid_post", 0 if site == "resid_pre" else 1][at], pos=at)
        hf, gguf = (capture(engine, IDS, ("logits",), (edit,))["logits", None] for engine in pair)
        assert nmse(gguf, hf) < NMSE and nmse(hf, plain[0]["logits", None]) > 100 * NMSE


Stream = list[Piece]


def recorded(engine: Engine) -> Stream:
    """Every piece of a run, in the order of the computation."""
    stream: Stream = []
    engine.run(IDS, Request(tuple(engine.sites)), lambda piece: stream.append(replace(piece, values=piece.values.copy())))
    return stream


def report_on(engine: Engine, stream: Stream) -> dict[str, dict[str, Any]]:
    checks = Identities(engine.info, _weight_or_none(engine), engine.unembed, shared=layers_with_shared_expert(engine))
    for piece in stream:
        checks.add(piece.site, piece.layer, piece.values, piece.start)
    return checks.report()


def failing(report: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, entry in report.items() if not entry["ok"]}


def test_the_identities_of_a_transformer_hold_in_both_engines(pair: tuple[Engine, Engine]) -> None:
    for engine in pair:
        report = report_on(engine, recorded(engine))
        assert {name: entry for name, entry in report.items() if not entry["ok"]} == {}
        for name in ("attn_sum", "mlp_sum", "pattern_rows", "unembed") if "resid_mid" in engine.sites else ("pattern_rows", "unembed"):
            assert report[name]["checked"] >= 1, name


def test_the_identities_notice_swapped_heads_shifted_layers_and_a_pattern_without_a_mask(pair: tuple[Engine, Engine]) -> None:
    for engine in pair:
        stream, last = recorded(engine), engine.info.n_layers - 1
        report = report_on(engine, stream)

        def spoiled(site: str, spoil: Callable[[NDArray[Any]], NDArray[Any]], stream: Stream = stream) -> Stream:
            return [replace(piece, values=spoil(piece.values)) if piece.site == site else piece for piece in stream]

        def shifted(site: str, stream: Stream = stream, last: int = last) -> Stream:
            by_layer = {piece.layer: piece.values for piece in stream if piece.site == site}
            return [replace(piece, values=by_layer[((piece.layer or 0) + 1) % (last + 1)]) if piece.site == site else piece for piece in stream]

        if report["attn_projection"]["checked"]:
            assert failing(report_on(engine, spoiled("z", lambda z: z[:, ::-1]))) == {"attn_projection"}
            assert failing(report_on(engine, shifted("z"))) == {"attn_projection"}
        assert "pattern_causal" in failing(report_on(engine, spoiled("attn_pattern", lambda p: (p + 0.01) / (p + 0.01).sum(axis=-1, keepdims=True))))
        assert failing(report_on(engine, spoiled("attn_pattern", lambda p: p.swapaxes(1, 2)))) >= {"pattern_causal", "pattern_rows"}
        assert "unembed" in failing(report_on(engine, shifted("resid_post")))
        if "expert_out" in engine.sites:
            assert report["expert_sum"]["checked"] >= 2
            assert failing(report_on(engine, spoiled("expert_out", lambda out: np.roll(out, 1, axis=0)))) == {"expert_sum"}
            assert failing(report_on(engine, spoiled("expert_out", lambda out: out[:, :1]))) == {"expert_sum"}
        if "shared_expert_out" in engine.sites:
            assert failing(report_on(engine, spoiled("shared_expert_out", lambda out: 2 * out))) == {"expert_sum"}
        if "resid_mid" in engine.sites:
            assert failing(report_on(engine, shifted("resid_mid"))) >= {"attn_sum", "mlp_sum"}
            assert "attn_sum" in failing(report_on(engine, shifted("attn_out")))
            assert "mlp_sum" in failing(report_on(engine, shifted("mlp_out")))


def test_a_token_changes_nothing_before_it_and_something_at_every_site_from_it_on(pair: tuple[Engine, Engine], plain: tuple[Values, Values]) -> None:
    at = 9
    changed = [*IDS[:at], 42, *IDS[at + 1 :]]
    for engine, before in zip(pair, plain, strict=True):
        after = capture(engine, changed)
        for (site, layer), values in before.items():
            rows, changed_rows = (np.moveaxis(v, 1, 0) if SITES[site].is_attention_map else v for v in (values, after[site, layer]))
            # Experts see batches of other sizes, which rounds their products otherwise in the last bit.
            assert nmse(changed_rows[:at], rows[:at]) < (1e-9 if engine.info.is_moe else 1e-12), (site, layer)
            if site != "expert_indices":
                assert nmse(changed_rows[at:], rows[at:]) > 1e-6, (site, layer)


def test_an_edited_run_leaves_no_trace_in_the_next(pair: tuple[Engine, Engine], plain: tuple[Values, Values]) -> None:
    for engine, before in zip(pair, plain, strict=True):
        capture(engine, IDS, edits=(Intervention("z", 1, "zero", head=1), Intervention("resid_post", 0, "scale", 2.0)))
        after = capture(engine, IDS)
        assert all(np.array_equal(before[key], after[key]) for key in before)


class DiskFull(Exception):
    pass


def test_a_sink_that_fails_leaves_no_hook_no_callback_and_no_edit(pair: tuple[Engine, Engine], plain: tuple[Values, Values]) -> None:
    def fail(piece: Piece) -> None:
        if piece.site == "z" and piece.layer == 1:
            raise DiskFull

    for engine, before in zip(pair, plain, strict=True):
        with pytest.raises(DiskFull):
            engine.run(IDS, Request(tuple(engine.sites)), fail, (Intervention("resid_post", 0, "scale", 2.0), Intervention("z", 2, "zero")))
        assert at_rest(engine)
        after = capture(engine, IDS)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def at_rest(engine: Engine) -> bool:
    if isinstance(engine, HfEngine):
        return no_hooks(engine)
    assert isinstance(engine, GgufEngine)
    watch = engine._watch
    return not watch._by_name and not watch._by_weight and watch._visit is None and watch.error is None


def test_both_engines_generate_the_same_tokens(pair: tuple[Engine, Engine]) -> None:
    edits = (Intervention("resid_post", 1, "scale", 0.5, pos=(2, 3)),)
    for given in ((), edits):
        hf, gguf = (engine.generate(IDS, 8, Sampling(), edits=given) for engine in pair)
        assert hf == gguf


def test_both_engines_unembed_and_hand_out_weights_alike(pair: tuple[Engine, Engine], plain: tuple[Values, Values]) -> None:
    resid = plain[0]["resid_post", 1]
    assert nmse(pair[1].unembed(resid), pair[0].unembed(resid)) < NMSE
    folder, file = (open_weights(engine.info.source) for engine in pair)
    assert set(folder) == set(file) and len(file) > 9 * pair[0].info.n_layers
    for name in file:
        assert np.array_equal(pair[1].weight(name), pair[0].weight(name)), name
        assert np.array_equal(folder[name], file[name]), name


@pytest.mark.parametrize("text", ["The capital of France is", "a</s>b", "naïve \u20ac 5\n\tx = 1", ""])
def test_both_engines_read_and_write_text_alike(pair: tuple[Engine, Engine], text: str) -> None:
    hf, gguf = (engine.tokenize(text) for engine in pair)
    assert hf == gguf
    assert pair[0].tokenize(text, add_bos=False) == pair[1].tokenize(text, add_bos=False)
    assert pair[0].token_texts(hf) == pair[1].token_texts(hf)
    assert pair[0].detokenize(hf) == pair[1].detokenize(hf) == text

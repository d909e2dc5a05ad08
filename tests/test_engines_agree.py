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

from backend import hf_config
from backend.analysis.identities import Identities
from backend.engines import Engine, OpenOptions, Piece, Request, Sampling, open_engine
from backend.experiments.capture import _weight_or_none
from backend.intervention import Intervention
from backend.sites import SITES
from backend.weights import open_weights
from tests.test_hf_engine import capture
from tests.tiny_models import TinyModel

IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12, 9, 9]
NMSE = 1e-6  # llama.cpp's check-nmse.py calls this identical


KINDS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "olmo2", "olmoe", "gemma2", "gemma3_text", "phi3", "gpt2",
    "starcoder2", "stablelm", "granite", "gpt_oss", "deepseek_v2", "deepseek_v3",
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[tuple[Engine, Engine]]:
    """(PyTorch, llama.cpp) on the same float32 weights, llama.cpp with a float32 key/value cache."""
    tiny = tiny_model(request.param)
    options = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)
    engines = open_engine(tiny.hf, options), open_engine(tiny.gguf, options)
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
    assert set(KINDS) == set(hf_config.ARCHITECTURES) == set(header.removesuffix(" |").split(" | "))


def test_both_engines_offer_the_same_sites(pair: tuple[Engine, Engine]) -> None:
    assert pair[0].places == pair[1].places


def test_the_same_weights_give_the_same_value_at_every_site(pair: tuple[Engine, Engine]) -> None:
    hf, gguf = (capture(engine, IDS) for engine in pair)
    assert set(hf) == set(gguf)
    wrong = {key: error for key in hf if (error := nmse(gguf[key], hf[key])) > NMSE}
    assert not wrong
    assert np.array_equal(gguf["logits", None].argmax(-1), hf["logits", None].argmax(-1))


def test_the_comparison_would_notice_a_wrong_layer_head_or_row(pair: tuple[Engine, Engine]) -> None:
    """Negative controls: the neighbouring layer, transposed heads and a shifted position all exceed the limit by far."""
    values = capture(pair[0], IDS)
    for site in {"resid_post", "q", "k", "rot_k", "z", "attn_pattern"} & pair[0].sites:
        assert nmse(values[site, 1], values[site, 0]) > 1e-3
        assert nmse(np.flip(values[site, 1], axis=0 if site == "attn_pattern" else 1), values[site, 1]) > 1e-3
    assert nmse(np.roll(values["resid_post", 1], 1, axis=0), values["resid_post", 1]) > 1e-3


EDITS = [
    Intervention("embed", None, "add", np.linspace(-1, 2, 64), pos=3),  # the same added to all would be nothing to a LayerNorm
    Intervention("ln1_out", 0, "scale", 1.5, pos=(2, 4)),
    Intervention("q", 1, "add", np.linspace(-1, 1, 16), head=1),
    Intervention("k", 1, "add", 0.7, head=1, pos=3),
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
]


def fitted(edit: Intervention, engine: Engine) -> Intervention:
    """The edit with a value as wide as the model's site, in the first layer that has the site if the edit's own has not."""
    value, width = edit.value, engine.info.dims.get(SITES[edit.site].dims[-1])
    if isinstance(value, np.ndarray) and width and len(value) != width:
        value = np.linspace(value[0], value[-1], width)
    layers = sorted(layer for site, layer in engine.places if site == edit.site and layer is not None)
    return replace(edit, value=value, layer=edit.layer if not layers or edit.layer in layers else layers[0])


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.op} {edit.site}")
def test_the_same_edit_gives_the_same_answer(pair: tuple[Engine, Engine], edit: Intervention) -> None:
    if edit.site not in pair[0].sites and edit.site != "resid_pre":
        return  # the architecture has no such site; test_hf_engine asserts that it is refused
    edit = fitted(edit, pair[0])
    plain, hf, gguf = capture(pair[0], IDS), capture(pair[0], IDS, edits=(edit,)), capture(pair[1], IDS, edits=(edit,))
    assert nmse(hf["logits", None], plain["logits", None]) > 100 * NMSE  # the edit does something
    assert {key: error for key in hf if (error := nmse(gguf[key], hf[key])) > NMSE} == {}


def test_the_identities_of_a_transformer_hold_in_both_engines(pair: tuple[Engine, Engine]) -> None:
    for engine in pair:
        checks = Identities(engine.info, _weight_or_none(engine), engine.unembed)

        def check(piece: Piece, checks: Identities = checks) -> None:
            checks.add(piece.site, piece.layer, piece.values, piece.start)

        engine.run(IDS, Request(tuple(engine.sites)), check)
        report = checks.report()
        assert {name: entry for name, entry in report.items() if not entry["ok"]} == {}
        for name in ("attn_sum", "mlp_sum", "pattern_rows", "unembed"):
            assert report[name]["checked"] >= 1, name


def test_a_token_changes_nothing_before_it_and_something_at_every_site_from_it_on(pair: tuple[Engine, Engine]) -> None:
    at = 9
    changed = [*IDS[:at], 42, *IDS[at + 1 :]]
    for engine in pair:
        before, after = capture(engine, IDS), capture(engine, changed)
        for (site, layer), values in before.items():
            rows, changed_rows = (np.moveaxis(v, 1, 0) if SITES[site].is_attention_map else v for v in (values, after[site, layer]))
            # Experts see batches of other sizes, which rounds their products otherwise in the last bit.
            assert nmse(changed_rows[:at], rows[:at]) < (1e-9 if engine.info.is_moe else 1e-12), (site, layer)
            if site != "expert_indices":
                assert nmse(changed_rows[at:], rows[at:]) > 1e-6, (site, layer)


def test_an_edited_run_leaves_no_trace_in_the_next(pair: tuple[Engine, Engine]) -> None:
    for engine in pair:
        before = capture(engine, IDS)
        capture(engine, IDS, edits=(Intervention("z", 1, "zero", head=1), Intervention("resid_post", 0, "scale", 2.0)))
        after = capture(engine, IDS)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_both_engines_generate_the_same_tokens(pair: tuple[Engine, Engine]) -> None:
    edits = (Intervention("resid_post", 1, "scale", 0.5, pos=(2, 3)),)
    for given in ((), edits):
        hf, gguf = (engine.generate(IDS, 8, Sampling(), edits=given) for engine in pair)
        assert hf == gguf


def test_both_engines_unembed_and_hand_out_weights_alike(pair: tuple[Engine, Engine]) -> None:
    resid = capture(pair[0], IDS, ("resid_post",))["resid_post", 1]
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

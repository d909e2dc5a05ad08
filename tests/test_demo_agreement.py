"""The demo models say the same thing in every form: Hugging Face and F16 GGUF agree at every site, and all say " Paris"."""

from pathlib import Path

import numpy as np
import pytest

from backend.engines import OpenOptions, Request, open_engine
from backend.experiments.capture import CaptureSpec, capture
from backend.files.demo import ensure_demo_variants
from backend.trace import Trace
from tests.test_engines_agree import nmse

MODELS = Path(__file__).resolve().parents[1] / "models"
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)
PROMPT = "When Mary and John went to the store, John gave a drink to"
NMSE_F16 = 1e-4
# Near-ties of these sites may fall to either side when weights are rounded to 16 bits twice; the other router sites are compared.
DISCRETE = ("expert_indices", "expert_weights")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = ensure_demo_variants(MODELS, tmp_path_factory.mktemp("variants"))
    return {"demo-dense": MODELS / "demo-dense", "demo-moe": MODELS / "demo-moe", **made}


def values_of(path: Path) -> dict:
    engine = open_engine(path, OPTIONS)
    try:
        found = {}
        sites = tuple(engine.sites)
        engine.run(engine.tokenize(PROMPT), Request(sites), lambda piece: found.__setitem__((piece.site, piece.layer), piece.values.copy()))
        return found
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["demo-dense", "demo-moe"])
def test_hugging_face_and_f16_gguf_agree_at_every_site(variants, name):
    hf, gguf = values_of(variants[name]), values_of(variants[f"{name}-f16"])
    assert set(hf) == set(gguf)
    errors = {key: nmse(gguf[key], hf[key]) for key in hf if key[0] not in DISCRETE}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= NMSE_F16, f"{worst}: {errors[worst]:.1e}"
    np.testing.assert_array_equal(gguf["logits", None].argmax(-1), hf["logits", None].argmax(-1))
    if ("expert_indices", 0) in hf:
        same = [np.mean(np.sort(hf["expert_indices", layer]) == np.sort(gguf["expert_indices", layer])) for layer in range(4)]
        assert min(same) >= 0.9


@pytest.mark.parametrize("name", ["demo-dense", "demo-dense-f16", "demo-dense-q8_0", "demo-dense-q4_k_m", "demo-moe", "demo-moe-f16", "demo-moe-q8_0"])
def test_every_variant_says_paris_and_keeps_the_identities(variants, name, tmp_path):
    engine = open_engine(variants[name], OPTIONS)
    try:
        with Trace(capture(engine, CaptureSpec("The capital of France is", max_new_tokens=4), tmp_path)) as trace:
            assert trace.token_text(trace.top_ids[trace.n_prompt - 1, 0]) == " Paris"
            assert trace.response.startswith(" Paris")
            assert not {check: entry for check, entry in trace.integrity.items() if not entry["ok"]}
    finally:
        engine.close()

"""Write docs/architectures.md: how far the two engines lie apart at every site, on a tiny random model of each architecture.

    python scripts/write_architectures.py

The same weights run as a Hugging Face folder in float32 and as an F32 GGUF file. What is written is the normalised mean squared
error, the worst of all layers. tests/test_engines_agree.py holds the limit; this shows the numbers, and names what is refused.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from backend.engines import Engine, OpenOptions, open_engine  # noqa: E402
from backend.files.hf_keys import ARCHITECTURES  # noqa: E402
from backend.sites import SITES  # noqa: E402
from tests.phimoe import as_in_llama_cpp  # noqa: E402
from tests.test_engines_agree import IDS, KINDS, NMSE, nmse  # noqa: E402
from tests.test_hf_engine import capture  # noqa: E402
from tests.tiny_models import TinyModel, architecture_of, save_tiny  # noqa: E402

_OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1)

_INTRODUCTION = f"""# Architectures

Every architecture below is complete in both engines: the same weights, as a Hugging Face folder in float32 and as an F32 GGUF file, give
the same value at every site that exists in it, in every layer that has it, with the same edits too. The limit is a normalised mean
squared error of {NMSE:g}, with llama.cpp's key/value cache in float32. Of phimoe, which llama.cpp computes otherwise than its
makers, they do so once llama.cpp's norms and expert weights are put into PyTorch: see below. The tables show the largest error over the layers of a tiny random model
whose gains and biases are moved off their defaults. An empty cell: the architecture has no such site, and both engines refuse it by name.

`tests/test_engines_agree.py` holds the limit, the identities of a transformer, causality, generation, weights by name and the edits for each
of them; `tests/test_metamorphic.py` what must follow from scaled values and permuted heads. This page is written by
`scripts/write_architectures.py`.

Where llama.cpp computes GELU (gemma2, gemma3_text, gpt2, starcoder2) it takes it from a float16 table, so these agree less closely:
on gpt2 `tests/test_gguf_engine.py` holds that its hidden values are, to the bit, the float16 GELU of the float16 input.

"""
_HELD = "## PyTorch float32 against llama.cpp F32, key/value cache in float32\n\n"
_DEFAULT = """
## The same with llama.cpp's default key/value cache, float16

Nothing holds these: they are what an ordinary capture of a GGUF file differs by before any quantization.

"""
_LIMITS_HEAD = """
## What each has not, and known limits

`resid_pre` is derived and can be read and edited everywhere; without experts there are none of the router's sites. What a configuration asks for
beyond the last column is refused in a sentence that names it.

| architecture | GGUF name | sites that do not exist | refused, and known limits |
|---|---|---|---|
"""

_WINDOW = "a sliding window that the configuration switches on is applied by PyTorch and ignored by llama.cpp: a capture beyond it says so, if the file records the window"
_WINDOWS = "alternate layers see a sliding window, in both engines"
_DENSE_LAYERS = "layers without experts (`mlp_only_layers`, `decoder_sparse_step`) are refused: llama.cpp asks for experts in every layer"
_LATENT = (
    "latent attention: llama.cpp never has a head's keys, values or turned queries. An epsilon other than 1e-6 differs: transformers gives the "
    "latents' norms their own. llama.cpp takes YaRN's `mscale` for equal to `mscale_all_dim`"
)
_LIMITS: Mapping[str, str] = {
    "mistral": _WINDOW,
    "mixtral": _WINDOW,
    "qwen2": _WINDOW,
    "qwen2_moe": f"{_DENSE_LAYERS}; {_WINDOW}; the shared expert's hidden values are no site",
    "qwen3": _WINDOW,
    "qwen3_moe": f"{_DENSE_LAYERS}; {_WINDOW}",
    "smollm3": f"some layers turn nothing, and rot_q, rot_k are what attention gets there; {_WINDOW}",
    "olmo2": "norms follow attention and MLP, none comes before them; `result` is taken before that norm",
    "gemma2": f"{_WINDOWS}; `result` is taken before the norm that follows W_O",
    "gemma3_text": "five of six layers see a sliding window, in both engines; text models only; `result` is taken before the norm that follows W_O",
    "phi3": _WINDOW,
    "gpt2": "positions are part of `embed`; cross-attention is refused",
    "starcoder2": _WINDOW,
    "stablelm, parallel": "as StableLM 2 12B: attention and MLP read the same norm and no block reads resid_mid; a norm of each head's queries and keys",
    "granite": "`result` is taken before the multiplier that follows W_O",
    "granitemoe": "`result` is taken before the multiplier that follows W_O; `expert_out` and `mlp_out` include the multiplier that follows the experts' sum",
    "phimoe": (
        "**llama.cpp computes another model than its makers'**: RMS norms (gain and bias) where they have LayerNorm, and the chosen experts' weights renormalised "
        "to sum to 1 where they have sparsemixer's, each expert's softmax over those that come close to it, which sum to up to 2. Each engine shows what it "
        "computes, a capture of a GGUF file says so, and the numbers above are of PyTorch with those two replaced by llama.cpp's; so there is no other departure. "
        f"With sparsemixer there are no router_probs in PyTorch. Direct logit attribution is refused: the logits have a bias; {_WINDOW}"
    ),
    "gpt_oss": (
        f"{_WINDOWS}; attention sinks take part of each row, so that rows of the pattern sum to less than 1; the router's softmax runs over the chosen "
        "experts alone, so there are no router_probs; folders in MXFP4 are refused, GGUF files in MXFP4 are read. llama.cpp rounds the range of "
        "frequencies that YaRN bends and the released models do not (`truncate: false`): on a tiny model the logits then differ by 2e-6 after 14 tokens, "
        "5e-3 after 200, 1e-2 after 800; with `truncate: true` by 2e-10 after 800"
    ),
    "deepseek_v2": (
        f"{_LATENT}. Experts chosen from the best groups (`group_limited_greedy`, not in V2-Lite): PyTorch ranks a group by its best expert, "
        "llama.cpp by its best two; `norm_topk_prob` is ignored by transformers"
    ),
    "deepseek_v3": f"{_LATENT}. router_probs are sigmoids and do not sum to 1; the layers for predicting several tokens are not run",
}


def errors_between(engines: tuple[Engine, Engine]) -> dict[str, float]:
    """Site -> the largest error over the layers."""
    hf, gguf = (capture(engine, IDS) for engine in engines)
    worst: dict[str, float] = {}
    for site, layer in hf:
        worst[site] = max(worst.get(site, 0.0), nmse(gguf[site, layer], hf[site, layer]))
    return worst


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"| site | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for site in SITES:
        if any(site in errors for errors in columns.values()):
            lines.append(f"| {site} | {' | '.join(f'{errors[site]:.0e}' if site in errors else '' for errors in columns.values())} |")
    return "\n".join(lines) + "\n"


def limits_row(kind: str, gguf: Engine) -> str:
    """What the architecture lacks; a site that only some layers have is named with them."""
    absent = []
    for name, site in SITES.items():
        layers = [layer for at, layer in sorted(gguf.places, key=str) if at == name]
        if not site.derived and not layers and (gguf.info.is_moe or not site.moe):
            absent.append(name)
        elif layers and site.per_layer and not site.derived and len(layers) < gguf.info.n_layers:
            absent.append(f"{name} ({'dense layers' if layers[0] == 0 else 'layers with experts'} only)")
    needed = [f"`{key}` = {value}" for key, value in ARCHITECTURES[architecture_of(kind)].requires]
    limits = _LIMITS.get(kind, "") + (f" (needed: {', '.join(needed)})" if needed else "")
    return f"| {kind} | {gguf.info.architecture} | {', '.join(absent)} | {limits} |\n"


def main() -> None:
    held: dict[str, dict[str, float]] = {}
    default: dict[str, dict[str, float]] = {}
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            tiny: TinyModel = save_tiny(kind, Path(folder) / kind)
            hf, gguf, gguf_f16 = open_engine(tiny.hf, _OPTIONS), open_engine(tiny.gguf, _OPTIONS), open_engine(tiny.gguf, replace(_OPTIONS, kv_cache="f16"))
            as_in_llama_cpp(hf)
            held[kind], default[kind] = errors_between((hf, gguf)), errors_between((hf, gguf_f16))
            rows.append(limits_row(kind, gguf))
            for engine in (hf, gguf, gguf_f16):
                engine.close()
    page = _INTRODUCTION + _HELD + table(held) + _DEFAULT + table(default) + _LIMITS_HEAD + "".join(rows)
    (ROOT / "docs" / "architectures.md").write_text(page)


if __name__ == "__main__":
    main()

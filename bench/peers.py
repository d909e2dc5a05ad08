"""The same values as TransformerLens 4 (run_with_cache, weights not processed) at every site that both have, on tiny random models.

    PyTorch engine     largest absolute difference: residual stream within 1e-5, everything else within 1e-4
    GGUF engine        F32 file, F32 key/value cache: normalised mean squared error within 1e-6, as in tests/test_engines_agree.py

`python -m bench.peers` prints the table and ends with status 1 where a site is outside its limit or the two have no site in common.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import OpenOptions, Piece, Request, open_engine
from backend.sites import SITES
from bench.measure import PEERS_PYTHON, ROOT
from bench.report import Goal, Section, table
from tests.tiny_models import N_TOKENS, TinyModel, save_tiny

Array = NDArray[Any]
Values = dict[tuple[str, int | None], Array]

# Kind -> changes of its configuration. The tiny gpt2's carries rms_norm_eps too, which it does not use and TransformerLens reads first.
KINDS: Mapping[str, dict[str, Any]] = {"llama": {}, "gpt2": {"rms_norm_eps": 1e-4, "layer_norm_epsilon": 1e-4}}
RESIDUAL, RESIDUAL_LIMIT, LIMIT, NMSE_LIMIT = ("embed", "resid_mid", "resid_post"), 1e-5, 1e-4, 1e-6
LENGTH = 24


def section() -> Section:
    rows, goals = [], []
    with tempfile.TemporaryDirectory() as folder:
        for kind, changes in KINDS.items():
            tiny = save_tiny(kind, Path(folder) / kind, **changes)
            found = compare(tiny, Path(folder) / f"{kind}.npz")
            rows += [[kind, f"`{site}`", *cells] for site, cells in found.items()]
            goals += _goals(kind, found)
    text = f"""
Tiny random {" and ".join(KINDS)} models (tests/tiny_models.py: biases, gains and sizes all different), float32, {LENGTH} tokens, against TransformerLens'
run_with_cache with unprocessed weights; the largest difference over all layers. TransformerLens' `hook_embed` is without position embeddings, so for gpt2
they are added; masked attention scores are left out. *PyTorch*: largest absolute difference. *GGUF*: F32 file and key/value cache, mean squared
error over mean square.

{table(["model", "site", "TransformerLens' hook", "PyTorch, max abs", "limit", "GGUF, NMSE", "limit"], rows, text_columns=3)}
"""
    return Section("The same values as TransformerLens", text, goals, 1)


def compare(tiny: TinyModel, cache: Path) -> dict[str, list[str]]:
    """Site -> [hook, max abs error of PyTorch, its limit, NMSE of GGUF, its limit], over all layers. `cache` is written."""
    ids = [int(i) for i in np.random.default_rng(3).integers(2, N_TOKENS, LENGTH)]
    theirs = _transformer_lens(tiny.hf, ids, cache)
    hf, gguf = (_ours(path, ids) for path in (tiny.hf, tiny.gguf))
    found = {}
    for site in SITES:
        places = [place for place in hf if place[0] == site and _hook(*place) in theirs]
        if not places:
            continue
        pairs = [(_reference(theirs, *place), hf[place], gguf[place]) for place in places]
        largest = max(float(np.abs(mine - want)[_unmasked(site, want)].max()) for want, mine, _ in pairs)
        nmse = max(_nmse(mine[_unmasked(site, want)], want[_unmasked(site, want)]) for want, _, mine in pairs)
        limit = RESIDUAL_LIMIT if site in RESIDUAL else LIMIT
        found[site] = [f"`{SITES[site].hook}`", f"{largest:.1e}", f"{limit:.0e}", f"{nmse:.1e}", f"{NMSE_LIMIT:.0e}"]
    return found


def _transformer_lens(folder: Path, ids: list[int], out: Path) -> Mapping[str, Array]:
    """Everything that run_with_cache keeps: hook -> values without the batch axis."""
    if not PEERS_PYTHON.is_file():
        raise SystemExit(f"The peers are not installed: {PEERS_PYTHON.parent.parent.name} is missing. Run make peers-env first.")
    arguments = json.dumps({"path": str(folder), "ids": ids, "n_threads": 1, "out": str(out)})
    subprocess.run([PEERS_PYTHON, "-m", "bench.run_transformer_lens", arguments], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    with np.load(out) as file:
        return dict(file)


def _ours(path: Path, ids: list[int]) -> Values:
    """Every site of every layer, as the engine hands it out."""
    engine = open_engine(path, OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1))
    found: Values = {}

    def sink(piece: Piece) -> None:
        found[piece.site, piece.layer] = piece.values.copy()

    try:
        engine.run(ids, Request(tuple(engine.sites)), sink)
    finally:
        engine.close()
    return found


def _hook(site: str, layer: int | None) -> str:
    return SITES[site].hook if layer is None else f"blocks.{layer}.{SITES[site].hook}"


def _reference(theirs: Mapping[str, Array], site: str, layer: int | None) -> Array:
    values = theirs[_hook(site, layer)]
    return values + theirs["hook_pos_embed"] if site == "embed" and "hook_pos_embed" in theirs else values


def _unmasked(site: str, values: Array) -> NDArray[np.bool_]:
    """Where values can be compared: masked scores are minus infinity here, a large negative number there."""
    return np.broadcast_to(np.tril(np.ones(values.shape[-2:], bool)) if site == "attn_scores" else np.True_, values.shape)


def _nmse(actual: Array, expected: Array) -> float:
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return float(((a - b) ** 2).mean() / (b**2).mean())


def _goals(kind: str, found: Mapping[str, list[str]]) -> list[Goal]:
    """One goal an engine; a comparison without the residual stream and the attention patterns is not met."""
    complete = {*RESIDUAL, "attn_pattern", "q", "k", "v", "z", "attn_out", "mlp_pre", "mlp_post", "mlp_out", "logits"} <= set(found)
    goals = []
    for engine, value, limit in (("PyTorch", 1, 2), ("GGUF F32", 3, 4)):
        worst = max(found, key=lambda site: float(found[site][value]) / float(found[site][limit]), default="no site")
        met = complete and all(float(cells[value]) <= float(cells[limit]) for cells in found.values())
        said = f"{len(found)} sites in common; nearest to its limit: {worst}, {found[worst][value]} of {found[worst][limit]}" if found else "no site in common"
        goals.append(Goal(f"{kind}, {engine} engine: the values of TransformerLens within the limits", said, met))
    return goals


if __name__ == "__main__":
    result = section()
    print(result.text)
    for each in result.goals:
        print(f"{'ok  ' if each.met else 'FAIL'} {each.goal}: {each.measured}")
    sys.exit(not all(each.met for each in result.goals))

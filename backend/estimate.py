"""What a capture will cost before it runs: memory, size of the trace, time; and whether it fits.

Everything follows from ModelInfo, so the page can ask at every keystroke and the worker before it loads a model. All sizes are
bytes. The formulas, with n tokens, L layers, and one layer's values of a site counted by its dims:

    model       GGUF: the file's weights as they are. PyTorch on a CPU: 4 bytes a parameter (float32).
    kv          L * kv_heads * (d_head of keys + of values), or the latent's width, * context * bytes a value; the context in steps of 256,
                as llama.cpp makes it
    activations the largest site of one layer, twice (as computed, as stored), the widest hidden layer, the attention maps of
                one layer, and the logits (kept in memory up to 256 MiB): it does not grow with the number of layers captured
    trace       sites x layers in the stored precision; attention maps count half, since what is above the diagonal compresses away;
                with the summaries that every trace holds (logit lens, thumbnails, top-k)
    seconds     the median of earlier runs of the same model, per token
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.prompt_text import prompt_bytes
from backend.sites import SITES, STANDARD_SITES, split_native

# UTF-8 bytes of a token: what common tokenizers make of English text, rounded down so that the estimate is not too low.
BYTES_PER_TOKEN = 3.5
# Resident size of a worker that has imported the engine and loaded nothing.
ENGINE_BYTES = {"gguf": 250 << 20, "hf": 500 << 20}
KV_STEP = 256
LOGITS_IN_MEMORY = 256 << 20
# Per trace: HDF5's own structures, tokens and metadata; per position: the top-20 lists and the lens's top lists of one row.
_TRACE_OVERHEAD, _TOP_K, _LENS_TOP_K = 200_000, 20, 10
_THUMB_CELLS = 48 * 48
_KV_BYTES = {"f16": 2, "f32": 4}


@dataclass(frozen=True)
class Estimate:
    """The cost of one capture, in bytes and seconds. `seconds` is None when this model has not run before."""

    n_tokens: int
    model_bytes: int
    activation_bytes: int
    kv_bytes: int
    trace_bytes: int
    peak_memory_bytes: int
    available_bytes: int
    seconds: float | None
    fits: bool
    sentence: str


def rough_tokens(text: str) -> int:
    """About how many tokens a text has when no tokenizer is at hand: UTF-8 bytes / 3.5, and one for the start token. Raises LayerscopeError for half a character."""
    return 1 + math.ceil(len(prompt_bytes(text)) / BYTES_PER_TOKEN) if text else 0


def estimate(
    info: ModelInfo,
    n_tokens: int,
    sites: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    precision: str = "float16",
    *,
    kv_cache: str = "f16",
    past: Sequence[tuple[int, float]] = (),
    available_bytes: int | None = None,
    heads: Collection[tuple[int, int]] | None = None,
    rows: tuple[int, int] | None = None,
) -> Estimate:
    """Estimate a capture of `n_tokens` (prompt and new tokens together); sites and layers None: the standard ones, all of them.

    past: (tokens, seconds) of earlier runs of this model. available_bytes None: what the machine has free now.
    """
    names = _stored(info, sites)
    model, kv = model_bytes(info), kv_bytes(info, n_tokens, kv_cache)
    activations = activation_bytes(info, n_tokens, names)
    trace = trace_bytes(info, n_tokens, names, layers, precision, heads, rows)
    peak = ENGINE_BYTES.get(info.engine, max(ENGINE_BYTES.values())) + model + kv + activations
    free = available_memory() if available_bytes is None else available_bytes
    seconds = _seconds(n_tokens, past)
    sentence = _sentence(peak, free, trace, seconds)
    return Estimate(n_tokens, model, activations, kv, trace, peak, free, seconds, peak <= free, sentence)


def model_bytes(info: ModelInfo) -> int:
    """Memory of the weights once loaded."""
    return max(4 * info.n_params, info.n_bytes) if info.engine == "hf" else info.n_bytes


def kv_bytes(info: ModelInfo, n_tokens: int, kv_cache: str = "f16") -> int:
    """Memory of the key-value cache; PyTorch keeps none while capturing, and float32 while generating."""
    value = 4 if info.engine == "hf" else _KV_BYTES[kv_cache]
    context = math.ceil(n_tokens / KV_STEP) * KV_STEP
    width = info.d_kv_latent or info.n_kv_heads * (info.d_head + info.dims["d_head_v"])
    return info.n_layers * width * context * value


def activation_bytes(info: ModelInfo, n_tokens: int, sites: Iterable[str]) -> int:
    """Peak memory of one layer's values on their way to disk, with the logits."""
    largest = max((_cells(info, site, n_tokens) for site in sites), default=0)
    hidden = n_tokens * max(info.d_model, info.d_mlp * max(info.n_experts_used, 1))
    maps = info.n_heads * n_tokens * n_tokens if any(SITES[site].is_attention_map for site in sites) else 0
    logits = 4 * n_tokens * info.d_vocab
    return 4 * (2 * largest + 3 * hidden + maps) + min(logits, LOGITS_IN_MEMORY) + logits


def trace_bytes(info: ModelInfo, n_tokens: int, sites: Iterable[str] | None = None, layers: Iterable[int] | None = None, precision: str = "float16",
                heads: Collection[tuple[int, int]] | None = None, rows: tuple[int, int] | None = None) -> int:  # fmt: skip
    """Size of the trace file, an upper estimate: compression of ordinary activations is left out.

    heads, rows: what is kept of attention maps, as in `backend.engines.Request`.
    """
    n_layers = info.n_layers if layers is None else len(set(layers))
    size = {"float16": 2, "float32": 4}.get(precision)
    if size is None:
        raise LayerscopeError(f"Precision {precision!r} is neither float16 nor float32.")
    total = _TRACE_OVERHEAD + n_tokens * 8 * _TOP_K + (info.n_layers + 1) * n_tokens * 8 * (_LENS_TOP_K + 2)
    for name in _stored(info, sites):
        site = SITES[name]
        cells = _cells(info, name, n_tokens) * (_n_layers_with(info, name, layers) if site.per_layer else 1)
        if site.is_attention_map and heads is not None:
            cells = cells * len(heads) // (n_layers * info.n_heads)
        if site.is_attention_map and rows is not None:
            cells = cells * (rows[1] - rows[0]) // max(n_tokens, 1)
        total += cells * (4 if site.dtype == "int" else size) // (2 if site.is_attention_map else 1)
        if name == "attn_pattern":
            total += n_layers * info.n_heads * min(_THUMB_CELLS, n_tokens * n_tokens)
    return total


def available_memory() -> int:
    """Bytes this process may still take: MemAvailable, or what is left of its control group if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="ascii")))
    return max(free, 0)


def check_model_fits(info: ModelInfo, device: str = "auto", available_bytes: int | None = None) -> None:
    """Raise LayerscopeError, with both numbers, if the weights and the engine would not fit in memory.

    Weights that are sent to a named GPU are not counted: its driver answers for them. available_bytes None: what is free now.
    """
    if device not in ("auto", "cpu"):
        return
    need = ENGINE_BYTES.get(info.engine, 0) + model_bytes(info)
    free = available_memory() if available_bytes is None else available_bytes
    if need > free:
        raise LayerscopeError(f"{info.name} needs about {in_bytes(need)} of memory, and {in_bytes(free)} are free.")


def in_bytes(n: int) -> str:
    """A size to read.

    >>> in_bytes(980), in_bytes(4_200_000), in_bytes(31_000_000_000)
    ('980 bytes', '4.2 MB', '31.0 GB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} bytes"


def _stored(info: ModelInfo, sites: Iterable[str] | None) -> tuple[str, ...]:
    """The sites that are written: derived ones are not, nor are a router's in a dense model or one MLP's hidden layer among experts'.

    Native tensors are left out: nothing is known of their size before a run.
    """
    names = STANDARD_SITES if sites is None else split_native(sites)[0]
    return tuple(n for n in names if not SITES[n].derived and (not SITES[n].per_layer or _n_layers_with(info, n, None)))


def _n_layers_with(info: ModelInfo, site: str, layers: Iterable[int] | None) -> int:
    """How many of the layers (None: of all) have the site: the first ones may be dense in a model whose others have experts."""
    chosen = set(range(info.n_layers) if layers is None else layers)
    if SITES[site].moe:
        return len({layer for layer in chosen if layer >= info.n_dense_layers}) if info.is_moe else 0
    if info.is_moe and site in ("mlp_pre", "mlp_pre_linear", "mlp_post"):
        return len({layer for layer in chosen if layer < info.n_dense_layers})
    return len(chosen)


def _cells(info: ModelInfo, site: str, n_tokens: int) -> int:
    """Values in one layer's array of a site."""
    sizes = {**info.dims, "pos": n_tokens, "q_pos": n_tokens, "k_pos": n_tokens}
    return math.prod(sizes[dim] for dim in SITES[site].dims)


def _seconds(n_tokens: int, past: Sequence[tuple[int, float]]) -> float | None:
    rates = sorted(seconds / tokens for tokens, seconds in past if tokens > 0)
    return n_tokens * rates[len(rates) // 2] if rates else None


def _sentence(peak: int, free: int, trace: int, seconds: float | None) -> str:
    if peak > free:
        return f"This needs about {in_bytes(peak)} of memory, and {in_bytes(free)} are free."
    time = "" if seconds is None else f"about {seconds:.0f} s, " if seconds >= 1 else "under 1 s, "
    text = f"{time}{in_bytes(peak)} of memory ({in_bytes(free)} free) and a trace of at most {in_bytes(trace)}."
    return text[0].upper() + text[1:]

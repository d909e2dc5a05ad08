"""Claims about sensitivity metrics: each is what torch's own autograd, an explicit Hessian, or the inputs collected by plain hooks say it is;
both engines agree on what both can give; a ranking is a full sort of the scores; and the model is afterwards what it was, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from backend.analysis import sensitivity as analysis
from backend.engines import Engine, OpenOptions, open_engine
from backend.engines.hf import HfEngine
from backend.engines.hf_gradients import hessian_products
from backend.errors import Cancelled, LayerscopeError
from backend.experiments.sensitivity import METRICS, inputs
from backend.experiments.sensitivity.contracts import Chosen, Ranking
from backend.experiments.sensitivity.ranking import agreement, gradient_flow, matrices, random_like, rank
from backend.experiments.sensitivity.scores import scored
from tests.test_engines_agree import nmse
from tests.tiny_models import TinyModel, save_tiny

WINDOWS = [[0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12, 9, 9], [0, 5, 60, 7, 8, 201, 10]]
GGUF_METRICS = ("magnitude", "wanda", "obs")
Arrays = dict[str, NDArray[np.float32]]


def open_tiny(path: Path) -> Engine:
    return open_engine(path, OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1))


@pytest.fixture
def opened(tiny_model: Callable[[str], TinyModel]) -> Iterator[Callable[..., Any]]:
    """Opens the tiny model of a kind as "hf" or "gguf", closed again after the test."""
    engines: list[Engine] = []

    def of(kind: str, engine: str = "hf") -> Engine:
        engines.append(open_tiny(getattr(tiny_model(kind), engine)))
        return engines[-1]

    yield of
    for engine in engines:
        engine.close()


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model with its own attention, nothing of ours in it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager").eval()


def nll(model: Any, window: list[int]) -> torch.Tensor:
    """Sum over the predicted tokens, written out."""
    logp = model(input_ids=torch.tensor([window]), use_cache=False).logits[0].log_softmax(-1)
    return -sum(logp[i, token] for i, token in enumerate(window[1:]))  # type: ignore[return-value]


def mean_loss(model: Any) -> torch.Tensor:
    return sum(nll(model, window) for window in WINDOWS) / sum(len(window) - 1 for window in WINDOWS)  # type: ignore[return-value]


def scores(engine: Engine, metric: str, names: Any, **options: Any) -> Arrays:
    return {name: values for name, values, _ in scored(engine, WINDOWS, metric, names, **options)}


def close(actual: NDArray[Any], expected: Any, rtol: float = 2e-4) -> bool:
    expected = np.asarray(expected)
    return actual.shape == expected.shape and np.allclose(actual, expected, rtol=rtol, atol=rtol * 1e-2 * np.abs(expected).max())


# Where canonical weights lie in transformers' modules, said once more by hand: name -> (parameter, what is cut out of it).
Cut = Callable[[Any], Any]
BY_HAND: Mapping[str, Mapping[str, tuple[str, Cut]]] = {
    "llama": {
        "blocks.0.attn.W_K": ("model.layers.0.self_attn.k_proj.weight", lambda w: w),
        "blocks.1.attn.W_O": ("model.layers.1.self_attn.o_proj.weight", lambda w: w),
        "blocks.2.mlp.W_out": ("model.layers.2.mlp.down_proj.weight", lambda w: w),
    },
    "gpt2": {
        "blocks.0.attn.W_Q": ("transformer.h.0.attn.c_attn.weight", lambda w: w[:, :64].T),
        "blocks.0.attn.W_V": ("transformer.h.0.attn.c_attn.weight", lambda w: w[:, 128:].T),
        "blocks.1.mlp.W_in": ("transformer.h.1.mlp.c_fc.weight", lambda w: w.T),
    },
    "phi3": {
        "blocks.0.attn.W_K": ("model.layers.0.self_attn.qkv_proj.weight", lambda w: w[64:96]),
        "blocks.1.mlp.W_gate": ("model.layers.1.mlp.gate_up_proj.weight", lambda w: w[:96]),
        "blocks.1.mlp.W_in": ("model.layers.1.mlp.gate_up_proj.weight", lambda w: w[96:]),
    },
    "mixtral": {
        "blocks.0.mlp.W_router": ("model.layers.0.mlp.gate.weight", lambda w: w),
        "blocks.1.mlp.experts.W_in": ("model.layers.1.mlp.experts.gate_up_proj", lambda w: w[:, 48:]),
        "blocks.1.mlp.experts.W_out": ("model.layers.1.mlp.experts.down_proj", lambda w: w),
    },
    "gpt_oss": {
        "blocks.0.mlp.experts.W_gate": ("model.layers.0.mlp.experts.gate_up_proj", lambda w: w[..., ::2].transpose(-1, -2)),
        "blocks.0.mlp.experts.W_in": ("model.layers.0.mlp.experts.gate_up_proj", lambda w: w[..., 1::2].transpose(-1, -2)),
        "blocks.2.attn.W_Q": ("model.layers.2.self_attn.q_proj.weight", lambda w: w),
    },
    "gemma2": {  # soft-caps on scores and logits
        "blocks.0.attn.W_Q": ("model.layers.0.self_attn.q_proj.weight", lambda w: w),
        "blocks.2.mlp.W_gate": ("model.layers.2.mlp.gate_proj.weight", lambda w: w),
    },
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_gradient_metrics_are_those_of_plain_autograd(kind: str, tiny_model: Callable[[str], TinyModel], opened: Callable[..., Any]) -> None:
    model, engine = plain(tiny_model(kind).hf), opened(kind)
    mean_loss(model).backward()
    found = scores(engine, "grad_x_weight", BY_HAND[kind])
    assert list(found) == list(BY_HAND[kind])
    for name, (path, cut) in BY_HAND[kind].items():
        parameter = model.get_parameter(path)
        assert close(found[name], cut((parameter * parameter.grad).abs().detach()).numpy()), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_fisher_is_the_mean_of_the_squared_gradients_of_single_windows(kind: str, tiny_model: Callable[[str], TinyModel], opened: Callable[..., Any]) -> None:
    model = plain(tiny_model(kind).hf)
    squares: dict[str, Any] = {name: 0 for name in BY_HAND[kind]}
    for window in WINDOWS:
        model.zero_grad()
        (nll(model, window) / (len(window) - 1)).backward()
        for name, (path, cut) in BY_HAND[kind].items():
            squares[name] += cut(model.get_parameter(path).grad.detach().clone()) ** 2 / len(WINDOWS)
    found = scores(opened(kind), "grad_squared", BY_HAND[kind])
    assert all(close(found[name], squares[name].numpy()) for name in BY_HAND[kind])


def test_hutchinson_is_the_hessians_diagonal_within_its_standard_error(tmp_path: Path) -> None:
    """z * Hz has the diagonal as its mean, and the sum of the squares beside it in the row as its variance; windows draw apart."""
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    tiny, name, probes = save_tiny("llama", tmp_path / "m", **sizes), "blocks.0.attn.W_K", 300
    model = plain(tiny.hf, torch.float64)
    weight, n_tokens = model.get_parameter("model.layers.0.self_attn.k_proj.weight"), sum(len(window) - 1 for window in WINDOWS)
    diagonal, variance = np.zeros(weight.numel()), np.zeros(weight.numel())
    for window in WINDOWS:
        slope = torch.autograd.grad(nll(model, window) / n_tokens, weight, create_graph=True)[0].reshape(-1)
        hessian = torch.stack([torch.autograd.grad(each, weight, retain_graph=True)[0].reshape(-1) for each in slope]).numpy()
        assert np.allclose(hessian, hessian.T, atol=1e-5), "norms and rotations are float32 in a model of float64 too"
        diagonal += np.diagonal(hessian)
        variance += (hessian**2).sum(1) - np.diagonal(hessian) ** 2
    engine = open_tiny(tiny.hf)
    assert isinstance(engine, HfEngine)
    ((_, estimate),) = engine.gradients([name]).hessian_diagonal(WINDOWS, probes, seed=3)
    engine.close()
    off = (estimate.reshape(-1) - diagonal) / np.sqrt(variance / probes)
    assert np.abs(off).max() < 5
    assert 0.8 < np.sqrt((off**2).mean()) < 1.2, "as wide as its variance says: neither noisier nor, as of a wrong mean, off"


def test_hutchinson_over_every_vector_of_signs_is_exact() -> None:
    a, b = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True), torch.tensor([0.7, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[0] * b).exp().sum() + (a[1] * b[0] * a[0]) ** 2 + b[1] ** 3

    every = [[torch.tensor(signs[:2], dtype=torch.float64), torch.tensor(signs[2:], dtype=torch.float64)] for signs in itertools.product((-1.0, 1.0), repeat=4)]
    found = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    for z, products in hessian_products(loss(a, b), [a, b], iter(every), len(every)):
        for total, sign, product in zip(found, z, products, strict=True):
            total += sign * product / len(every)
    blocks = torch.autograd.functional.hessian(loss, (a, b))
    assert torch.allclose(found[0], blocks[0][0].diagonal()) and torch.allclose(found[1], blocks[1][1].diagonal())


def test_hutchinsons_score_has_no_sign_and_its_probes_a_seed(opened: Callable[..., Any]) -> None:
    engine, names = opened("mixtral"), ("blocks.0.attn.W_Q", "blocks.1.mlp.experts.W_out")
    raw = dict(engine.gradients(names).hessian_diagonal(WINDOWS, 2, seed=5))
    assert any((values < 0).any() for values in raw.values())
    first, again, other = (scores(engine, "hutchinson", names, seed=seed, probes=2) for seed in (5, 5, 6))
    assert all(np.array_equal(first[name], np.abs(raw[name])) and np.array_equal(first[name], again[name]) for name in names)
    assert not any(np.array_equal(first[name], other[name]) for name in names)


# Linear layers whose input plain hooks collect: canonical name -> module.
READERS: Mapping[str, Mapping[str, str]] = {
    "llama": {f"blocks.1.{ours}": f"model.layers.1.{theirs}" for ours, theirs in (("attn.W_Q", "self_attn.q_proj"), ("attn.W_O", "self_attn.o_proj"),
              ("mlp.W_gate", "mlp.gate_proj"), ("mlp.W_out", "mlp.down_proj"))},
    "gpt2": {f"blocks.2.{ours}": f"transformer.h.2.{theirs}" for ours, theirs in (("attn.W_V", "attn.c_attn"), ("attn.W_O", "attn.c_proj"), ("mlp.W_in", "mlp.c_fc"),
             ("mlp.W_out", "mlp.c_proj"))},
    "mixtral": {"blocks.0.attn.W_K": "model.layers.0.self_attn.k_proj", "blocks.2.mlp.W_router": "model.layers.2.mlp.gate"},
    "olmo2": {"blocks.0.attn.W_Q": "model.layers.0.self_attn.q_proj", "blocks.2.attn.W_V": "model.layers.2.self_attn.v_proj", "blocks.1.mlp.W_in": "model.layers.1.mlp.up_proj"},
    "stablelm, parallel": {"blocks.1.mlp.W_gate": "model.layers.1.mlp.gate_proj", "blocks.1.attn.W_O": "model.layers.1.self_attn.o_proj"},
    "deepseek_v3": {"blocks.1.attn.W_DQ": "model.layers.1.self_attn.q_a_proj", "blocks.2.mlp.shared.W_in": "model.layers.2.mlp.shared_experts.up_proj"},
}  # fmt: skip


def collected(folder: Path, modules: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
    """Canonical name -> (token, in) what entered its module."""
    model, found = plain(folder), {name: [] for name in modules}  # type: dict[str, list[NDArray[np.float64]]]
    for name, module in modules.items():
        model.get_submodule(module).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double().numpy()))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=torch.tensor([window]), use_cache=False)
    return {name: np.concatenate(rows) for name, rows in found.items()}


def explicit_obs(weight: NDArray[np.float32], x: NDArray[np.float64]) -> NDArray[np.float64]:
    hessian = 2 * x.T @ x
    hessian += analysis.DAMPING * np.diagonal(hessian).mean() * np.eye(len(hessian))
    return weight.astype(np.float64) ** 2 / np.diagonal(np.linalg.inv(hessian))


@pytest.mark.parametrize("kind", READERS)
def test_wanda_and_obs_are_those_of_the_inputs_that_hooks_collect(kind: str, tiny_model: Callable[[str], TinyModel], opened: Callable[..., Any]) -> None:
    engine, x = opened(kind), collected(tiny_model(kind).hf, READERS[kind])
    wanda, obs = (scores(engine, metric, READERS[kind]) for metric in ("wanda", "obs"))
    for name in READERS[kind]:
        weight = engine.weight(name)
        assert close(wanda[name], np.abs(weight) * np.linalg.norm(x[name], axis=0)), name
        assert close(obs[name], explicit_obs(weight, x[name]), rtol=1e-3), name


def routed(folder: Path) -> tuple[Any, dict[int, NDArray[np.float32]], dict[int, NDArray[np.int64]]]:
    """(the model, layer with experts -> (token, d_model) what they read, layer -> (token, k) the experts that each token chose), by plain hooks."""
    model, seen = plain(folder), {}  # type: Any, dict[int, list[tuple[Any, Any]]]
    for layer in range(3):
        with contextlib.suppress(AttributeError):
            experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            experts.register_forward_pre_hook(lambda _, args, layer=layer: seen.setdefault(layer, []).append((args[0].reshape(-1, 64), args[1])))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=torch.tensor([window]), use_cache=False)
    parts = {layer: [np.concatenate([np.asarray(part) for part in each]) for each in zip(*pairs, strict=True)] for layer, pairs in seen.items()}
    return model, {layer: rows for layer, (rows, _) in parts.items()}, {layer: chosen for layer, (_, chosen) in parts.items()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_expert_is_scored_by_the_tokens_that_chose_it(kind: str, tiny_model: Callable[[str], TinyModel], opened: Callable[..., Any]) -> None:
    """The second model leaves an expert without tokens in some layer: its weights are worth nothing over this text."""
    engine, names = opened(kind), [f"blocks.{layer}.mlp.experts.W_in" for layer in range(3)]
    _, x, chosen = routed(tiny_model(kind).hf)
    wanda, obs = (scores(engine, metric, names) for metric in ("wanda", "obs"))
    idle = 0
    for layer, name in enumerate(names):
        for expert, weight in enumerate(engine.weight(name)):
            rows = x[layer][(chosen[layer] == expert).any(1)].astype(np.float64)
            idle += not len(rows)
            assert close(wanda[name][expert], np.abs(weight) * np.linalg.norm(rows, axis=0))
            assert close(obs[name][expert], explicit_obs(weight, rows) if len(rows) else np.zeros_like(weight), rtol=1e-3)
    assert (idle > 0) == (kind == "qwen3_moe")


def hidden_by_hand(model: Any, x: NDArray[Any], layer: int, expert: int) -> NDArray[np.float64]:
    """(token, d_mlp) silu(W_gate x) * (W_in x), in float64."""
    gate_up = model.get_parameter(f"model.layers.{layer}.mlp.experts.gate_up_proj")[expert].detach().double().numpy()
    gate, up = np.split(x.astype(np.float64) @ gate_up.T, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("engine", ["hf", "gguf"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_experts_last_matrix_is_scored_by_its_hidden_values(kind: str, engine: str, tiny_model: Callable[[str], TinyModel], opened: Callable[..., Any]) -> None:
    model, x, chosen = routed(tiny_model(kind).hf)
    names = [f"blocks.{layer}.mlp.experts.W_out" for layer in x]
    opened_engine = opened(kind, engine)
    wanda, obs = (scores(opened_engine, metric, names) for metric in ("wanda", "obs"))
    for (layer, rows), name in zip(x.items(), names, strict=True):
        for expert, weight in enumerate(opened_engine.weight(name)):
            hidden = hidden_by_hand(model, rows[(chosen[layer] == expert).any(1)], layer, expert)
            assert close(wanda[name][expert], np.abs(weight) * np.linalg.norm(hidden, axis=0), rtol=1e-3)
            assert close(obs[name][expert], explicit_obs(weight, hidden) if len(hidden) else np.zeros_like(weight), rtol=1e-3)


def test_hidden_values_that_pass_unseen_are_missed(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that multiply in another way than the two that are watched would be scored by nothing."""
    engine = opened("mixtral")
    experts = engine._model.model.layers[1].mlp.experts
    monkeypatch.setattr(experts, "forward", lambda hidden, *_: hidden)
    message = refused(engine, "wanda", [f"blocks.{layer}.mlp.experts.W_out" for layer in range(3)])
    assert message.startswith("The hidden values of the experts of layer 1 of") and message.endswith("leave out mlp.experts.W_out.")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "olmo2", "gemma2", "stablelm, parallel", "gpt_oss", "deepseek_v2"])
def test_both_engines_agree_on_what_both_can_give(kind: str, opened: Callable[..., Any]) -> None:
    hf, gguf = opened(kind), opened(kind, "gguf")
    assert matrices(hf) == matrices(gguf)
    for metric in GGUF_METRICS:
        names = [name for name in matrices(hf) if metric == "magnitude" or not name.endswith(("shared.W_out", "W_UK", "W_UV"))]
        ours, theirs = scores(hf, metric, names), scores(gguf, metric, names)
        # llama.cpp holds the table of GELU in half precision
        wrong = {name: error for name in names if (error := nmse(theirs[name], ours[name])) > 1e-6}
        assert not wrong, metric


def test_several_passes_over_the_text_give_the_grams_of_one(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, passes = opened("mixtral"), []
    names = [name for name in matrices(engine) if not name.endswith("W_out")]
    whole = scores(engine, "obs", names)
    monkeypatch.setattr(inputs, "GRAM_BYTES", 3 * 8 * 64 * 64)
    for name, values, _ in scored(engine, WINDOWS, "obs", names, progress=lambda stage, done, total: passes.append((stage, done, total))):
        assert np.array_equal(values, whole[name])
    assert passes[-1] == (inputs.INPUTS, 2 * 8, 2 * 8), "of each layer 5 experts, 1 router and 2 of attention make 24, 3 at a time"
    monkeypatch.setattr(inputs, "GRAM_BYTES", 8 * 64 * 64 - 1)
    with pytest.raises(LayerscopeError, match=r"64 inputs squared for ln1_out of .*, 32,768 bytes, and the limit is 32,767"):
        scores(engine, "obs", names)


def full_sort(engine: Engine, metric: str, names: Any, k: int, mode: str) -> list[tuple[str, int]]:
    """(name, place) of the k best of each scope, by sorting every score."""
    found: list[tuple[str, int]] = []
    of_scope: dict[str, list[tuple[float, int, int]]] = {}
    for i, (name, values) in enumerate(scores(engine, metric, names).items()):
        scope = "" if mode == "global" else name.split(".")[1]
        of_scope.setdefault(scope, []).extend((-float(score), i, at) for at, score in enumerate(values.reshape(-1)))
    for rows in of_scope.values():
        found += [(names[i], at) for _, i, at in sorted(rows)[:k]]
    return found


def listed(chosen: Chosen) -> list[tuple[str, int]]:
    return [(chosen.names[i], at) for i, at in zip(chosen.tensor.tolist(), chosen.at.tolist(), strict=True)]


@pytest.mark.parametrize("mode", ["global", "per_layer"])
@pytest.mark.parametrize("metric", ["magnitude", "grad_x_weight", "hutchinson", "wanda"])
def test_a_ranking_is_a_full_sort_and_the_same_each_time(metric: str, mode: str, opened: Callable[..., Any]) -> None:
    engine, k = opened("llama"), 37
    names = matrices(engine, layers=(0, 2))
    ranking, again = (rank(engine, WINDOWS, metric, names, k, mode, seed=1, probes=1) for _ in range(2))
    if metric != "hutchinson":  # whose probes the other test draws by its own seed
        assert listed(ranking.top) == full_sort(engine, metric, names, k, mode)
    for column in ("tensor", "at", "value", "score", "scope"):
        assert np.array_equal(getattr(ranking.top, column), getattr(again.top, column)) and np.array_equal(getattr(ranking.bottom, column), getattr(again.bottom, column))
    assert ranking.top.scope.tolist() == ([0] * k if mode == "global" else [0] * k + [2] * k)
    assert ranking.top.value.tolist() == [float(engine.weight(name).reshape(-1)[at]) for name, at in listed(ranking.top)]
    counts = [row["n_top"] for row in ranking.tensors]
    assert sum(counts) == len(ranking.top.at) and np.bincount(ranking.bottom.tensor, minlength=len(names)).tolist() == counts
    assert ranking.bottom.score.max() < ranking.top.score.min()
    assert [row["n"] for row in ranking.tensors] == [engine.weight(name).size for name in names] and ranking.shapes == {name: engine.weight(name).shape for name in names}


def test_random_weights_are_as_many_of_the_same_tensors_and_none_of_the_top(opened: Callable[..., Any]) -> None:
    engine = opened("mixtral")
    ranking = rank(engine, WINDOWS, "magnitude", matrices(engine), 500, "per_layer")
    drawn, again, other = random_like(ranking, 0, engine.weight), random_like(ranking, 0), random_like(ranking, 1)
    assert np.bincount(drawn.tensor).tolist() == np.bincount(ranking.top.tensor).tolist() and sorted(drawn.scope) == sorted(ranking.top.scope)
    assert not set(listed(drawn)) & set(listed(ranking.top)) and len(set(listed(drawn))) == len(drawn.at)
    assert listed(drawn) == listed(again) != listed(other)
    assert drawn.value.tolist() == [float(engine.weight(name).reshape(-1)[at]) for name, at in listed(drawn)] and np.isnan(again.value).all()


def test_every_weight_outside_the_top_can_be_drawn() -> None:
    """Of 7 weights the top has 3: the other 4 are drawn about equally often."""
    column = np.zeros(3, np.int64)
    top = Chosen(("blocks.0.attn.W_Q",), column, np.array([5, 0, 3]), np.zeros(3, np.float32), np.zeros(3, np.float32), column)
    ranking = Ranking("magnitude", "global", top, top, [], {"blocks.0.attn.W_Q": (7, 1)})
    counts = np.bincount(np.concatenate([random_like(ranking, seed).at for seed in range(400)]), minlength=7)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0] and (np.abs(counts[[1, 2, 4, 6]] - 300) < 45).all()
    with pytest.raises(LayerscopeError, match="3 of the 5 weights of blocks.0.attn.W_Q, more than half"):
        random_like(dataclasses.replace(ranking, shapes={"blocks.0.attn.W_Q": (5, 1)}), 0)


def test_agreement_by_hand() -> None:
    def ranked(*at: int) -> Ranking:
        zeros = np.zeros(len(at), np.int64)
        top = Chosen(("blocks.0.mlp.W_in",), zeros, np.array(at), np.zeros(len(at), np.float32), np.zeros(len(at), np.float32), zeros)
        return Ranking("magnitude", "global", top, top, [], {"blocks.0.mlp.W_in": (3, 3)})

    found = agreement(ranked(4, 1, 7), ranked(1, 4, 2), (1, 2, 3))
    assert found["jaccard"] == {"1": 0.0, "2": 1.0, "3": 0.5}
    # The union 1, 2, 4, 7 has the ranks 2, 4, 1, 3 (2 was not kept) and 1, 3, 2, 4: 1 - 6 (1 + 1 + 1 + 1) / (4 * 15)
    assert found["spearman"] == pytest.approx(0.6)
    assert agreement(ranked(4, 1, 7), ranked(4, 1, 7), (3,)) == {"jaccard": {"3": 1.0}, "spearman": pytest.approx(1.0)}
    assert agreement(ranked(4), ranked(4), (1,))["spearman"] is None


def test_spearman_over_the_union_ties_what_was_not_kept() -> None:
    rng = np.random.default_rng(0)
    order_a, order_b = rng.permutation(50), rng.permutation(50)
    kept_a, kept_b, ranks = order_a[:20], order_b[:20], np.arange(1, 21)
    union = sorted({*kept_a.tolist(), *kept_b.tolist()})
    by_hand = [[{at: i for i, at in enumerate(kept.tolist(), 1)}.get(at, 21) for at in union] for kept in (kept_a, kept_b)]
    expected = np.corrcoef(stats.rankdata(by_hand[0]), stats.rankdata(by_hand[1]))[0, 1]
    assert analysis.spearman(kept_a, ranks, kept_b, ranks) == pytest.approx(expected)


def test_gradient_flow_has_the_norm_of_each_gradient(tiny_model: Callable[[str], TinyModel], opened: Callable[..., Any]) -> None:
    model, engine = plain(tiny_model("deepseek_v3").hf), opened("deepseek_v3")
    mean_loss(model).backward()
    flow = gradient_flow(engine, WINDOWS)
    assert flow["layers"] == [0, 1, 2] and flow["n_windows"] == 2
    norms = dict(zip(flow["components"], flow["norm"], strict=True))
    for component, module in (("attn.W_O", "self_attn.o_proj"), ("attn.W_DQ", "self_attn.q_a_proj")):
        assert norms[component] == pytest.approx([float(model.get_parameter(f"model.layers.{layer}.{module}.weight").grad.norm()) for layer in range(3)], rel=1e-4)
    assert norms["mlp.W_in"][1:] == [None, None] and norms["mlp.experts.W_in"][0] is None, "only the first layer is dense"


def test_a_summary_says_what_numpy_says_and_counts_what_is_not_finite() -> None:
    values = np.random.default_rng(0).lognormal(-3, 2, 5000).astype(np.float32)
    values[:50] = 0
    found = analysis.summary(values.reshape(50, 100))
    assert found["n"] == 5000 and found["zeros"] == 0.01 and found["not_finite"] == 0 and found["max"] == values.max()
    assert found["mean"] == pytest.approx(values.astype(float).mean()) and found["std"] == pytest.approx(values.astype(float).std())
    assert [found[name] for name in ("p50", "p90", "p99", "p999")] == pytest.approx(np.quantile(values, [0.5, 0.9, 0.99, 0.999]).tolist())
    edges = np.array(found["histogram"]["log10_edges"])
    assert edges[[0, -1]] == pytest.approx(np.log10([values[50:].min(), values.max()])) and np.diff(edges) == pytest.approx(np.full(40, (edges[-1] - edges[0]) / 40), rel=1e-4)
    assert found["histogram"]["counts"] == np.histogram(np.log10(values[50:]), edges)[0].tolist() and sum(found["histogram"]["counts"]) == 4950
    spoiled = np.concatenate([values, np.array([np.nan, np.inf, -np.inf], np.float32)])
    assert analysis.summary(spoiled) == {**found, "n": 5003, "not_finite": 3}
    empty = analysis.summary(np.full(4, np.nan, np.float32))
    assert empty["mean"] is None and empty["not_finite"] == 4 and empty["histogram"] == {"log10_edges": [], "counts": []}


def test_an_inverse_without_inputs_is_infinite_and_of_broken_ones_nan() -> None:
    assert np.isinf(analysis.inverse_diagonal(np.zeros((3, 3)))).all()
    assert np.isnan(analysis.inverse_diagonal(np.full((3, 3), np.nan))).all()
    one = np.diag([2.0, 6.0])  # H = diag(4, 12) + 0.01 * 8
    assert analysis.inverse_diagonal(one) == pytest.approx([1 / 4.08, 1 / 12.08])


def test_scores_that_are_not_finite_are_counted_and_ranked_nowhere(opened: Callable[..., Any]) -> None:
    engine, name = opened("llama"), "blocks.1.mlp.W_out"
    with torch.no_grad():
        engine._model.model.layers[1].mlp.down_proj.weight[2, 3] = float("nan")
    ranking = rank(engine, [], "magnitude", [name, "blocks.1.mlp.W_in"], 6000, "global")
    assert [row["not_finite"] for row in ranking.tensors] == [1, 0]
    assert (name, 2 * 96 + 3) not in listed(ranking.top) + listed(ranking.bottom) and np.isfinite(ranking.top.score).all()


# -- the model afterwards ---------------------------------------------------------------------------------------------------------


def traces_left(engine: HfEngine) -> list[str]:
    """Gradients, hooks and taps that are still in the model."""
    model = engine._model
    left = [name for name, parameter in model.named_parameters() if parameter.grad is not None or not parameter.requires_grad or parameter._post_accumulate_grad_hooks]
    return left + [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "layerscope_tap")]


@pytest.mark.parametrize("how", ["finished", "abandoned", "cancelled", "not finite"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_model_is_what_it_was(metric: str, how: str, opened: Callable[..., Any]) -> None:
    engine, asked = opened("gemma2"), itertools.count()
    names, windows = matrices(engine), WINDOWS
    if how == "not finite":
        with torch.no_grad():
            engine._model.model.norm.weight[0] = float("nan")
    before = {name: values.clone() for name, values in engine._model.state_dict().items()}

    def run() -> None:
        found = scored(engine, windows, metric, names, probes=1, should_stop=(lambda: next(asked) > 4) if how == "cancelled" else lambda: False)
        for _ in itertools.islice(found, 1 if how == "abandoned" else None):
            pass

    fails = {"cancelled": Cancelled, "not finite": LayerscopeError if metric in ("grad_x_weight", "grad_squared", "hutchinson") else None}.get(how)
    if fails:
        with pytest.raises(fails):
            run()
    else:
        run()
    assert not traces_left(engine)
    assert all(torch.equal(before[name].nan_to_num(7), values.nan_to_num(7)) for name, values in engine._model.state_dict().items())


def test_what_did_not_take_gradients_takes_none_afterwards(opened: Callable[..., Any]) -> None:
    engine = opened("llama")
    engine._model.requires_grad_(False)
    assert scores(engine, "grad_x_weight", ["blocks.0.attn.W_Q"])["blocks.0.attn.W_Q"].any()
    assert not any(parameter.requires_grad for parameter in engine._model.parameters())


# -- refusals ---------------------------------------------------------------------------------------------------------------------


def refused(engine: Engine, metric: str, names: Any, windows: Any = WINDOWS, **options: Any) -> str:
    with pytest.raises(LayerscopeError) as caught:
        list(scored(engine, windows, metric, names, **options))
    return str(caught.value)


def test_what_cannot_be_scored_is_refused_by_name(opened: Callable[..., Any]) -> None:
    hf, gguf, w_q = opened("mixtral"), opened("mixtral", "gguf"), ["blocks.0.attn.W_Q"]
    assert "no metric 'taylor'; metrics are magnitude, grad_x_weight" in refused(hf, "taylor", w_q)
    for metric in ("grad_x_weight", "grad_squared", "hutchinson"):
        assert f"no gradients for {metric}; metrics that it can give are magnitude, wanda, obs." in refused(gguf, metric, w_q)
    with pytest.raises(LayerscopeError, match="gradient flow needs a Hugging Face model"):
        gradient_flow(gguf, WINDOWS)
    shared = opened("qwen2_moe")
    for engine, metric in itertools.product((hf, gguf), ("wanda", "obs")):
        message = refused(shared, metric, ["blocks.0.mlp.shared.W_out"])
        assert message.startswith("The input of blocks.0.mlp.shared.W_out is no site of") and "mlp.experts.W_in" in message
        assert "no window of text" in refused(engine, metric, w_q, windows=[])
    assert "at least one matrix" in refused(hf, "magnitude", [])
    assert "has no weight 'blocks.9.attn.W_Q'" in refused(hf, "grad_x_weight", ["blocks.9.attn.W_Q"])
    assert "0 probes" in refused(hf, "hutchinson", w_q, probes=0)
    assert "no window of text" in refused(hf, "grad_x_weight", w_q, windows=[])
    assert "Window 2 of 2 has 1 token, and at least 2" in refused(hf, "grad_x_weight", w_q, windows=[[0, 1], [5]])
    assert "Token id 999 is outside" in refused(hf, "grad_x_weight", w_q, windows=[[0, 999]])
    assert "1,025 tokens, more than the 1,024" in refused(hf, "grad_x_weight", w_q, windows=[[0] * 1025])


def test_a_loss_that_is_not_finite_is_said_with_its_window(opened: Callable[..., Any]) -> None:
    engine = opened("llama")
    with torch.no_grad():
        engine._model.model.embed_tokens.weight[201] = float("nan")
    for metric in ("grad_x_weight", "grad_squared", "hutchinson"):
        assert refused(engine, metric, ["blocks.0.attn.W_Q"]) == "The loss of window 2 of 2 is nan, and gradients need a finite one."


def test_weights_that_are_packed_have_no_gradient(opened: Callable[..., Any]) -> None:
    engine = opened("llama")
    packed = torch.nn.Parameter(torch.zeros((64, 64), dtype=torch.int8), requires_grad=False)
    engine._model.model.layers[0].self_attn.q_proj.weight = packed
    assert "'blocks.0.attn.W_Q'" in refused(engine, "grad_x_weight", ["blocks.0.attn.W_Q"]) and "packed" in refused(engine, "magnitude", ["blocks.0.attn.W_Q"])


def test_an_operation_without_a_second_derivative_is_named(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention

    engine = opened("llama")
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backends: contextlib.nullcontext())
    message = refused(engine, "hutchinson", ["blocks.0.attn.W_Q"])
    assert "has no Hessian here: PyTorch has no second derivative of aten::_scaled_dot_product" in message and not traces_left(engine)


def test_names_of_matrices_and_what_is_not_there(opened: Callable[..., Any]) -> None:
    engine = opened("gpt2")
    assert matrices(engine, [1]) == tuple(f"blocks.1.{part}" for part in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"))
    assert matrices(engine, components=["mlp.W_out", "unembed.W_U"]) == ("blocks.0.mlp.W_out", "blocks.1.mlp.W_out", "blocks.2.mlp.W_out", "unembed.W_U")
    for options, says in (
        ({"layers": [3]}, "Layer 3 is outside 0-2"),
        ({"components": ["mlp.W_gate"]}, "has no component 'mlp.W_gate'; it has embed.W_E, pos_embed.W_pos, attn.W_Q"),
        ({"layers": [0], "components": ["unembed.W_U"]}, "has no unembed.W_U in layers 0"),
    ):
        with pytest.raises(LayerscopeError, match=says):
            matrices(engine, **options)
    for k, mode, says in (
        (3 * 64 * 64 + 1, "per_layer", "top 12,289 are asked for, and the chosen matrices of layer 0 have 12,288 weights"),
        (9 * 64 * 64 + 1, "global", "top 36,865 are asked for, and the chosen matrices have 36,864 weights"),
        (0, "global", "is 0; it must be between 1 and 1,000,000"),
        (5, "by_row", "no mode 'by_row'; modes are global, per_layer"),
    ):
        with pytest.raises(LayerscopeError, match=says):
            rank(engine, WINDOWS, "magnitude", matrices(engine, components=["attn.W_Q", "attn.W_K", "attn.W_V"]), k, mode)
    with pytest.raises(LayerscopeError, match="unembed.W_U is in no layer"):
        rank(engine, WINDOWS, "magnitude", ["unembed.W_U"], 5, "per_layer")

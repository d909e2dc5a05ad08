"""A super expert planted in a tiny model is found in a trace of it, in both engines, and it alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backend.analysis.super_experts import SuperExpert
from backend.engines import OpenOptions, open_engine
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec, capture
from backend.reports.super_experts import SuperExperts, super_experts
from backend.sites import STANDARD_SITES
from backend.trace import Trace, open_trace
from tests.tiny_models import TinyModel, save_tiny

LAYER, EXPERT, DIMENSION = 1, 2, 7
PROMPT = "The capital of France is Paris and the capital of Italy is"


def planted(folder: Path) -> TinyModel:
    """A tiny Mixtral whose expert L1E2 writes thousands into dimension 7 of every token that chooses it."""
    tiny = save_tiny("mixtral", folder)
    file = folder / "model.safetensors"
    tensors, name = load_file(file), f"model.layers.{LAYER}.block_sparse_moe.experts.{EXPERT}.w2.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][DIMENSION] *= 20_000
    save_file(tensors, file, metadata={"format": "pt"})
    return tiny


def traced(path: Path, out: Path, sites: tuple[str, ...] = (*STANDARD_SITES, "expert_out")) -> Trace:
    engine = open_engine(path, OpenOptions(device="cpu", n_gpu_layers=0, n_threads=1))
    try:
        held = tuple(site for site in sites if site in engine.sites)
        return open_trace(capture(engine, CaptureSpec(prompt=PROMPT, sites=held), out))
    finally:
        engine.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return planted(tmp_path_factory.mktemp("planted") / "mixtral")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_planted_super_expert_is_found_and_it_alone(tiny: TinyModel, tmp_path: Path, form: str) -> None:
    trace = traced(getattr(tiny, form), tmp_path)
    assert trace.integrity["expert_sum"]["ok"] and trace.integrity["expert_sum"]["checked"] == 3
    found = super_experts(trace)
    assert found.layers == [0, 1, 2] and found.forming == [LAYER] and found.unknown == []
    assert [(each.layer, each.expert, each.dimension, each.share) for each in found.verdict.supers] == [(LAYER, EXPERT, DIMENSION, 1.0)]
    best = found.verdict.supers[0]
    at = trace["expert_indices", LAYER][best.position].tolist().index(EXPERT)
    out, weight = trace["expert_out", LAYER][best.position, at, DIMENSION], trace["expert_weights", LAYER][best.position, at]
    assert np.isclose(abs(out) / weight, best.size, rtol=1e-3) and best.added >= abs(out) * 0.999
    unused = [(row, e) for row, layer in enumerate(found.layers) for e in range(5) if e not in trace["expert_indices", layer]]
    assert all(found.sizes[at] == 0 for at in unused) and (found.sizes > 0).sum() == 15 - len(unused)


def test_the_model_without_the_plant_has_none(tiny_mixtral: TinyModel, tmp_path: Path) -> None:
    found = super_experts(traced(tiny_mixtral.hf, tmp_path))
    assert found.forming == [] and found.verdict.supers == [] and len(found.verdict.by_size) == 1


def test_what_was_found_survives_as_json_and_blocks_of_positions_change_nothing(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced(tiny.hf, tmp_path)
    whole = super_experts(trace)
    again = SuperExperts.from_json(json.loads(json.dumps(whole.to_json())))
    assert np.array_equal(again.sizes, whole.sizes) and again.verdict == whole.verdict and isinstance(again.verdict.ranked[0], SuperExpert)
    monkeypatch.setattr("backend.reports.super_experts._BLOCK_VALUES", 1000)  # 7 positions of 2 x 64
    assert super_experts(trace).verdict == whole.verdict


def test_a_trace_without_the_residual_stream_says_that_layers_cannot_be_told_and_one_without_outputs_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    found = super_experts(traced(tiny.hf, tmp_path, ("expert_indices", "expert_weights", "expert_out")))
    assert found.unknown == [0, 1, 2] and found.verdict.supers == [] and found.verdict.by_size[0].expert == EXPERT
    with pytest.raises(LayerscopeError, match="does not hold expert_out, expert_indices, expert_weights"):
        super_experts(traced(tiny.hf, tmp_path, ("expert_indices", "expert_weights")))


def test_the_table_names_the_published_super_experts_of_a_model_of_that_name(tmp_path: Path) -> None:
    from components.moe_super_experts import _table

    trace = traced(planted(tmp_path / "Mixtral-8x7B-tiny").hf, tmp_path / "traces")
    table = _table(trace, super_experts(trace))
    head, body = table.content.children
    rows = {row.children[0].children: [cell.children for cell in row.children] for row in body.children}
    assert [cell.children for cell in head.children.children][-2:] == ["Super", "Published"]
    assert rows["L1E3"][-2:] == ["no", "yes"] and rows[f"L{LAYER}E{EXPERT}"][-2:] == ["yes", "–"]

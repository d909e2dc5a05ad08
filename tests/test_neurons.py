"""Neurons: the largest at a token, what they write into the vocabulary, and where over many traces they are largest."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.attribution import Ending
from backend.analysis.neurons import Neuron, merge_top, top_neurons, written_direction
from backend.derived import Derived
from backend.engines import OpenOptions, open_engine
from backend.errors import LayerscopeError
from backend.experiments import Context
from backend.experiments.capture import CaptureSpec, capture
from backend.experiments.neurons import neuron_examples_job, neuron_tokens_job
from backend.intervention import Intervention
from backend.library import Library
from backend.readout import open_readout
from backend.reports.neurons import EXAMPLES, Examples, find_examples, promoted
from backend.trace import open_trace
from config import load_settings

RNG = np.random.default_rng(0)


def test_the_largest_neurons_by_hand():
    layers = [(0, np.array([1.0, -5, 2])), (3, np.array([4.0, np.nan, 0.5])), (4, np.array([-np.inf, 0, 0]))]
    found, bad = top_neurons(layers, 4)
    assert found == [Neuron(4, 0, -np.inf), Neuron(0, 1, -5), Neuron(3, 0, 4), Neuron(0, 2, 2)] and bad == 2


def test_the_largest_of_each_column_over_pieces_are_those_of_a_plain_sort():
    values = RNG.normal(size=(50, 7)).astype(np.float32)
    known = None
    for start in range(0, 50, 8):
        known = merge_top(known, values[start : start + 8], start, 5)
    order = np.argsort(-values, axis=0)[:5]
    np.testing.assert_array_equal(known[1], order)
    np.testing.assert_array_equal(known[0], np.take_along_axis(values, order, 0))
    few = merge_top(None, np.array([[np.nan, 1.0]]), 0, 3)
    assert few[1].tolist() == [[-1, 0]]


def test_what_a_neuron_writes_by_hand():
    ending = Ending("rms", 0.0, np.array([2.0, 3.0]))
    np.testing.assert_array_equal(written_direction(ending, np.array([1.0, -1.0])), [2, -3])
    np.testing.assert_array_equal(written_direction(Ending("layer", 0.0, np.array([2.0, 3.0])), np.array([5.0, 1.0]), np.array([1.0, 3.0])), [2, -3])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_neuron_s_tokens_are_those_that_a_push_along_its_column_raises_most(tiny_model, kind):
    """The oracle: push a residual stream a little along the column, to and fro, and see which logits of the engine move most. The stream is
    orthogonal to the column, so that the norm's scale stays what it is."""
    tiny = tiny_model(kind)
    engine, readout = open_engine(tiny.hf, OpenOptions(device="cpu")), open_readout(tiny.hf)
    neurons, cap = [(1, 5), (2, 0), (1, 3)], readout.ending.softcap
    found = promoted(readout, neurons)
    for i, (layer, neuron) in enumerate(neurons):
        column = readout.weights[f"blocks.{layer}.mlp.W_out"][:, neuron].astype(np.float64)
        if f"blocks.{layer}.ln2_post.w" in readout.weights:
            column = column * readout.weights[f"blocks.{layer}.ln2_post.w"]
        along = column - column.mean() if readout.ending.norm == "layer" else column
        resid = RNG.normal(size=len(column))
        resid -= along * (resid @ along) / (along @ along)
        step = 0.05 * column / np.linalg.norm(column)
        low, high = engine.unembed(np.stack([resid - step, resid + step]).astype(np.float32)).astype(np.float64)
        moved = cap * (np.arctanh(high / cap) - np.arctanh(low / cap)) if cap else high - low
        assert list(np.argsort(-moved)[:4]) == list(found.for_ids[i, :4]) and list(np.argsort(moved)[:4]) == list(found.against_ids[i, :4])
        shares = np.concatenate([found.for_logits[i] / moved[found.for_ids[i]], found.against_logits[i] / moved[found.against_ids[i]]])
        np.testing.assert_allclose(shares, shares[0], rtol=2e-3)
    engine.close()


def test_a_neuron_or_layer_that_is_not_there_is_refused(tiny_llama, tiny_mixtral):
    with pytest.raises(LayerscopeError, match="Neuron 1.96 is outside 0-95"):
        promoted(open_readout(tiny_llama.hf), [(1, 96)])
    with pytest.raises(LayerscopeError, match="layer 0 has no MLP of its own"):
        promoted(open_readout(tiny_mixtral.hf), [(0, 1)])


@pytest.fixture(scope="module")
def shelf(tiny_llama, tmp_path_factory):
    """A library with three traces of one model, one of them with an edited layer, and the context of its jobs."""
    data = tmp_path_factory.mktemp("data")
    settings = load_settings(data_dir=data, models_dirs=[tiny_llama.hf.parent], use_hf_cache=False)
    library = Library.from_settings(settings)
    engine = open_engine(tiny_llama.hf, OpenOptions(device="cpu"))
    specs = [CaptureSpec("The capital of France is"), CaptureSpec("Mary gave the book to John", sites=("mlp_post",)), CaptureSpec("x", sites=("embed",))]
    ids = [library.add(capture(engine, spec, settings.traces_dir)).id for spec in specs]
    engine.close()
    derived, seen = Derived(data / "cache"), []
    context = Context(engine=lambda *_: None, traces_dir=settings.traces_dir, library=library, derived=derived, progress=lambda *step: seen.append(step))
    return context, ids, tiny_llama.hf.name, seen


def test_the_search_over_traces_finds_what_a_look_at_all_of_them_finds(shelf):
    context, ids, model, seen = shelf
    assert neuron_examples_job(context, {"model": model, "layer": 1, "traces": ids}) == {"layer": 1, "n_traces": 2}
    assert ("traces", 1, 3) in seen
    found = Examples.load(context.derived, Examples.key(model, 1, reversed(ids)))
    every = [(trace_id, pos, float(value[7])) for trace_id in ids[:2] for pos, value in enumerate(context.library.open(trace_id)["mlp_post", 1])]
    largest = sorted(every, key=lambda each: -each[2])[:EXAMPLES]
    assert list(found.of(7, 0)) == largest
    assert [value for *_, value in found.of(7, 1)] == sorted(value for *_, value in every)[:EXAMPLES]
    assert Examples.load(context.derived, Examples.key(model, 1, ids[:2])) is None  # other traces, another search


def test_tokens_of_neurons_come_from_the_job_too(shelf):
    context, _, model, _ = shelf
    identity = neuron_tokens_job(context, {"model": model, "neurons": [[0, 3], [2, 90]]})["identity"]
    expected = promoted(open_readout(context.library.resolve_model(model).path), [(2, 90)])
    stored = context.derived.get_json(("neuron_tokens", identity, 2, 90))
    assert stored["for_ids"] == expected.for_ids[0].tolist() and stored["against_ids"] == expected.against_ids[0].tolist()


def test_values_that_are_not_finite_are_counted_and_nan_takes_no_place(tiny_llama, tmp_path):
    engine = open_engine(tiny_llama.hf, OpenOptions(device="cpu"))
    edit = Intervention("mlp_post", 1, "set", 1e39, dim=4, pos=2)
    trace = open_trace(capture(engine, CaptureSpec("The capital", sites=("mlp_post",), precision="float32", interventions=(edit,)), tmp_path))
    engine.close()
    found = find_examples([trace], 1)
    assert found.n_bad == 1 and next(found.of(4, 0)) == (trace.id, 2, np.inf)
    with pytest.raises(LayerscopeError, match="No trace holds mlp_post of layer 1"):
        find_examples([], 1)


def test_the_attribution_job_keeps_what_a_direct_one_gives(shelf):
    from backend.experiments.attribution import attribution_job
    from backend.reports.attribution import Attribution, attribute

    context, ids, model, _ = shelf
    identity = attribution_job(context, {"trace_id": ids[0], "position": -1, "token": 9, "against": 12})["identity"]
    trace = context.library.open(ids[0])
    stored = context.derived.get_json(("attribution", trace.id, identity, trace.n_tokens - 1, 9, 12))
    assert Attribution.from_json(stored) == attribute(trace, open_readout(context.library.resolve_model(model).path), -1, 9, 12)

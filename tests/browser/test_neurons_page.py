"""The Neurons page in a real browser: values, tokens and places are those of the traces and the weights, and the address restores them."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.neurons import top_neurons
from backend.readout import open_readout
from backend.reports.neurons import EXAMPLES, promoted
from components.token_label import token_label
from tests.browser.test_trace_pages import WAIT_MS, partial, query_of, server, visit  # noqa: F401  fixtures

pytestmark = pytest.mark.browser


def test_the_largest_neurons_of_a_token_and_one_of_them_over_the_prompt(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("neurons", "neuron-bars", pos=4)
    top, _ = top_neurons(((layer, trace["mlp_post", layer][4]) for layer in range(trace.info.n_layers)), 20)
    rows = page.locator("#neuron-table tbody tr")
    assert [rows.nth(i).locator("td").first.inner_text() for i in range(3)] == [f"{each.layer}.{each.neuron}" for each in top[:3]]
    assert float(rows.first.locator("td").nth(1).inner_text()) == pytest.approx(top[0].value, rel=1e-3)
    third = top[2]
    rows.nth(2).click()
    page.wait_for_function(f"() => document.querySelector('#neuron-title').textContent === 'Neuron {third.layer}.{third.neuron} on this prompt'")
    drawn = page.evaluate("() => Array.from(document.querySelector('#neuron-bars .js-plotly-plot')._fullData[0].y)")
    np.testing.assert_allclose(drawn, trace["mlp_post", third.layer][:, third.neuron], rtol=1e-6)
    page.wait_for_function(f"() => new URL(location).searchParams.get('neuron') === '{third.neuron}'")
    page.reload()
    page.wait_for_function(f"() => document.querySelector('#neuron-title')?.textContent === 'Neuron {third.layer}.{third.neuron} on this prompt'")
    assert query_of(page)["layer"] == str(third.layer) and query_of(page)["pos"] == "4"


def test_what_a_neuron_writes_is_its_column_through_the_unembedding(server, visit):  # noqa: F811
    _, trace, model = server
    page = visit("neurons", "neuron-bars", layer=1, neuron=7)
    found = promoted(open_readout(model.hf), [(1, 7)])
    page.wait_for_function("() => document.querySelectorAll('#neuron-written tbody tr').length > 0")
    shown = page.locator("#neuron-written table").first.locator("tbody tr td:nth-child(2)").all_inner_texts()
    assert [float(text) for text in shown] == pytest.approx(found.for_logits[0].tolist(), abs=6e-4)
    page.wait_for_function("() => document.querySelector('#neuron-list-box').hidden", timeout=4 * WAIT_MS)  # the vocabulary is listed by itself
    from backend.engines import OpenOptions, open_engine

    engine = open_engine(model.hf, OpenOptions())
    names = [token_label(text, max_length=18) for text in engine.token_texts(found.for_ids[0].tolist())]
    engine.close()
    page.wait_for_function(f"() => document.querySelector('#neuron-written tbody td').textContent === {names[0]!r}")
    assert page.locator("#neuron-written table").first.locator("tbody tr td:first-child").all_inner_texts() == names


def test_the_search_over_all_traces_shows_where_a_neuron_is_largest_and_leads_there(server, partial, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("neurons", "neuron-bars", layer=1, neuron=3)
    page.locator("#neuron-search").click()
    page.wait_for_function("() => document.querySelectorAll('#neuron-examples tbody tr').length > 0", timeout=4 * WAIT_MS)
    every = [(float(value), each, at) for each in (trace, partial) for at, value in enumerate(each["mlp_post", 1][:, 3])]
    every.sort(key=lambda item: -item[0])
    rows = page.locator("#neuron-examples tbody tr")
    assert rows.count() == EXAMPLES and float(rows.first.locator("td").first.inner_text()) == pytest.approx(every[0][0], rel=1e-3)
    at = every[0][2]
    assert rows.first.locator(".tok-here").inner_text() == token_label(trace.token_texts[at], at in trace.special, 18)
    assert rows.locator("b").count() == 0
    page.locator("#neuron-side").click()
    page.locator(".dash-dropdown-option, .dash-dropdown-options label").filter(has_text="Most negative").first.click()
    page.wait_for_function("() => document.querySelector('#examples-title').textContent === 'Where 1.3 is most negative'")
    assert float(rows.first.locator("td").first.inner_text()) == pytest.approx(every[-1][0], rel=1e-3)
    page.wait_for_function("() => new URL(location).searchParams.get('side') === 'smallest'")
    rows.first.locator("a").click()
    page.wait_for_function(f"() => new URL(location).searchParams.get('pos') === '{every[-1][2]}'")

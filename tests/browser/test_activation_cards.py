"""Distributions, massive activations and matrix inputs on the Activations page: the numbers of the trace, and the address that restores them."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.distributions import channel_energy, channel_statistics
from backend.analysis.outliers import Limits, find_outliers
from tests.browser.test_trace_pages import query_of, server, visit  # noqa: F401  fixtures

pytestmark = pytest.mark.browser


def lines(page, graph: str) -> dict[str, np.ndarray]:
    found = page.evaluate(f"() => document.querySelector('#{graph} .js-plotly-plot')._fullData.map(t => [t.name, Array.from(t.y)])")
    return {name: np.array(values, dtype=np.float64) for name, values in found}


def test_quantiles_are_those_of_the_trace_at_every_layer(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "bands", site="mlp_post", layer=1)
    drawn = lines(page, "bands")
    for title, share in (("min", 0), ("1 %", 0.01), ("median", 0.5), ("99 %", 0.99), ("max", 1)):
        expected = [np.quantile(trace["mlp_post", layer].ravel(), share) for layer in range(trace.info.n_layers)]
        np.testing.assert_allclose(drawn[title], expected, rtol=1e-5, atol=1e-7)


def test_limits_of_outliers_are_typed_followed_and_kept_in_the_address(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "outlier-lines", site="resid_post", layer=1)
    assert page.locator("#outlier-said").inner_text().startswith("No value meets both limits; the 8 largest")
    stream = [(layer, trace["resid_post", layer]) for layer in range(trace.info.n_layers)]
    largest = max(float(np.abs(values).max()) for _, values in stream)
    size = round(0.8 * largest, 3)
    for name, value in (("size", size), ("ratio", 2)):
        page.locator(f"#outlier-{name}").fill(str(value))
        page.locator(f"#outlier-{name}").press("Enter")
    found = find_outliers(stream, Limits(size=size, ratio=2))
    page.wait_for_function(f"() => document.querySelector('#outlier-said').textContent.startsWith('{found.n_massive:,} values above {size:g} and 2 times the median')")
    assert found.n_massive >= 1
    first = found.peaks[0]
    drawn = next(iter(lines(page, "outlier-lines").values()))
    np.testing.assert_allclose(drawn, [abs(values[first.position, first.dimension]) for _, values in stream], rtol=1e-6)
    cells = page.locator("#outlier-peaks tbody tr").first.locator("td").all_inner_texts()
    assert cells[1:3] == [str(first.dimension), str(first.layer)] and float(cells[3]) == pytest.approx(first.value, rel=1e-4)
    page.wait_for_function("() => new URL(location).searchParams.get('times') === '2'")
    page.reload()
    page.wait_for_function(f"() => document.querySelector('#outlier-said')?.textContent.startsWith('{found.n_massive:,} values above')")
    assert query_of(page)["big"] == f"{size:g}"


def test_the_channels_of_a_matrix_s_input_are_llama_cpp_s_statistics_of_this_trace(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "norms", inputs="z")
    page.wait_for_function("() => document.querySelector('#channel-said')?.textContent.startsWith('z enters W_O')")
    energies = [channel_energy(trace["z", layer])[0] for layer in range(trace.info.n_layers)]
    expected = channel_statistics(energies[1], energies[0])
    cells = page.locator("#channel-table tbody tr").nth(1).locator("td").all_inner_texts()
    assert float(cells[1]) == pytest.approx(expected["sum"], rel=1e-3) and float(cells[-1]) == pytest.approx(expected["cossim"], rel=1e-3)
    assert cells[6:8] == [f"{expected['active']:.2%}", f"{len(energies[0])}"]

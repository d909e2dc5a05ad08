"""Generate in a real browser: tokens stream, a stop midway keeps them, the trace is what was shown, and the address gives the view back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlparse

import numpy as np
import pytest

from backend.trace import Trace, open_trace
from components.token_label import token_label
from tests.browser.served import served
from tests.tiny_models import TinyModel, save_tiny

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT_MS = 150_000  # generous: other tests share the machine
PROMPT = "Mary gave <b>x</b>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Deep, so that it writes slowly enough to be stopped; greedily it does not end by itself."""
    return save_tiny("mistral", tmp_path_factory.mktemp("models") / "deep-mistral", num_hidden_layers=60)


@pytest.fixture(scope="module")
def server(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A running server without a trace: (address, traces folder)."""
    data = tmp_path_factory.mktemp("data")
    assert tiny.gguf.is_file()
    with served(data, [tiny.hf.parent]) as address:
        yield address, data / "traces"


@pytest.fixture
def visit(server, page):
    """Open the page with a query; fails on any error in the browser's console."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(**query: object):
        page.goto(f"{server[0]}/generate?{urlencode(query)}", wait_until="domcontentloaded")
        page.wait_for_selector("#gen-run")
        page.wait_for_selector("#live-text > *")
        return page

    yield go
    assert problems == []


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def written(page) -> list[str]:
    return page.evaluate("() => [...document.querySelectorAll('#live-text .tok.written')].map(token => token.textContent)")


def finished(page, server) -> Trace:
    """The trace that the page arrived at."""
    page.wait_for_function("() => new URL(location).searchParams.get('trace')")
    page.wait_for_selector("#gen-step")
    return open_trace(server[1] / f"{query_of(page)['trace']}.h5")


def labels_of(trace: Trace) -> list[str]:
    return [token_label(text, at in trace.special) for at, text in enumerate(trace.token_texts)][trace.n_prompt :]


def test_a_generation_that_is_stopped_midway_keeps_its_tokens(server, tiny, visit):
    page = visit(model=tiny.hf.name, prompt=PROMPT, new=512, temperature=0)
    page.click("#gen-run")
    page.wait_for_function("() => document.querySelectorAll('#live-text .tok.written').length >= 3")
    job = query_of(page)["job"]
    page.reload()  # the address alone leads back to the running job
    page.wait_for_function("() => document.querySelectorAll('#live-text .tok.written').length >= 4")
    page.wait_for_function("() => document.querySelector('#gen-norms .js-plotly-plot')?._fullData?.[0]?.z?.length === 60")
    assert query_of(page)["job"] == job
    page.click("#gen-stop")
    seen = written(page)
    with finished(page, server) as trace:
        labels = labels_of(trace)
        assert len(seen) <= len(labels) < 512
        assert labels[: len(seen)] == seen, "every token that was shown is kept"
        page.wait_for_function(f"() => document.querySelectorAll('#live-text .tok.written').length === {len(labels)}")
        assert written(page) == labels
        assert page.locator("#live-text b").count() == 0, "text of tokens is text"
        page.wait_for_function(f"() => document.querySelector('#gen-curves .js-plotly-plot')._fullData[0].y.length === {len(labels)}")
        shown = page.evaluate("() => Array.from(document.querySelector('#gen-curves .js-plotly-plot')._fullData[0].y)")
        np.testing.assert_allclose(shown, np.exp(trace.next_logprobs[trace.n_prompt - 1 : -1]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("engine", ["hf", "gguf"])
def test_a_finished_generation_opens_its_trace_and_the_address_gives_step_and_head_back(server, tiny, visit, engine):
    model = tiny.hf.name if engine == "hf" else tiny.gguf.name
    page = visit(model=model, prompt=PROMPT, new=6, temperature=1.5, top_k=30, seed=3)
    page.click("#gen-run")
    with finished(page, server) as trace:
        labels = labels_of(trace)
        n = len(labels)
        page.wait_for_function(f"() => document.querySelectorAll('#live-text .tok.written').length === {n}")
        page.locator("#live-text .tok.written").last.click()
        page.wait_for_function(f"() => document.querySelector('#gen-step-said').textContent.startsWith('Step {n} writes')")
        page.evaluate("() => { for (const [id, value] of [['gen-layer', 2], ['gen-head', 1]]) window.dash_clientside.set_props(id, { value }); }")
        page.wait_for_function("() => new URL(location).searchParams.get('layer') === '2' && new URL(location).searchParams.get('head') === '1'")
        page.reload()
        page.wait_for_function(f"() => document.querySelector('#gen-step-said')?.textContent.startsWith('Step {n} writes')")
        page.wait_for_function("() => document.querySelector('#gen-attention-title')?.textContent.startsWith('Where head 2.1 looks')")
        page.wait_for_function("() => document.querySelector('#gen-attention .js-plotly-plot')?._fullData?.length > 0")
        bars = page.evaluate("() => Array.from(document.querySelector('#gen-attention .js-plotly-plot')._fullData[0].y)")
        at = trace.n_tokens - 2
        np.testing.assert_allclose(bars, trace.head("attn_pattern", 2, 1)[at, : at + 1], atol=1e-6)
        assert query_of(page)["step"] == str(n) and query_of(page)["top_k"] == "30"
        first = page.locator("#gen-next tbody tr").first.inner_text().split("\t")
        assert first[2].strip() == str(trace.top_ids[at, 0])
        page.locator("#live-text .tok.written").first.hover()
        assert labels[0] in page.locator(".tip").inner_text() and "most probable" in page.locator(".tip").inner_text()


def test_a_context_that_is_too_small_is_one_sentence(server, tiny, visit):
    page = visit(model=tiny.hf.name, prompt="word " * 380, new=512, temperature=0)
    page.click("#gen-run")
    page.wait_for_function("() => /more than the 1,024 of the context|context of .* is 1,024/.test(document.querySelector('.form').textContent)")

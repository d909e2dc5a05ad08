"""Claims about batches: one trace a prompt and never two, a failure is named and the rest goes on, cancel keeps what is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from backend.aggregates import Aggregates
from backend.batches import Batch, Batches
from backend.derived import Derived
from backend.engines import Engine, OpenOptions, open_engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context
from backend.experiments import batch as batch_module
from backend.experiments.batch import aggregate_job, batch_job
from backend.library import Library
from backend.prompt_lists import BatchPrompt
from tests.test_cli import run  # noqa: F401  the fixture
from tests.tiny_models import TinyModel

PROMPTS = [BatchPrompt("The capital", "geo", ("a",)), BatchPrompt("word " * 1200, "long"), BatchPrompt("Mary gave", "names"), BatchPrompt("John", "names")]
SETTINGS = {"sites": ["resid_post", "attn_pattern"], "max_new_tokens": 0}


@pytest.fixture(scope="module", params=["hf", "gguf"])
def engine(request: pytest.FixtureRequest, tiny_mistral: TinyModel) -> Iterator[Engine]:
    opened = open_engine(getattr(tiny_mistral, request.param), OpenOptions())
    yield opened
    opened.close()


@pytest.fixture
def lab(engine: Engine, tmp_path: Path) -> Callable[..., tuple[Context, Batch]]:
    """A context on a data folder of its own with a batch of PROMPTS; `opened` counts how often the engine was asked for."""
    library, batches, opened = Library(tmp_path, shelf=None, secret_key=b"k" * 32), Batches(tmp_path), []  # type: ignore[arg-type]

    def source(model: str, options: dict) -> Engine:
        opened.append(model)
        return engine

    def make() -> tuple[Context, Batch]:
        context = Context(engine=source, traces_dir=library.traces_dir, library=library, derived=Derived(tmp_path / "cache"), batches=batches, extra={"opened": opened})
        return context, batches.create("trial", "tiny", SETTINGS, PROMPTS)

    return make


def test_every_prompt_becomes_a_trace_and_one_that_fails_is_named(lab) -> None:
    context, batch = lab()
    told: list[tuple] = []
    context.progress = lambda *what: told.append(what)
    assert batch_job(context, {"batch_id": batch.id}) == {"batch_id": batch.id, "done": 3, "failed": 1}
    assert context.extra["opened"] == ["tiny"], "the engine stays warm"
    items = context.batches.items(batch.id)
    assert "more than the 1,024 of the context" in items[1].error and not items[1].trace_id
    for item in (items[0], items[2], items[3]):
        with context.library.open(item.trace_id) as trace:
            assert trace.prompt == item.prompt.text and trace.category == item.prompt.category and set(trace.stored) == set(SETTINGS["sites"])
            assert trace.tags == [*item.prompt.tags, "batch:trial", batch.tag]
            assert item.logprob == pytest.approx(trace.next_logprobs[:-1].mean(), rel=1e-5) and item.entropy == pytest.approx(trace.entropy[:-1].mean(), rel=1e-5)
    assert context.library.count_traces(batch.tag) == 3 == context.library.count_traces("batch:trial")
    assert [what for what in told if what[0] == "prompts"] == [("prompts", n, 4) for n in range(5)]
    assert context.batches.categories(batch.id) == {"geo": 1, "names": 2}


def test_cancel_keeps_what_is_done_and_going_on_doubles_nothing(lab) -> None:
    context, batch = lab()
    context.should_stop = lambda: context.batches.get(batch.id).n_done + context.batches.get(batch.id).n_failed >= 2
    with pytest.raises(Cancelled):
        batch_job(context, {"batch_id": batch.id})
    first = context.batches.items(batch.id)[0]
    assert context.library.count_traces() == 1 and not list(context.traces_dir.glob("*.part"))
    made = context.library.summary(first.trace_id).sha256
    context.should_stop = lambda: False
    assert batch_job(context, {"batch_id": batch.id})["done"] == 3
    assert context.library.count_traces() == 3 and context.library.summary(first.trace_id).sha256 == made
    assert batch_job(context, {"batch_id": batch.id})["done"] == 3 and context.library.count_traces() == 3


def test_a_trace_whose_job_died_before_it_was_noted_is_taken_as_it_is(lab, monkeypatch: pytest.MonkeyPatch) -> None:
    context, batch = lab()

    class Died(Exception):
        pass

    def die(*_: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Aggregates, "put_row", die)
        with pytest.raises(Died):
            batch_job(context, {"batch_id": batch.id})
    assert context.library.count_traces() == 1 and context.batches.get(batch.id).n_done == 0
    ran: list[str] = []
    real = batch_module.capture
    monkeypatch.setattr(batch_module, "capture", lambda engine, spec, *rest, **named: ran.append(spec.prompt) or real(engine, spec, *rest, **named))
    batch_job(context, {"batch_id": batch.id})
    assert PROMPTS[0].text not in ran and context.library.count_traces() == 3


def test_the_rows_of_a_batch_are_there_when_it_ends_and_a_job_makes_those_that_are_not(lab) -> None:
    context, batch = lab()
    batch_job(context, {"batch_id": batch.id})
    ids = context.batches.trace_ids(batch.id)
    aggregates = Aggregates(context.derived)
    assert aggregates.missing(ids) == []
    over = aggregates.over(context.batches.trace_ids(batch.id, "names"), "names")
    assert over["logprob"].count == 2 and np.isfinite(over["norm_resid_post"].mean).all()
    context.derived._cache.clear()
    assert aggregates.missing(ids) == ids
    assert aggregate_job(context, {"trace_ids": ids}) == {"n": 3} and aggregate_job(context, {"trace_ids": ids}) == {"n": 0}


def test_an_unknown_batch_is_one_sentence(lab) -> None:
    with pytest.raises(LayerscopeError, match="There is no batch 'x'"):
        batch_job(lab()[0], {"batch_id": "x"})


def test_the_command_runs_a_file_and_goes_on(run, tiny_llama: TinyModel, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,category\n"Hello, you",greeting\n' + "word " * 1200 + ",long\nBye,greeting\n")
    code, out, _ = run("batch", "-m", str(tiny_llama.hf), "-f", str(file), "--name", "trial", "--json")
    data = json.loads(out)
    assert code == 0 and (data["done"], data["failed"]) == (2, 1) and [row["category"] for row in data["prompts"]] == ["greeting", "long", "greeting"]
    assert json.loads(run("show", data["prompts"][0]["trace_id"], "--json")[1])["prompt"] == "Hello, you"
    again = json.loads(run("batch", "--resume", data["batch_id"], "--json")[1])
    assert [row["trace_id"] for row in again["prompts"]] == [row["trace_id"] for row in data["prompts"]]
    file.write_bytes(b"prompt\n\xff")
    code, out, err = run("batch", "-m", str(tiny_llama.hf), "-f", str(file))
    assert code == 2 and out == "" and err.strip() == "Line 2 of prompts.csv is not UTF-8: byte 0xff belongs to no character; save the file as UTF-8."

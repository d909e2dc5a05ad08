"""Claims about a generation that is followed: what is told is what the trace holds, stop keeps and cancel throws away, no reader sees half a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backend.analysis.activations import l2_norms
from backend.derived import Derived
from backend.engines import Engine, OpenOptions, Sampling, open_engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context
from backend.experiments import generation as generation_module
from backend.experiments.capture import CaptureSpec, capture
from backend.experiments.generation import TextStream, generate_job
from backend.library import Library
from backend.live import KEPT, LiveRecords, LiveState, WrittenStep
from backend.trace import open_trace
from components.generation_steps import Steps
from tests.test_cli import run  # noqa: F401  the fixture
from tests.tiny_models import TinyModel

PROMPT, JOB = "The capital of <b>", "0" * 19 + "a"
SAMPLED = Sampling(temperature=1.2, top_k=50, seed=4)


@pytest.fixture(scope="module", params=["hf", "gguf"])
def engine(request: pytest.FixtureRequest, tiny_mistral: TinyModel) -> Iterator[Engine]:
    opened = open_engine(getattr(tiny_mistral, request.param), OpenOptions(kv_cache="f32"))
    yield opened
    opened.close()


class Ear:
    """A listener that says enough after `most` tokens."""

    def __init__(self, most: int = 10**6) -> None:
        self.most, self.prompt, self.steps = most, [], []

    def begin(self, prompt: Sequence[str], special: Sequence[int]) -> None:
        self.prompt, self.special = list(prompt), list(special)

    def written(self, step: WrittenStep) -> None:
        self.steps.append(step)

    def enough(self) -> bool:
        return len(self.steps) >= self.most


def test_what_is_told_of_each_step_is_what_the_trace_holds(engine: Engine, tmp_path: Path) -> None:
    ear = Ear()
    with open_trace(capture(engine, CaptureSpec(PROMPT, max_new_tokens=12, sampling=SAMPLED), tmp_path, listener=ear)) as trace:
        at = slice(trace.n_prompt - 1, trace.n_tokens - 1)
        assert ear.prompt == trace.token_texts[: trace.n_prompt] and ear.special == [0]
        assert {trace.n_prompt + at for at, step in enumerate(ear.steps) if step.special} == trace.special - {0}
        assert [step.token for step in ear.steps] == trace.token_ids[trace.n_prompt :]
        assert [step.text for step in ear.steps] == trace.token_texts[trace.n_prompt :]
        np.testing.assert_allclose([step.probability for step in ear.steps], np.exp(trace.next_logprobs[at]), rtol=2e-3)
        np.testing.assert_allclose([step.entropy for step in ear.steps], trace.entropy[at], rtol=2e-3)
        assert [[i for i, _, _ in step.alternatives[:3]] for step in ear.steps] == trace.top_ids[at, :3].tolist()
        norms = np.stack([l2_norms(trace["resid_post", layer])[at] for layer in range(trace.info.n_layers)])
        np.testing.assert_allclose(np.array([step.resid_norms for step in ear.steps]).T, norms, rtol=2e-3)  # the trace stores float16


def test_stop_keeps_the_tokens_so_far_and_the_trace_says_how_to_make_it_again(engine: Engine, tmp_path: Path) -> None:
    whole = Ear()
    capture(engine, CaptureSpec(PROMPT, max_new_tokens=12, sampling=SAMPLED), tmp_path, listener=whole)
    with open_trace(capture(engine, CaptureSpec(PROMPT, max_new_tokens=12, sampling=SAMPLED), tmp_path, listener=Ear(5))) as trace:
        assert trace.token_ids[trace.n_prompt :] == [step.token for step in whole.steps[:5]]
        assert trace.metadata["generation"]["max_new_tokens"] == 5
        assert trace.metadata["command"][trace.metadata["command"].index("--max-new-tokens") + 1] == "5"


def test_stop_before_the_first_token_leaves_the_trace_of_the_prompt(engine: Engine, tmp_path: Path) -> None:
    with open_trace(capture(engine, CaptureSpec(PROMPT, max_new_tokens=12), tmp_path, listener=Ear(0))) as trace:
        assert trace.n_tokens == trace.n_prompt and trace.response == ""


def test_a_full_context_is_one_sentence_before_anything_is_written(engine: Engine, tmp_path: Path) -> None:
    ear = Ear()
    with pytest.raises(LayerscopeError, match=r"^A prompt of \d+ tokens and 5,000 new ones are more than the 1,024 of the context\.$"):
        capture(engine, CaptureSpec(PROMPT, max_new_tokens=5000), tmp_path, listener=ear)
    assert ear.steps == [] and list(tmp_path.iterdir()) == []


def test_the_stream_gives_the_whole_text_in_whole_characters(engine: Engine) -> None:
    text = "café 東京 🙂 end"
    stream, ids = TextStream(engine), engine.tokenize(text, add_bos=False)
    parts = [stream.add(token) for token in ids]
    assert "".join(parts).strip() == text and not any("\ufffd" in part for part in parts)
    assert len(ids) > len(text), "characters of several tokens are in it"


# -- the job ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(engine: Engine, tmp_path: Path) -> Callable[..., Context]:
    """Makes the context of a job on a data folder of its own."""
    library = Library(tmp_path, shelf=None, secret_key=b"k" * 32)  # type: ignore[arg-type]

    def context(**fields) -> Context:
        return Context(engine=lambda *_: engine, traces_dir=library.traces_dir, library=library, derived=Derived(tmp_path / "cache"), job_id=JOB,
                       live=LiveRecords(tmp_path), **fields)  # fmt: skip

    return context


PARAMS = {"model": "tiny", "prompt": PROMPT, "max_new_tokens": 12, "temperature": 1.2, "top_k": 50, "seed": 4}


def test_the_job_leaves_a_record_of_every_step_and_the_sampler_s_probabilities(job: Callable[..., Context]) -> None:
    context = job()
    result = generate_job(context, PARAMS)
    state, trace = context.live.read(JOB), context.library.open(result["trace_id"])
    assert list(state.prompt) == trace.token_texts[: trace.n_prompt] and [step.token for step in state.steps] == trace.token_ids[trace.n_prompt :]
    drawn = context.derived.get_array(("sampler_probability", trace.id))
    np.testing.assert_allclose(drawn, [step.sampler_probability for step in state.steps], rtol=1e-6)
    assert not result["stopped"] and (drawn < 1).any()
    assert generate_job(context, PARAMS)["trace_id"] != trace.id
    assert context.live.read(JOB) == state, "the same seed repeats, probabilities and norms included"


def test_a_stopped_job_keeps_its_tokens_and_a_cancelled_one_nothing(job: Callable[..., Context]) -> None:
    def at_five(act: Callable[[Context], None]) -> Context:
        context = job()
        context.progress = lambda stage, done, total: act(context) if (stage, done) == ("generating", 5) else None
        return context

    stopping = at_five(lambda context: context.live.stop(JOB))
    result = generate_job(stopping, PARAMS)
    trace = stopping.library.open(result["trace_id"])
    assert result["stopped"] and trace.n_tokens - trace.n_prompt == 5 == len(stopping.live.read(JOB).steps)

    cancelled: list[bool] = []
    cancelling = at_five(lambda context: cancelled.append(True))
    cancelling.live.discard(JOB)
    cancelling.should_stop = lambda: bool(cancelled)
    before = cancelling.library.count_traces()
    with pytest.raises(Cancelled):
        generate_job(cancelling, PARAMS)
    assert cancelling.library.count_traces() == before and cancelling.live.read(JOB).steps == ()
    assert not list(cancelling.traces_dir.glob("*.part"))


# -- the record ---------------------------------------------------------------------------------------------------------------


def step(token: int) -> WrittenStep:
    return WrittenStep(token, "\u202e\n", 0.5, 1.0, 0.25, ((token, "a", 0.5),), (1.0, float("nan")))


def test_a_reader_takes_whole_lines_only(tmp_path: Path) -> None:
    records = LiveRecords(tmp_path)
    with records.begin(JOB) as writer:
        assert records.read(JOB).prompt is None and records.read(JOB).steps == ()
        writer.prompt(["<s>", " é"], [0])
        writer.step(step(1))
        whole = (tmp_path / "live" / f"{JOB}.jsonl").read_bytes()
        writer.step(step(2))
    path = tmp_path / "live" / f"{JOB}.jsonl"
    data = path.read_bytes()
    for cut in range(len(whole), len(data)):
        path.write_bytes(data[:cut])
        assert [found.token for found in records.read(JOB).steps] == [1]
    path.write_bytes(data)
    state = records.read(JOB)
    assert state.prompt == ("<s>", " é") and state.special == {0} and [found.token for found in state.steps] == [1, 2]
    assert state.steps[0].alternatives == ((1, "a", 0.5),) and np.isnan(state.steps[0].resid_norms[1])


def test_a_record_is_bounded_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import backend.live

    monkeypatch.setattr(backend.live, "MAX_BYTES", 1000)
    records = LiveRecords(tmp_path)
    with records.begin(JOB) as writer:
        for token in range(50):
            writer.step(step(token))
    state = records.read(JOB)
    assert state.full and 0 < len(state.steps) < 50 and records.size(JOB) < 1100
    for number in range(KEPT + 5):
        records.begin(f"{number:020x}").__exit__()
    assert len(list((tmp_path / "live").glob("*.jsonl"))) == KEPT


def test_an_id_that_is_no_job_s_names_no_file(tmp_path: Path) -> None:
    for bad in ("../../etc/passwd", "a", JOB + "/x", ""):
        with pytest.raises(LayerscopeError, match="is not a job's id"):
            LiveRecords(tmp_path).read(bad)


def test_the_alternatives_are_bounded(engine: Engine, tmp_path: Path) -> None:
    ear = Ear()
    capture(engine, CaptureSpec(PROMPT, max_new_tokens=2), tmp_path, listener=ear)
    assert {len(told.alternatives) for told in ear.steps} == {generation_module.ALTERNATIVES}


# -- the command line ---------------------------------------------------------------------------------------------------------


def test_the_command_streams_a_json_object_a_step_and_keeps_the_trace(run, tiny_llama: TinyModel) -> None:  # noqa: F811
    options = ("-m", str(tiny_llama.hf), "-p", "Hello", "-n", "5", "--temperature", "1.5", "--seed", "3")
    code, out, _ = run("generate", *options, "--stream", "--json")
    *steps, last = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(steps) == 5 and {"token", "text", "probability", "sampler_probability", "entropy", "alternatives", "resid_norms", "special"} == set(steps[0])
    shown = json.loads(run("show", last["trace_id"], "--json")[1])
    assert shown["token_ids"][shown["n_prompt"] :] == [item["token"] for item in steps]
    again = json.loads(run("generate", *options, "--json")[1])
    assert again["steps"] == steps and again["response"] == last["response"]
    code, out, err = run("generate", *options, "--stream")
    assert out.strip() == last["response"].strip() and err.startswith("trace ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(("-n", "0"), "The number of new tokens is 0"), (("-n", "5000"), "more than the 1,024 of the context"), (("--top-p", "2"), "top_p is 2.0")],
)
def test_what_cannot_be_written_is_one_sentence(run, tiny_llama: TinyModel, words: tuple[str, ...], sentence: str) -> None:  # noqa: F811
    code, out, err = run("generate", "-m", str(tiny_llama.hf), "-p", "Hello", *words)
    assert code == 2 and out == "" and sentence in err.strip().splitlines()[-1]


def test_a_token_that_marks_an_end_is_written_as_one_while_it_is_live() -> None:
    shown = Steps.of_record(LiveState(("<s>", "a"), frozenset({0}), (step(1), replace(step(2), text="<s>", special=True), replace(step(3), text="<s>"))))
    assert shown.prompt == ["‹s›", "a"] and shown.labels[1:] == ["‹s›", "<s>"]

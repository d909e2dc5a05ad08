"""Claims that hold for every architecture in both engines: bad input is one sentence and leaves nothing behind, odd input runs."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from backend.engines import Engine, OpenOptions, Request, Sampling, open_engine
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec, capture
from backend.files.safetensors_header import safetensors_header
from backend.intervention import Intervention
from backend.model_files import describe
from backend.trace import open_trace
from tests.test_engines_agree import KINDS
from tests.test_hf_engine import capture as values_of
from tests.tiny_models import TinyModel

ROOT = Path(__file__).parent.parent
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)
IDS = [0, 290, 284, 280, 31]


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module", params=["hf", "gguf"])
def engine(request: pytest.FixtureRequest, tiny: TinyModel) -> Iterator[Engine]:
    engine = open_engine(getattr(tiny, request.param), OPTIONS)
    yield engine
    engine.close()


def spec(**settings: Any) -> CaptureSpec:
    return CaptureSpec(**{"token_ids": tuple(IDS), **settings})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"token_ids": ()}, r"The prompt is empty: it has 0 tokens"),
    ({"token_ids": None, "prompt": ""}, r"The prompt is empty; type at least one character"),
    ({"token_ids": (0,) * 1025}, r"1,025 tokens, more than the 1,024 of the context"),
    ({"token_ids": (0,) * 1000, "max_new_tokens": 25}, r"1,000 tokens and 25 new ones are more than the 1,024"),
    ({"token_ids": (0, 320)}, r"Token id 320 is outside the vocabulary of 320"),
    ({"token_ids": (0, -1)}, r"Token id -1 is outside the vocabulary of 320"),
    ({"token_ids": (0, 1 << 40)}, r"Token id 1099511627776 is outside the vocabulary"),
    ({"token_ids": (0, 320), "max_new_tokens": 2}, r"Token id 320 is outside"),
    ({"max_new_tokens": -1}, r"number of new tokens is -1; it must be 0 or more"),
    ({"sites": ("attn_patern",)}, r"There is no site 'attn_patern'.* Did you mean attn_pattern"),
    ({"layers": (0, 99)}, r"Layer 99 is outside 0-"),
    ({"layers": (-1,)}, r"Layer -1 is outside 0-"),
    ({"precision": "float8"}, r"Precision 'float8' is neither float16 nor float32"),
    ({"interventions": (Intervention("z", 99, "zero"),)}, r"Layer 99 of an edit is outside 0-"),
    ({"interventions": (Intervention("z", 0, "zero", head=99),)}, r"Head 99 of an edit is outside 0-3"),
    ({"interventions": (Intervention("z", 0, "zero", pos=99),)}, r"Position 99 of an edit is outside 0-4"),
    ({"interventions": (Intervention("resid_post", 0, "set", np.zeros(7)),)}, r"shape \(7,\)"),
    ({"token_ids": None, "prompt": "half \ud800 a character"}, r"half a character and no Unicode text"),
    ({"category": "a\0b"}, r"The category holds a NUL character"),
    ({"category": "\ud800"}, r"The category holds '\\ud800', which is half a character"),
    ({"tags": ("fine", "\udcff")}, r"A tag holds '\\udcff', which is half a character"),
    ({"token_ids": None, "prompt": "\udfff"}, r"half a character and no Unicode text"),
]


def test_bad_requests_are_one_sentence_leave_nothing_and_the_engine_answers_as_before(engine: Engine, tmp_path: Path) -> None:
    before = values_of(engine, IDS)
    for settings, sentence in REFUSED:
        with pytest.raises(LayerscopeError, match=sentence) as refusal:
            capture(engine, spec(**settings), tmp_path)
        assert "\n" not in str(refusal.value), settings
        assert list(tmp_path.iterdir()) == [], settings
    after = values_of(engine, IDS)
    assert set(before) == set(after) and all(np.array_equal(before[key], after[key]) for key in before)


def test_a_site_that_the_architecture_lacks_is_refused_with_those_it_has(engine: Engine, tmp_path: Path) -> None:
    site = next(site for site in ("router_logits", "mlp_pre", "rot_k", "resid_mid") if site not in engine.sites)
    with pytest.raises(LayerscopeError, match=f"has no site '{site}'; it has attn_out, "):
        capture(engine, spec(sites=(site,)), tmp_path)
    with pytest.raises(LayerscopeError, match=f"has no site '{site}'.* to edit"):
        capture(engine, spec(interventions=(Intervention(site, 0, "zero"),)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [(290,), (0, 1, 1)])
def test_a_prompt_of_one_token_or_of_special_tokens_alone_is_a_whole_trace(engine: Engine, tmp_path: Path, ids: tuple[int, ...]) -> None:
    with open_trace(capture(engine, spec(token_ids=ids, sites=("all",), max_new_tokens=2, sampling=Sampling(seed=1)), tmp_path)) as trace:
        assert tuple(trace.token_ids[: len(ids)]) == ids and len(trace.token_texts) == trace.n_tokens
        assert {name: check for name, check in trace.integrity.items() if not check["ok"]} == {}
        assert trace.integrity["unembed"]["checked"] and trace.integrity["pattern_rows"]["checked"]


@pytest.mark.parametrize("prompt", ["a\0b\0", "\ufeff\u202e\u200b\U0001f469\u200d\U0001f52c\r\n\t <s></s> "])
def test_odd_text_is_kept_as_it_was_typed(engine: Engine, tmp_path: Path, prompt: str) -> None:
    with open_trace(capture(engine, CaptureSpec(prompt=prompt), tmp_path)) as trace:
        assert trace.prompt == prompt
        assert engine.detokenize(trace.token_ids) == prompt and 1 not in trace.token_ids


_ALIGNMENT = 32  # of GGUF: a file may end in up to 31 bytes of padding, which nobody misses


def test_a_damaged_file_is_refused_before_any_library_sees_it(tiny: TinyModel, tmp_path: Path) -> None:
    """Cut in the header and in the weights, and junk in place of the header: for the file, and for the folder's weights."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny.hf / name).read_bytes())
    weights = tiny.hf / "model.safetensors"
    header_end = min(entry.start for entry in safetensors_header(weights).values())
    for source, target, opened, end in ((tiny.gguf, tmp_path / "x.gguf", tmp_path / "x.gguf", 4000), (weights, folder / "model.safetensors", folder, header_end)):
        data = source.read_bytes()
        junk = rng.integers(0, 256, end, np.uint8).tobytes()
        for bad in (b"", data[:3], data[: end // 2], data[:-_ALIGNMENT], data[: len(data) // 2], junk, data[:8] + junk, junk + data[end:]):
            target.write_bytes(bad)
            with pytest.raises(LayerscopeError) as refusal:
                describe(opened)
            assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
        target.write_bytes(data)
        assert describe(opened).n_layers == describe(tiny.hf).n_layers


def test_a_layer_or_token_beyond_the_model_is_refused_by_the_engine_itself(engine: Engine) -> None:
    for ids, request, sentence in (
        ([], Request(("logits",)), "The prompt is empty"),
        (IDS, Request(("z",), (engine.info.n_layers,)), f"Layer {engine.info.n_layers} is outside 0-{engine.info.n_layers - 1}"),
        ([engine.info.d_vocab], Request(("z",)), f"Token id {engine.info.d_vocab} is outside"),
    ):
        with pytest.raises(LayerscopeError, match=sentence):
            engine.run(ids, request, lambda piece: None)
    with pytest.raises(LayerscopeError, match="has no weight 'blocks.99.ln1.w'"):
        engine.weight("blocks.99.ln1.w")
    for text in (engine.token_texts([5]), [engine.detokenize([])]):
        assert all(isinstance(each, str) for each in text)


# Numbers in a header that llama.cpp takes for granted: whatever they are, the process lives

_NUMBERS = {4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q"}
_WHOLE = (0, 1, 2, 3, 5, 7, 511, 513, 1024, 4096, 1 << 20, 1 << 30, (1 << 31) - 1)
_REAL = (0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30)


def opened_and_run(path: Path) -> None:
    """In a process of its own: open the model and run it, or be refused; anything else is another exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        describe(path)
        engine = open_engine(path, replace(OPTIONS, n_threads=1))
        engine.run([0, 5, 7], Request(tuple(engine.sites)), lambda piece: None)
    except LayerscopeError:
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the exit code says it
        os._exit(1)
    os._exit(0)


def try_every_number(source: Path, path: Path) -> None:
    """Write `source` to `path` with one number of its header changed, and open it in a forked process; writes what ended otherwise than it may."""
    data = source.read_bytes()
    for name, field in gguf.GGUFReader(source).fields.items():
        kind = int(field.types[0]) if field.types else -1
        if name.startswith("GGUF.") or kind not in _NUMBERS:
            continue
        at, old = field.offset + 12 + len(name.encode()), field.contents()
        for value in _REAL if kind == 6 else {*_WHOLE, old - 1, old + 1, old * 2} - {old, -1}:
            path.write_bytes(data[:at] + struct.pack(_NUMBERS[kind], value) + data[at + struct.calcsize(_NUMBERS[kind]) :])
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                opened_and_run(path)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code:
                sys.stdout.write(f"{name} = {value}: {code}\n")


@pytest.mark.fuzz
@pytest.mark.timeout(900)
def test_no_number_in_a_header_ends_the_process(tiny: TinyModel, tmp_path: Path) -> None:
    """Forked from a process without threads: OpenMP's do not survive a fork."""
    code = "import sys; from pathlib import Path; import llama_cpp; from tests.test_bad_input import try_every_number; try_every_number(*map(Path, sys.argv[1:]))"
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tiny.gguf), str(tmp_path / "case.gguf")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr[-2000:]

"""What the form of a batch reads, and what it refuses in one sentence."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from backend.errors import LayerscopeError
from backend.prompt_lists import parse_lines
from components.batch_form import BatchRequest, preview, read_prompts
from tests.web_app import web_app

FORM = {"model": "demo-dense", "name": " trial ", "text": "one\nwords and more words", "sites": ["resid_post", "attn_pattern"], "new": 0}


@pytest.fixture(autouse=True)
def request_context() -> Iterator[None]:
    with web_app().server.test_request_context("/"):
        yield


def upload(data: bytes) -> str:
    return f"data:text/csv;base64,{base64.b64encode(data).decode()}"


def read(**fields: Any) -> BatchRequest:
    return BatchRequest.read({**FORM, **fields}, None, None)


def test_a_request_holds_the_settings_that_all_prompts_share() -> None:
    found = read(new=2)
    assert found.name == "trial" and found.settings == {"sites": ["attn_pattern", "resid_post"], "max_new_tokens": 2}
    assert [prompt.text for prompt in found.prompts.prompts] == ["one", "words and more words"] and found.trace_bytes > 0


def test_a_prompt_beyond_the_context_does_not_hold_the_others_back() -> None:
    assert len(read(text="one\n" + "word " * 9000).prompts.prompts) == 2
    with pytest.raises(LayerscopeError, match="the context of demo-dense is 1,024"):
        read(text="word " * 9000)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"model": None}, "No model is chosen"), ({"model": "nowhere"}, "nowhere"), ({"sites": []}, "No site is chosen"), ({"new": 65}, "from 0 to 64"),
     ({"new": None}, "New tokens must be"), ({"text": " \n"}, "The text holds no prompt"), ({"name": "a\0"}, "The name holds a NUL")],
)  # fmt: skip
def test_what_cannot_be_run_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LayerscopeError, match=sentence):
        read(**fields)


def test_a_file_stands_in_for_the_text_and_a_torn_one_is_named() -> None:
    assert read_prompts("pasted", upload(b"prompt\nfrom the file"), "p.csv").prompts[0].text == "from the file"
    with pytest.raises(LayerscopeError, match=r"p\.csv did not arrive whole"):
        read_prompts("pasted", "data:text/csv;base64,%%%", "p.csv")


def test_the_preview_shows_the_first_prompts_and_counts_the_rest() -> None:
    words = json.dumps([part.to_plotly_json() for part in preview(parse_lines("\n".join(f"prompt {i}" for i in range(30)))) if part], default=lambda c: c.to_plotly_json())
    assert "prompt 7" in words and "prompt 8" not in words and "and 22 more" in words and "no category 30" in words

"""Claims about lists of prompts: what each form means, and that what is wrong is one sentence with its line."""

from __future__ import annotations

import pytest

from backend import prompt_lists
from backend.errors import LayerscopeError
from backend.prompt_lists import BatchPrompt, parse_file, parse_lines


def test_lines_are_prompts_as_they_stand_and_blank_ones_are_left_out() -> None:
    found = parse_lines("one\r\n\n  two \n\t\nthree\u2028still three")
    assert [prompt.text for prompt in found.prompts] == ["one", "  two ", "three\u2028still three"]


CSV = b'\xef\xbb\xbfId,Prompt,category,tags\n1,"He said ""go"", and\nwent",talk,a; b;a\n2,caf\xc3\xa9,,\n\n'


def test_csv_reads_quotes_line_breaks_categories_and_tags_and_names_what_it_ignores() -> None:
    found = parse_file("prompts.CSV", CSV)
    assert found.prompts == (BatchPrompt('He said "go", and\nwent', "talk", ("a", "b")), BatchPrompt("café"))
    assert found.ignored == ("id",) and found.categories == {"talk": 1, "": 1}


def test_json_lines_reads_objects_and_strings() -> None:
    found = parse_file("p.jsonl", b'{"prompt": "a\\nb", "category": "c", "tags": ["x", "y"], "id": 3}\n\n"plain"\n{"prompt": "z", "tags": "one"}')
    assert found.prompts == (BatchPrompt("a\nb", "c", ("x", "y")), BatchPrompt("plain"), BatchPrompt("z", "", ("one",)))
    assert found.ignored == ("id",)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.csv", b"prompt\nfine\nbad \xff byte", "Line 3 of p.csv is not UTF-8: byte 0xff"),
        ("p.csv", b"text,category\na,b", "The first line of p.csv names no column 'prompt'; it names text, category."),
        ("p.csv", b"", "names no column 'prompt'; it names nothing"),
        ("p.csv", b'prompt\n"never closed', "Line 2 of p.csv is not CSV"),
        ("p.csv", b"prompt,category\na,b,c", "Line 2 of p.csv has 3 cells, and the header names 2"),
        ("p.csv", b"prompt,category\n,b", "Line 2 of p.csv has an empty prompt"),
        ("p.csv", b"prompt\n", "p.csv holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{oops', "Line 2 of p.jsonl is not JSON"),
        ("p.jsonl", b"[" * 100_000, "Line 1 of p.jsonl is not JSON"),
        ("p.jsonl", b'{"prompt": 3}', "Line 1 of p.jsonl has a prompt that is no text"),
        ("p.jsonl", b'{"text": "a"}', "Line 1 of p.jsonl is no object with the key 'prompt'"),
        ("p.jsonl", b'{"prompt": "a", "category": 3}', "Line 1 of p.jsonl has a category or tag that is no text"),
        ("p.jsonl", b'{"prompt": "a", "tags": {"x": 1}}', "Line 1 of p.jsonl has tags that are no list"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "half a character"),
        ("p.jsonl", b'{"prompt": "a", "category": "\\u0000"}', "NUL"),
        ("p.xlsx", b"PK", "'p.xlsx' is none of .csv, .jsonl, .ndjson and .txt"),
    ],
)
def test_what_is_wrong_is_one_sentence(name: str, data: bytes, sentence: str) -> None:
    with pytest.raises(LayerscopeError, match=sentence.replace("(", r"\(").replace(".", r"\.")):
        parse_file(name, data)


def test_the_bounds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lists, "MAX_PROMPTS", 3)
    monkeypatch.setattr(prompt_lists, "MAX_BYTES", 40)
    monkeypatch.setattr(prompt_lists, "MAX_CHARACTERS", 5)
    with pytest.raises(LayerscopeError, match="more than 3 prompts"):
        parse_lines("a\nb\nc\nd")
    with pytest.raises(LayerscopeError, match="has 41 bytes, and the limit is 40"):
        parse_file("p.txt", b"a" * 41)
    with pytest.raises(LayerscopeError, match="Line 2 of the text has a prompt of 6 characters, and the limit is 5"):
        parse_lines("a\nbbbbbb")

"""Claims about the shell and the parts that pages share: what the rail offers, how tokens are written, what the run form understands."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from dash import html
from PIL import Image

from backend.errors import LayerscopeError
from backend.sites import parse_layers
from components import icons
from components.heads import thumbnail_sprite
from components.run_form import RunRequest, cost
from components.services import SERVER_KEY
from components.shell import show_rail
from components.states import missing
from components.token_label import token_label, token_labels
from components.url_state import as_choice, as_int
from tests.small_traces import write_trace
from tests.web_app import web_app

ROOT = Path(__file__).parent.parent
FORM = {"model": "toy", "prompt": "Hi", "new": 4, "preset": "standard", "sites": [], "layers": "all", "precision": "float16", "category": "", "temperature": 0, "seed": 0}


@pytest.fixture
def library():
    app = web_app()
    with app.server.test_request_context("/"):
        yield app.server.config[SERVER_KEY].library


def add_trace(library, **facts):
    return library.add(write_trace(library.traces_dir, **facts)).id


def rail_links(path: str, trace_id: str | None) -> dict[str, dict]:
    groups = json.loads(json.dumps([group.to_plotly_json() for group in show_rail(path, trace_id, {"traces": 1234, "active": 2})], default=lambda c: c.to_plotly_json()))
    links = [link["props"] for group in groups for link in group["props"]["children"][1:]]
    return {link["children"][1]: {**link, "note": (link["children"][2] or {"props": {"children": ""}})["props"]["children"]} for link in links}


# -- the rail ---------------------------------------------------------------------------------------------------------------------


def test_the_rail_marks_the_page_shown_and_counts(library):
    links = rail_links("/library", None)
    assert [name for name, link in links.items() if "active" in link["className"]] == ["Library"]
    assert links["Library"]["note"] == "1,234" and links["Jobs"]["note"] == "2 running"


def test_without_a_trace_its_pages_are_dimmed(library):
    links = rail_links("/", None)
    assert {"Overview", "Attention", "Activations", "Logit lens"} <= {name for name, link in links.items() if "dimmed" in link["className"]}


def test_a_page_that_the_trace_cannot_serve_is_dimmed_and_says_why(library):
    trace_id = add_trace(library)  # embed and resid_post only
    links = rail_links("/trace", trace_id)
    assert "dimmed" in links["Attention"]["className"]
    assert links["Attention"]["title"] == "This trace holds no attn_pattern" and links["Attention"]["note"] == "absent"
    assert "dimmed" not in links["Overview"]["className"] and links["Overview"]["href"] == f"/trace?trace={trace_id}"


def test_no_page_is_a_dead_link(library):
    client = web_app().server.test_client()
    for name, link in rail_links("/", None).items():
        assert client.get(link["href"]).status_code == 200, name


def test_the_rail_keeps_the_trace_of_the_address_before_any_callback_has_answered(library):
    def href_of_attention(trace_id: str) -> str:
        asked = {"Referer": f"http://localhost/trace?trace={trace_id}&pos=2"}
        links = re.findall(r'"href":("[^"]*")', web_app().server.test_client().get("/_dash-layout", headers=asked).text)
        return next(href for href in map(json.loads, links) if href.startswith("/attention"))

    trace_id = add_trace(library)
    assert href_of_attention(trace_id) == f"/attention?trace={trace_id}"
    assert href_of_attention("gone") == "/attention"


def test_a_missing_site_leads_home_with_model_prompt_and_the_site(library):
    trace_id = add_trace(library, prompt="a & b")
    button = missing("attn_pattern", trace_id).children[3]
    assert button.href == "/?model=toy&prompt=a+%26+b&sites=attn_pattern%2Cembed%2Cresid_post"


def test_a_routers_site_is_not_offered_for_a_dense_model(library):
    state = missing("router_probs", add_trace(library))
    assert "dense" in state.children[2].children and state.children[3] is None


# -- tokens -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "special", "label"),
    [(" John", False, "·John"), ("\n", False, "⏎"), ("\t", False, "⇥"), ("", False, "∅"), ("<s>", True, "‹s›"), ("<s>", False, "<s>"),
     ("<|end|>", True, "‹|end|›"), ("[CLS]", True, "‹CLS›"), ("<0xE2>", False, "<0xE2>"), ("é漢", False, "é漢")],
)  # fmt: skip
def test_a_token_shows_its_whitespace_and_whether_it_is_special(text, special, label):
    assert token_label(text, special) == label


@pytest.mark.parametrize("hidden", ["\u202e", "\u200b", "\u2066", "\x00", "\x1b", "\u2028", "\u00a0", "\ue000"])
def test_nothing_invisible_is_left_in_a_token(hidden):
    assert token_label(f"a{hidden}b") == f"a⟨U+{ord(hidden):04X}⟩b"


def test_labels_of_a_sequence_know_special_positions_and_are_cut():
    assert token_labels(["<s>", " extraordinary"], {0}, 6) == ["‹s›", "·extr…"]


# -- the run form -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "layers"), [("all", None), ("", None), (None, None), ("3", (3,)), ("0-2, 5", (0, 1, 2, 5)), ("2,2,1", (1, 2))])
def test_layers_are_read_as_people_write_them(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-1", "0-99999", "1;2", "²", "1" * 40])
def test_layers_that_mean_nothing_are_refused_by_name(text):
    with pytest.raises(LayerscopeError, match="Layers"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"prompt": ""}, "The prompt is empty"), ({"prompt": None}, "The prompt is empty"), ({"model": None}, "No model"), ({"new": 513}, "from 0 to 512"),
     ({"new": None}, "New tokens"), ({"temperature": -1}, "Temperature"), ({"preset": "choose"}, "No site"), ({"preset": "choose", "sites": ["resid"]}, "no site 'resid'"),
     ({"prompt": "x" * 100_001}, "100,001 characters, and the limit is 100,000"), ({"seed": "7"}, "Seed must be a number"),
     ({"prompt": "a\ud800"}, "The prompt holds .* half a character"), ({"category": "a\0"}, "The category holds a NUL")],
)  # fmt: skip
def test_a_form_that_cannot_run_says_why_in_one_sentence(change, words):
    with pytest.raises(LayerscopeError, match=words):
        RunRequest.read({**FORM, **change})


def test_the_presets_of_sites_leave_the_choice_to_the_capture_which_knows_the_model():
    assert RunRequest.read(FORM).params()["sites"] is None
    assert RunRequest.read({**FORM, "preset": "everything"}).params()["sites"] == ["all"]
    assert RunRequest.read({**FORM, "preset": "choose", "sites": ["blocks.0.attn.hook_pattern"]}).sites == ("attn_pattern",)


def test_a_model_outside_the_shelf_is_refused(library):
    for name in ("/etc/passwd", "../../etc", "nowhere"):
        with pytest.raises(LayerscopeError):
            cost(RunRequest.read({**FORM, "model": name}))


# -- the rest ---------------------------------------------------------------------------------------------------------------------


def test_query_values_are_cut_to_what_exists():
    assert [as_int(text, 1, 0, 3) for text in (None, "2", "99", "-5", "x", "1e3")] == [1, 2, 3, 0, 1, 1]
    assert as_choice("rank", ("rank", "kl"), "kl") == "rank" and as_choice("<script>", ("rank", "kl"), "kl") == "kl"


def test_a_sprite_puts_each_head_in_its_own_tile_in_the_themes_colours():
    thumbs = np.zeros((2, 3, 4, 4), np.uint8)
    thumbs[1, 2, 3, 0] = 255
    for theme, ground, full in (("light", (255, 255, 255), (27, 42, 120)), ("dark", (21, 28, 38), (240, 243, 255))):
        picture = Image.open(io.BytesIO(thumbnail_sprite(thumbs, theme))).convert("RGB")
        assert picture.size == (3 * 4, 2 * 4)
        assert picture.getpixel((2 * 4 + 0, 1 * 4 + 3)) == full
        assert sum(picture.getpixel((x, y)) != ground for x in range(12) for y in range(8)) == 1


def test_every_icon_is_vendored_and_has_its_rule():
    rules = (ROOT / "assets" / "icons.css").read_text()
    for name in icons.ICONS:
        assert (ROOT / "assets" / "vendor" / "icons" / f"{name}.svg").is_file() and f".icon-{name} " in rules
    assert isinstance(icons.icon("check"), html.Span)
    with pytest.raises(ValueError, match="no icon"):
        icons.icon("unicorn")


def test_style_sheets_load_nothing_from_elsewhere():
    for sheet in (ROOT / "assets").rglob("*.css"):
        text = sheet.read_text()
        assert "@import" not in text and "url(http" not in text.replace('url("http', "url(http") and "url(//" not in text, sheet

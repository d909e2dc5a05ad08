"""The form of the Generate page: model, prompt, sampling. Its buttons are answered by the page."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, callback, dcc, html

from components.card import card
from components.controls import field, set_button
from components.icons import icon
from components.run_form import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS
from components.services import services

FIELDS = ("model", "prompt", "new", "temperature", "top_k", "top_p", "min_p", "seed")
NUMBERS = {"new": 40, "temperature": 0.8, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}

ABOUT_FORM = (
    "Three cuts see the model's own probabilities: top-k keeps the k most probable tokens (0: all), top-p (Holtzman et al. 2020) the fewest that together hold p, min-p "
    "(Nguyen et al. 2024) those at least that share as probable as the best. One of the rest is drawn with probability proportional to exp(logit / temperature); the same "
    "seed draws the same again.",
)


def form_card(model: str | None, prompt: str | None, numbers: dict[str, str]) -> html.Section:
    """The form with these values to begin with; numbers: name (one of NUMBERS) -> text of the address."""
    words = "Sampling draws from the model's distribution; temperature 0 takes the best token."
    return card("What to write on", _form(model, prompt, numbers), words, about=list(ABOUT_FORM))


def _form(model: str | None, prompt: str | None, numbers: dict[str, str]) -> html.Div:
    usable = [entry for entry in services().library.models() if entry.error is None]
    first = next((entry for entry in usable if entry.name == model), usable[0] if usable else None)
    start = prompt if prompt is not None else first.prompts[0].text if first and first.prompts else ""
    names: Any = [{"label": entry.name, "value": entry.name} for entry in usable]

    def number(name: str, label: str, low: float, high: float, step: float, hint: str = "") -> html.Div:
        box = dcc.Input(id=f"gen-{name}", type="number", min=low, max=high, step=step, value=_number(numbers.get(name), NUMBERS[name]), className="text-input")
        return field(label, box, hint, id=f"gen-{name}")

    prompt_box = dcc.Textarea(id="gen-prompt", value=start, className="text-input", maxLength=MAX_PROMPT_CHARACTERS, spellCheck=False)
    buttons = [
        html.Button([icon("play"), "Run"], id="gen-run", className="btn btn-primary", type="button", disabled=not usable),
        html.Button("Stop and keep", id="gen-stop", className="btn btn-outline-secondary", type="button", hidden=True),
        html.Div(id="gen-refused"),
    ]
    return html.Div(
        [
            field("Model", dcc.Dropdown(names, first.name if first else None, id="gen-model", clearable=False, placeholder="no model found"), id="gen-model"),
            html.Div([html.Label("Prompt", htmlFor="gen-prompt", className="field-label"), prompt_box, html.Div(id="gen-examples", className="chips")], className="field"),
            html.Div(
                [
                    number("new", "New tokens", 1, MAX_NEW_TOKENS, 1, "at most"),
                    number("temperature", "Temperature", 0, 10, 0.1, "0 is greedy"),
                    number("top_k", "Top-k", 0, 1_000_000, 1, "0 is off"),
                    number("top_p", "Top-p", 0, 1, 0.01, "1 is off"),
                    number("min_p", "Min-p", 0, 1, 0.01, "0 is off"),
                    number("seed", "Seed", 0, 2**31 - 1, 1, "the same repeats"),
                ],
                className="fields fields-three",
            ),
            html.Div(buttons, className="form-foot"),
            html.Div(id="gen-progress"),
        ],
        className="form",
    )


def _number(text: str | None, default: float) -> float:
    try:
        return type(default)(text) if text is not None else default
    except ValueError:
        return default


@callback(Output("gen-examples", "children"), Input("gen-model", "value"))
def offer_examples(model: str | None) -> list[Any]:
    """The example prompts of the chosen model."""
    entry = next((entry for entry in services().library.models() if entry.name == model), None)
    return [set_button(prompt.label, "gen-prompt", prompt.text, "chip", **{"data-property": "value"}) for prompt in entry.prompts] if entry else []

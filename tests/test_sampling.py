"""Claims about choosing a token: the cuts keep the tokens that the papers' definitions keep, by hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest

from backend.engines import Sampling
from backend.engines.sampling import check_sampling, choose
from backend.errors import LayerscopeError

# Probabilities 0.1, 0.4, 0.05, 0.3, 0.15 at temperature 1; best first the ids are 1, 3, 4, 0, 2.
PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(PROBS).astype(np.float32) + 7


def support(sampling: Sampling) -> set[int]:
    rng = np.random.default_rng(0)
    return {choose(LOGITS, sampling, rng).token for _ in range(600)}


def test_temperature_zero_takes_the_best_and_the_lowest_id_among_equals() -> None:
    rng = np.random.default_rng(0)
    assert choose(LOGITS, Sampling(), rng) == (1, 1.0)
    assert choose(np.array([1.0, 5.0, 5.0], dtype=np.float32), Sampling(), rng).token == 1


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_k=2), {1, 3}),
        (Sampling(temperature=1.0, top_k=1), {1}),
        (Sampling(temperature=1.0, top_p=0.65), {1, 3}),  # 0.4 + 0.3 reaches it
        (Sampling(temperature=1.0, top_p=0.75), {1, 3, 4}),  # 0.4 + 0.3 does not, the third does
        (Sampling(temperature=1.0, top_p=0.0), {1}),  # the best always survives
        (Sampling(temperature=1.0, min_p=0.3), {1, 3, 4}),  # at least 0.3 x 0.4 = 0.12
        (Sampling(temperature=1.0, min_p=1.0), {1}),
        (Sampling(temperature=1.0, top_k=3, min_p=0.5), {1, 3}),
        (Sampling(temperature=4.0, top_p=0.65), {1, 3}),  # the cut sees probabilities before the temperature
    ],
)
def test_the_cuts_keep_exactly_the_tokens_of_their_definition(sampling: Sampling, kept: set[int]) -> None:
    assert support(sampling) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion_to_the_tempered_probabilities(temperature: float) -> None:
    rng, n = np.random.default_rng(3), 20_000
    counts = np.bincount([choose(LOGITS, Sampling(temperature=temperature), rng).token for _ in range(n)], minlength=5)
    expected = PROBS ** (1 / temperature) / (PROBS ** (1 / temperature)).sum()
    assert np.abs(counts / n - expected).max() < 4 * np.sqrt(0.25 / n)  # four standard errors


def test_a_token_that_the_model_forbids_is_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0], dtype=np.float32)
    rng = np.random.default_rng(0)
    assert {choose(logits, Sampling(temperature=50.0), rng).token for _ in range(200)} == {0, 2}


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [-np.inf, -np.inf]])
def test_broken_logits_are_named_instead_of_sampled(logits: list[float]) -> None:
    with pytest.raises(LayerscopeError, match="NaN or no finite value"):
        choose(np.array(logits, dtype=np.float32), Sampling(temperature=1.0), np.random.default_rng(0))


@pytest.mark.parametrize(("name", "value"), [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 1.5), ("min_p", -1.0), ("seed", -1)])
def test_a_setting_outside_its_range_is_refused_with_the_range(name: str, value: float) -> None:
    with pytest.raises(LayerscopeError, match=f"{name} is {value}; it must lie between"):
        check_sampling(Sampling(**{name: value}))  # type: ignore[arg-type]


def test_the_probability_of_a_choice_is_the_sampler_s_after_its_cuts_and_temperature() -> None:
    rng = np.random.default_rng(0)
    heard = {choose(LOGITS, Sampling(temperature=2.0, top_k=2), rng) for _ in range(200)}
    expected = np.sqrt(PROBS[[1, 3]]) / np.sqrt(PROBS[[1, 3]]).sum()  # temperature 2 takes the square root
    assert {token: pytest.approx(probability) for token, probability in heard} == {1: expected[0], 3: expected[1]}

"""The Embeddings page without a browser: a whole vocabulary in bounded memory, texts sent once, colours and figures with NumPy's numbers."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from backend.analysis.token_classes import CLASSES, token_classes
from backend.model_files import identity
from backend.reports.projection import Projection, ProjectionSpec, VocabularyTexts
from backend.reports.vectors import Choice
from components.embedding_cloud import cloud_key, coloured, overlay, points
from components.embedding_source import SHOWN, SHOWN_PLAIN, View, place, view
from components.figures.embeddings import LEVELS, by_class, by_value, explained_variance, norm_histogram, ramp
from tests.test_embeddings import write_vocabulary
from tests.web_app import web_app

N, WIDTH = 150_000, 32
MB = 1 << 20


@pytest.fixture(scope="module")
def vocabulary_view() -> Iterator[View]:
    """A model of 150,000 tokens on the shelf whose projection a worker has just made."""
    server = web_app().server
    with server.app_context():
        services = server.config["LAYERSCOPE"]
        folder = Path(services.settings.models_dirs[0])
        folder.mkdir(parents=True, exist_ok=True)
        texts = ["<s>", "</s>", *(f"token{i}" for i in range(2, N))]
        matrix = np.random.default_rng(0).standard_normal((N, WIDTH), np.float32)
        path = write_vocabulary(folder / "vocabulary.gguf", matrix, gguf.GGMLQuantizationType.F16, texts)
        spec = ProjectionSpec(Choice("vocabulary.gguf", "W_E"))
        coords = np.random.default_rng(1).normal(size=(N, 3)).astype(np.float32)
        norms = np.linalg.norm(matrix, axis=1)
        facts = {"n": N, "d": WIDTH, "n_left_out": 0, "n_zero": 0, "n_sampled_from": 0, "seconds": 1.0}
        Projection(np.arange(N, dtype=np.int32), coords, norms, np.full(WIDTH, 1 / WIDTH), facts).save(services.derived, spec.key(identity(path)))
        VocabularyTexts(texts, token_classes(texts, [0, 1]), frozenset((0, 1))).save(services.derived, identity(path))
        found = view(place("vocabulary.gguf", ()), spec)
        assert found is not None
        yield found
        path.unlink()


def unpacked(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), {"f4": np.float32, "i4": np.int32, "u1": np.uint8}[packed["kind"]])


def test_a_whole_vocabulary_is_shown_in_bounded_memory(vocabulary_view):
    tracemalloc.start()
    try:
        shown = vocabulary_view.shown(True, ())
        cloud = points(vocabulary_view, shown)
        sent = json.dumps(cloud)
        colours = json.dumps(coloured(vocabulary_view, shown, "class", "light")[0])
        json.dumps(overlay(vocabulary_view, shown, 77, [5, 6], "chosen", "x"))
        norm_histogram(vocabulary_view.projection.norms, ["x"] * 5 + [""] * (N - 5), "dark")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(shown) == N and peak < 300 * MB
    assert len(sent) < 8 * MB and len(colours) < MB and "token77" not in colours  # texts are not sent again for another colour
    assert np.array_equal(unpacked(cloud["at"]).reshape(N, 2), vocabulary_view.projection.coords[:, :2])
    assert cloud["texts"][0] == "‹s›" and cloud["texts"][149_999] == "token149999"
    by_name = {field["name"]: field for field in cloud["fields"]}
    assert np.array_equal(unpacked(by_name["id"]["values"]), np.arange(N)) and by_name["class"]["words"] == list(CLASSES)


def test_without_webgl_fewer_points_are_drawn_those_that_were_found_among_them(vocabulary_view):
    shown = vocabulary_view.shown(False, (149_998, 3))
    assert len(shown) == SHOWN_PLAIN and {3, 149_998} <= set(shown.tolist())
    assert cloud_key(vocabulary_view, shown) != cloud_key(vocabulary_view, vocabulary_view.shown(False, ()))
    over = overlay(vocabulary_view, shown, 3, [149_998, 149_997], "chosen", "x")
    assert shown[over["chosen"]] == 3 and [int(shown[mark["i"]]) for mark in over["marks"]][:1] == [149_998]


def test_three_dimensions_have_a_limit_of_their_own(vocabulary_view):
    spec = ProjectionSpec(vocabulary_view.spec.choice, dims=3)
    found = view(vocabulary_view.place, spec)
    assert found is not None and len(found.shown(True, ())) == SHOWN[3] < N


def test_classes_have_the_most_frequent_first_and_the_others_share_a_grey():
    values = np.repeat(np.arange(13), np.arange(13, 0, -1))
    found = by_class(values, [f"c{i}" for i in range(13)])
    assert found.legend["items"][0]["words"] == "c0 13" and found.legend["items"][-1]["words"] == "3 others 6"
    assert len({found.palette[v] for v in found.values[:-6]}) == 10 and set(found.values[-6:].tolist()) == {10}
    only = by_class(values, [f"c{i}" for i in range(13)], only="c3")
    bright = [i for i, ink in enumerate(only.palette) if ink == found.palette[i]]
    assert bright == [3] and np.array_equal(only.values, found.values)


def test_a_scale_leaves_out_the_extremes_unless_asked_for_all():
    values = np.concatenate([np.linspace(0, 1, 1000), [50.0], [np.nan]])
    found, whole = by_value(values, "length"), by_value(values, "length", whole=True)
    assert found.values[500] == pytest.approx(LEVELS / 2, abs=1) and found.values[1000] == LEVELS - 1 and found.values[1001] == 0
    assert whole.values[999] <= 2 and whole.legend["high"] == "50"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_can_be_told_from_the_ground(theme):
    from components.figures.theme import colours

    def luminance(ink: str) -> float:
        parts = [int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    ground = luminance(colours(theme)["surface"])
    inks = [*ramp(LEVELS, theme), *by_class(np.arange(11), [str(i) for i in range(11)], theme).palette]
    for ink in inks:
        a, b = sorted((luminance(ink), ground))
        assert (b + 0.05) / (a + 0.05) > 1.7, ink


def test_lengths_and_variance_are_numpys():
    norms = np.array([1.0, 1.0, 2.0, np.nan, 3.0])
    bars = norm_histogram(norms, ["a", "b", "<i>c</i>", "d", "e"]).data[0]
    assert float(np.sum(bars.y)) == 4 and "a, b" in bars.customdata[0] and "<i>" not in "".join(bars.customdata)
    both = explained_variance(np.array([0.5, 0.25, 0.125])).data
    np.testing.assert_allclose(both[0].y, [50, 25, 12.5])
    np.testing.assert_allclose(both[1].y, [50, 75, 87.5])


"""Claims about the committed demo models, and about the GGUF files made from them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.errors import LayerscopeError
from backend.files import demo
from backend.files.gguf_writer import interleave_rotary, write_gguf

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
sys.path.insert(0, str(ROOT / "scripts"))

from demo_anatomy import HuggingFaceModel, induction_ablation, share_right  # noqa: E402
from demo_text import TASKS, documents, held_out_items  # noqa: E402
from evaluate_demo_models import GgufModel  # noqa: E402


@pytest.fixture(scope="module", params=["demo-dense", "demo-moe"])
def model(request: pytest.FixtureRequest) -> HuggingFaceModel:
    torch.set_num_threads(2)
    return HuggingFaceModel(MODELS / request.param)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return demo.ensure_demo_variants(MODELS, tmp_path_factory.mktemp("variants"))


def test_the_capital_of_france_is_paris(model: HuggingFaceModel) -> None:
    assert model.next_token(model.encode("The capital of France is")) == " Paris"


@pytest.mark.parametrize("task", ["capitals", "indirect_object", "induction"])
def test_held_out_items_are_answered(model: HuggingFaceModel, task: str) -> None:
    assert share_right(model, held_out_items(task, 40)) >= 0.9  # 95 % of the whole set; 40 items leave room for chance


def test_repetition_rests_on_the_induction_heads(model: HuggingFaceModel) -> None:
    """Cutting the four heads that attend to the token after the earlier copy breaks copying; cutting four others does not."""
    share = induction_ablation(model, n_items=30, draws=2)
    assert share["whole"] >= 0.9
    assert share["without_induction"] <= share["without_others"] - 0.3


def test_held_out_items_are_not_in_the_training_text() -> None:
    text = [text for _, (_, text) in zip(range(20_000), documents(seed=1), strict=False)]
    for task in TASKS:
        for item in held_out_items(task, 100):
            assert not any(item.prompt + item.answer in document for document in text), item


def test_prompts_get_the_bos_token(model: HuggingFaceModel) -> None:
    assert model.encode("The capital of France is")[0] == model.model.config.bos_token_id == 0


@pytest.mark.parametrize("name", list(demo.VARIANTS))
def test_every_gguf_variant_knows_the_capital_and_tokenizes_alike(name: str, variants: dict[str, Path]) -> None:
    gguf, reference = GgufModel(variants[name]), HuggingFaceModel(MODELS / demo.VARIANTS[name].folder)
    for text in ("The capital of France is", 'def add(a, b):\n    return a + b\n"Größe" 3 + 4', " Mary  and Tom's café", "$\\int_0^2 x$"):
        assert gguf.encode(text) == reference.encode(text)
    assert gguf.next_token(gguf.encode("The capital of France is")) == " Paris"


def test_artifacts_are_at_most_30_mb() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file() and path.suffix != ".gguf") <= 30_000_000


def test_an_unchanged_variant_is_kept_and_a_changed_source_makes_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Path:
        return demo.ensure_demo_variants(MODELS, tmp_path, ["demo-dense-q4_k_m"])["demo-dense-q4_k_m"]

    made_at = make().stat().st_mtime_ns
    assert make().stat().st_mtime_ns == made_at
    monkeypatch.setattr(demo, "source_key", lambda folder: "another key")
    assert make().stat().st_mtime_ns > made_at
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf", ".gguf", ".key", ".key"]  # nothing half-written is left


def test_an_unknown_variant_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError, match="demo-dense-q3_k"):
        demo.ensure_demo_variants(MODELS, tmp_path, ["demo-dense-q3_k"])


def test_rotary_interleaving_puts_the_two_halves_of_a_head_side_by_side() -> None:
    rows = np.arange(8).reshape(8, 1)  # two heads of four rows
    assert interleave_rotary(rows, n_heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_folder_that_gguf_cannot_express_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(LayerscopeError, match="GPT2LMHeadModel"):
        write_gguf(tmp_path, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()

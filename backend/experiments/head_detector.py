"""Head detector: which heads of a model do induction, look at the previous token, or at copies of the present one.

The standard test: prompts of random tokens said several times, which nothing but looking back can continue (Olsson et al. 2022; TransformerLens'
main demo: BOS, a random block, the block again). Nothing is stored: of each layer the pattern is scored as it is computed, and forgotten.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.attention_views import repeat_scores
from backend.engines import Engine, Piece, Request, ShouldStop, never_stop
from backend.errors import LayerscopeError
from backend.experiments import Context, Progress, no_progress
from backend.intervention import Intervention
from backend.model_files import identity as identity_of
from backend.reports.head_scores import HeadScores

MOST_TOKENS = 512  # of one prompt, which engines run in one piece
MOST_PROMPTS = 1000


@dataclass(frozen=True)
class RepeatedTokens:
    """`prompts` prompts, each a random block of `length` distinct tokens said `repeats` times, after a BOS where the model has one."""

    length: int = 32
    repeats: int = 2
    prompts: int = 8
    seed: int = 0

    def ids(self, engine: Engine) -> list[list[int]]:
        """The prompts. Raises LayerscopeError for sizes that make no sense or do not fit."""
        info = engine.info
        n = self.length * self.repeats + (info.bos_id is not None)
        if self.length < 2 or self.repeats < 2 or not 1 <= self.prompts <= MOST_PROMPTS:
            asked = f"{self.length}, {self.repeats} and {self.prompts}"
            raise LayerscopeError(f"A block needs 2 tokens or more and 2 repeats or more, and there are 1 to {MOST_PROMPTS:,} prompts, not {asked}.")
        if n > min(MOST_TOKENS, engine.n_ctx):
            raise LayerscopeError(f"{self.length} tokens said {self.repeats} times make {n:,}, more than the {min(MOST_TOKENS, engine.n_ctx):,} of one prompt.")
        if self.seed < 0:
            raise LayerscopeError(f"The seed {self.seed} is below 0.")
        words = np.setdiff1d(np.arange(info.d_vocab), [i for i in (info.bos_id, info.eos_id) if i is not None])
        if len(words) < self.length:
            raise LayerscopeError(f"A block of {self.length} distinct tokens is more than the vocabulary of {len(words):,}.")
        rng = np.random.default_rng(self.seed)
        blocks = (rng.choice(words, self.length, replace=False).tolist() for _ in range(self.prompts))
        return [([] if info.bos_id is None else [info.bos_id]) + block * self.repeats for block in blocks]


def detect_heads(engine: Engine, spec: RepeatedTokens = RepeatedTokens(), *, progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> HeadScores:
    """Scores of every head, means over the prompts; and how often the model says the next token of a block that it has read before.

    Raises LayerscopeError for sizes that do not fit and for a model without attention patterns, Cancelled when should_stop() says so.
    """
    prompts, info = spec.ids(engine), engine.info
    sums = {name: np.full((info.n_layers, info.n_heads), np.nan) for name in ("induction", "previous", "duplicate")}
    right: list[NDArray[np.bool_]] = []
    for number, ids in enumerate(prompts):
        progress("running, prompts", number, len(prompts))

        def sink(piece: Piece, ids: list[int] = ids) -> None:
            if piece.site == "logits":
                right.append(_continued(piece.values, ids, spec))
            elif piece.layer is not None:
                for name, values in repeat_scores(piece.values, spec.length).items():
                    sums[name][piece.layer] = np.nan_to_num(sums[name][piece.layer]) + values

        engine.run(ids, Request(("attn_pattern", "logits")), sink, (), should_stop)
    progress("running, prompts", len(prompts), len(prompts))
    means = {name: (values / len(prompts)).astype(np.float32) for name, values in sums.items()}
    return HeadScores(means, float(np.mean(np.concatenate(right))), asdict(spec), info.bos_id is not None)


def repetition_accuracy(engine: Engine, spec: RepeatedTokens = RepeatedTokens(), edits: tuple[Intervention, ...] = ()) -> float:
    """Share of the tokens of repeated blocks, but the first, that the model gives the highest logit, with `edits` applied."""
    right: list[NDArray[np.bool_]] = []
    for ids in spec.ids(engine):
        engine.run(ids, Request(("logits",)), lambda piece, ids=ids: right.append(_continued(piece.values, ids, spec)), edits)  # type: ignore[misc]
    return float(np.mean(np.concatenate(right)))


def _continued(logits: NDArray[np.float32], ids: list[int], spec: RepeatedTokens) -> NDArray[np.bool_]:
    """Whether each token after the first of the second block is the one with the highest logit. logits: (pos, d_vocab) of the whole prompt."""
    first = len(ids) - spec.length * (spec.repeats - 1)
    return logits[first:-1].argmax(axis=-1) == np.asarray(ids[first + 1 :])


def head_detector_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name, and the fields of RepeatedTokens} -> {"identity"}; the scores lie in the cache under that of the model's files."""
    context.progress("loading model", 0, 1)
    shelf = context.library.shelf
    path = shelf.ready(shelf.resolve(params["model"]))
    spec = RepeatedTokens(**{name: int(params[name]) for name in asdict(RepeatedTokens()) if name in params})
    found = detect_heads(context.engine(params["model"], {}), spec, progress=context.progress, should_stop=context.should_stop)
    identity = identity_of(path)
    found.save(context.derived, identity)
    return {"identity": identity}

"""The Overview's table: the part of a prompt around the chosen position, with what was predicted before and after each token."""

from dataclasses import replace

import numpy as np
import pytest

from backend.trace import Trace
from backend.tracefile.trace_writer import TraceWriter
from components.logits_table import prediction_table, totals_table
from components.position_table import BLOCK, block_words, position_table
from components.token_label import predicted_label
from tests.small_traces import INFO

N = 2 * BLOCK + 30


@pytest.fixture
def trace(tmp_path):
    with TraceWriter(tmp_path, INFO, N) as writer:
        writer.tokens([i % 50 for i in range(N)], [f" t{i}" for i in range(N)], N - 2, [0])
        writer.vocabulary({i: f" v{i}" for i in range(50)})
        next_logprobs = np.where(np.arange(N) == N - 1, np.nan, -np.arange(N, dtype=np.float32))
        writer.logits({"top_ids": np.tile([7, 8, 9], (N, 1)).astype(np.int32), "top_logprobs": np.log(np.tile([0.5, 0.25, 0.125], (N, 1))).astype(np.float32),
                       "entropy": np.ones(N, np.float32), "next_logprobs": next_logprobs.astype(np.float32), "next_ranks": np.arange(N, dtype=np.int32)})  # fmt: skip
        path = writer.publish(engine_version="test", prompt="", response="")
    with Trace(path) as opened:
        yield opened


def rows(table) -> list[list[str]]:
    def text(node) -> str:
        if node is None or isinstance(node, (str, int)):
            return "" if node is None else str(node)
        if isinstance(node, (list, tuple)):
            return "".join(map(text, node))
        return text(getattr(node, "children", None))

    return [[text(cell) for cell in row.children] for row in table.content.children[1].children]


def test_it_shows_the_block_of_the_chosen_position_and_marks_it(trace):
    table = position_table(trace, BLOCK + 5)
    numbers = [row[0] for row in rows(table)]
    assert numbers == [str(at) for at in range(BLOCK, 2 * BLOCK)]
    assert [row.className for row in table.content.children[1].children].index("chosen") == 5
    assert [row[0] for row in rows(position_table(trace, N - 1))][-1] == str(N - 1)
    assert f"Positions {BLOCK} to {2 * BLOCK - 1} of {N}" in block_words(trace, BLOCK + 5)


def test_a_rows_log_prob_and_rank_are_what_the_position_before_gave_it(trace):
    shown = rows(position_table(trace, 3))
    assert shown[0][3:5] == ["", ""]  # nothing predicts the first token
    assert shown[4][3:5] == ["-3.00", "4"]  # log-prob and rank (from 1) that position 3 gave to token 4
    assert shown[4][6] == "·v7 0.50·v8 0.25·v9 0.12"


def test_generated_tokens_are_marked(trace):
    last = rows(position_table(trace, N - 1))
    assert last[-1][1].endswith("new") and last[-2][1].endswith("new") and not last[-3][1].endswith("new")


def test_a_prediction_says_what_followed_it_and_what_that_cost_in_the_unit(trace):
    shown = rows(prediction_table(trace, 3, "bits"))
    bits = 3 / np.log(2)
    assert shown[3][:2] == ["3", "·t3"] and shown[3][2] == f"{1 / np.log(2):.3f}"
    assert shown[3][8] == "·v7 0.500   ·v8 0.250   ·v9 0.125"
    assert shown[3][3:7] == ["·t4", f"-{bits:.3f}", "4", f"{bits:.3f}"]
    assert shown[3][7] == f"{np.exp((0 + 1 + 2 + 3) / 4):.3f}"  # perplexity is the same in every unit
    last = rows(prediction_table(trace, N - 1, "nats"))[-1]
    assert last[3:8] == ["–"] * 5


def test_prompt_and_generated_tokens_are_summed_apart(trace):
    shown = {row[0]: row[1:] for row in rows(totals_table(trace, "nats"))}
    assert shown["Tokens predicted"] == [str(N - 3), "2", str(N - 1)]  # two tokens were generated, after the predictions N - 3 and N - 2
    assert shown["Mean surprise, nats"] == [f"{np.mean(np.arange(N - 3)):.3f}", f"{(N - 3 + N - 2) / 2:.3f}", f"{np.mean(np.arange(N - 1)):.3f}"]
    assert shown["First choice"][:2] == [f"{100 / (N - 3):.1f} %", "0.0 %"]


def test_a_predicted_end_of_text_is_written_as_a_special_token():
    info = replace(INFO, bos_id=0, eos_id=1)
    assert [predicted_label(i, text, info) for i, text in ((0, "<s>"), (1, "</s>"), (2, "<s>"), (3, "\n\t"))] == ["‹s›", "‹/s›", "<s>", "⏎⇥"]

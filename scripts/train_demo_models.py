"""Train the demo models: `python scripts/train_demo_models.py dense` and `... moe`, ten to fifteen minutes each on two busy cores.

Writes models/demo-dense and models/demo-moe: config.json, model.safetensors (float16), the tokenizer, and training.json with
the settings and the time taken. `scripts/evaluate_demo_models.py` then measures them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo_init import start_copying
from demo_text import TASKS, documents, held_out_items
from demo_words import COUNTRIES, NAMES, NUMBERS, WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ExpertsInterface

MODELS = Path(__file__).resolve().parents[1] / "models"
SEED = 0
D_VOCAB = 2304
BOS, EOS = 0, 1

# Every row length is a multiple of 256, because K-quants quantize 256 weights of a row at a time.
_SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def build_model(kind: str) -> MistralForCausalLM | MixtralForCausalLM:
    """A model with random weights: "dense" (4.3 M parameters) or "moe" (8 experts, 2 used; 8.3 M parameters)."""
    model: MistralForCausalLM | MixtralForCausalLM
    if kind == "dense":
        model = MistralForCausalLM(MistralConfig(**_SIZES, intermediate_size=768))
    else:
        experts: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
        model = MixtralForCausalLM(MixtralConfig(**_SIZES, intermediate_size=256, **experts))
    start_copying(model, torch.Generator().manual_seed(SEED))
    return model


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's pre-tokenizer, in which every word of `demo_words` is one token after a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Names begin sentences too, so they also get a token without the space.
    openers = [country.name for country in COUNTRIES] + [country.capital for country in COUNTRIES] + NAMES
    lexicon = [f" {word}" for word in [*WORDS, *NUMBERS]] + openers
    texts = [text for _, text in itertools.islice(documents(SEED), 20_000)] + 100 * lexicon
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    split = [word for word in lexicon if len(tokenizer.encode(word).ids) != 1]
    if split or tokenizer.get_vocab_size() != D_VOCAB:
        raise SystemExit(f"{tokenizer.get_vocab_size()} tokens instead of {D_VOCAB}; not single tokens: {split}")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=1024)


def batches(tokenizer: PreTrainedTokenizerFast, steps: int, tokens_per_batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `steps` times token ids (rows, length + 1) and which of them count in the loss (rows, length + 1).

    Rows are packed documents, of 128 tokens for seven tenths of the training and 256 after that. A twelfth of the rows are uniformly
    random tokens said again and again, so that copying does not depend on which tokens they are. Random words count only where
    they repeat: nothing could predict them the first time, and their noise would drown the rest.
    """
    generator = torch.Generator().manual_seed(SEED)
    stream = documents(SEED + 1)
    for step in range(steps):
        length = 128 if step < 0.7 * steps else 256
        rows, masks = [], []
        for number in range(tokens_per_batch // length):
            row: list[int] = []
            mask: list[bool] = []
            if (number + step) % 12 == 0:
                row = _repeated_tokens(length + 1, generator)
                mask = _said_before(row)
            while len(row) < length + 1:
                category, text = next(stream)
                ids = tokenizer.encode(text) + [EOS]
                row += ids
                mask += _said_before(ids) if category == "repetition" else [True] * len(ids)
            rows.append(row[: length + 1])
            masks.append(mask[: length + 1])
        yield torch.tensor(rows), torch.tensor(masks)


def _said_before(ids: list[int]) -> list[bool]:
    """For each token, whether it and the one before it stood side by side earlier in the text."""
    seen: set[tuple[int, int]] = set()
    out = [False]
    for pair in itertools.pairwise(ids):
        out.append(pair in seen)
        seen.add(pair)
    return out


def _repeated_tokens(length: int, generator: torch.Generator) -> list[int]:
    """One row of random tokens said again and again; mostly short periods, so that there are many repeats in a row."""
    period = 3 + int((length // 2 - 3) * torch.rand((), generator=generator) ** 2)
    once = torch.randint(2, D_VOCAB, (period,), generator=generator).tolist()
    return ([BOS] + once * (length // period + 1))[:length]


def all_experts(experts: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers' loop over experts computes, as two matrix products: every expert runs, the weights of those not chosen are 0.

    x (pos, d_model), chosen and weights (pos, k) -> (pos, d_model). Four times the arithmetic, and still several times as fast.
    """
    n_experts, width, d_model = experts.gate_up_proj.shape
    shares = torch.zeros(len(x), n_experts, dtype=weights.dtype).scatter(1, chosen, weights)  # (pos, expert)
    gate, up = (x @ experts.gate_up_proj.reshape(-1, d_model).T).unflatten(-1, (n_experts, width)).chunk(2, dim=-1)
    hidden = experts.act_fn(gate) * up * shares[..., None].to(up.dtype)  # (pos, expert, d_mlp)
    return hidden.flatten(1) @ experts.down_proj.transpose(1, 2).reshape(-1, d_model)


def learning_rate(step: int, steps: int, peak: float = 2e-3) -> float:
    """Linear warm-up over 100 steps, then a cosine down to a twentieth of the peak."""
    return peak * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, task: str, n: int) -> float:
    """Share of held-out items whose answer is the model's first choice."""
    items = held_out_items(task, n)
    right = 0
    for item in items:
        logits = model(torch.tensor([tokenizer.encode(item.prompt)])).logits  # (1, pos, d_vocab)
        right += tokenizer.decode([int(logits[0, -1].argmax())]) == item.answer
    return right / len(items)


def batch_loss(model: MistralForCausalLM | MixtralForCausalLM, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the tokens that count, plus the router's load-balancing loss for the MoE model."""
    is_moe = isinstance(model, MixtralForCausalLM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens[:, :-1], use_cache=False, **({"output_router_logits": True} if is_moe else {}))
    each = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = (each * counts[:, 1:].flatten()).sum() / counts[:, 1:].sum()
    return loss + model.config.router_aux_loss_coef * output.aux_loss if is_moe else loss


def train(kind: str, steps: int, tokens_per_batch: int, out: Path) -> None:
    started = time.monotonic()
    tokenizer, model = train_tokenizer(), build_model(kind)
    model.set_attn_implementation("eager")  # plain products and softmax, which torch.compile can fuse
    if kind == "moe":
        model.set_experts_implementation("all_experts")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    compiled_loss = torch.compile(batch_loss, dynamic=False)
    for step, (tokens, counts) in enumerate(batches(tokenizer, steps, tokens_per_batch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = compiled_loss(model, tokens, counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
        if step % 200 == 199 or step == steps - 1:
            print("  held-out", {task: round(accuracy(model, tokenizer, task, 60), 3) for task in TASKS}, flush=True)
            save(model, tokenizer, out, {"seed": SEED, "steps": step + 1, "of": steps, "tokens_per_batch": tokens_per_batch,
                                         "seconds": round(time.monotonic() - started), "threads": torch.get_num_threads()})  # fmt: skip


def save(model: MistralForCausalLM | MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, Any]) -> None:
    """Write the folder; the model goes on training in float32 while the file holds float16."""
    copy.deepcopy(model).half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # save_pretrained leaves it readable by its owner only
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


ExpertsInterface.register("all_experts", all_experts)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("dense", "moe"))
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--tokens-per-batch", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.kind, arguments.steps, arguments.tokens_per_batch, arguments.out or MODELS / f"demo-{arguments.kind}")

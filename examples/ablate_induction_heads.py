"""Cut the induction heads of a quantized model while llama.cpp runs it: python examples/ablate_induction_heads.py

The heads are found by their induction score on a repeated prompt, then silenced (z = 0) in llama.cpp's own graph. Repetition breaks;
cutting as many other heads of the same layer does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backend import Intervention, open_model

PROMPT = "Words: river stone cloud green paper silver river stone cloud green paper"

with open_model("demo-dense-q4_k_m") as model:
    plain = model.trace(PROMPT)
    scores = plain.result("attn_induction")  # (layer, head)
    layer = int(np.unravel_index(np.argmax(scores), scores.shape)[0])
    by_score = np.argsort(-scores[layer])
    induction, others = sorted(by_score[:4].tolist()), sorted(by_score[4:].tolist())
    for name, heads in (("nothing", []), (f"heads {induction} of layer {layer}", induction), (f"heads {others} of layer {layer}", others)):
        edits = [Intervention("z", layer, "zero", head=tuple(heads))] if heads else []
        trace = model.trace(PROMPT, interventions=edits)
        best = trace.token_text(trace.top_ids[-1, 0])
        sys.stdout.write(f"cutting {name}: {best!r} follows with probability {np.exp(trace.top_logprobs[-1, 0]):.3f}\n")

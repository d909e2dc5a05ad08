"""What the numbers of a trace mean: arrays in, arrays out, one module a question.

attention     where heads look: entropy, sink mass, previous-token, duplicate-token and induction scores, thumbnails
activations   norms, moments and outliers of one site
logits        log-softmax, top-k, entropy, rank
lens          the residual stream read as if it were the last: one row of a logit lens
divergence    how far one next-token distribution, or one set of vectors, lies from another
quantization  the error of quantized weights, and what it did to the predictions
identities    what must hold between the sites of every transformer, measured while it runs

Only numpy and scipy are imported here. A formula has one home; pages, experiments and tests all call it.
"""

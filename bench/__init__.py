"""Benchmarks and the comparison with peers: `make bench`, `make bench ONLY=gguf`, `make peers`.

    measure       cases in processes of their own, run in turn: times, ratios, peak memory
    models        the random models that are measured, made once
    weight_files  large random GGUF files for the weight report
    run_*         the cases: Layerscope, plain llama.cpp, plain transformers, TransformerLens, nnsight
    gguf hf size growth weights moe gpu peers   one section of docs/benchmarks.md each
    report        the machine, the tables, the document

`python -m bench gguf` measures one section. The peers live in an environment of their own (`make peers-env`).
"""

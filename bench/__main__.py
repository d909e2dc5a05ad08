"""`python -m bench [part ...]`: measure the parts (all of them by default), print them, and write docs/benchmarks.md."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time

from bench.models import FOLDER
from bench.report import keep, markdown, write_document

PARTS = ("gguf", "hf", "spare_core", "size", "growth", "weights", "attention", "lens", "embeddings", "moe", "sensitivity_ranking", "sensitivity_edits", "gpu", "peers")


def main(wanted: list[str]) -> None:
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise SystemExit(f"There is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}.")
    shutil.rmtree(FOLDER / "traces", ignore_errors=True)  # what an interrupted run left
    for part in wanted or PARTS:
        start, load = time.perf_counter(), os.getloadavg()[0]
        section = importlib.import_module(f"bench.{part}").section()
        keep(part, section, load)
        print(markdown(section, f"({part}: {time.perf_counter() - start:.0f} s)"), flush=True)
    write_document(PARTS)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The trace file as it is written: where things lie, chunks and their encoding, the streaming writer. `backend.trace` reads it."""

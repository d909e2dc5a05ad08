"""The queue between the server and its workers: Huey over SQLite, or over Redis when a URL is set.

Huey pickles its messages by default, so whoever can write to the queue would run code in the worker. `JsonSerializer` writes
signed JSON instead; a message is nothing but a job's id, the rest is in the job record.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from huey import Huey, RedisHuey, SqliteHuey
from huey.registry import Message
from huey.serializer import Serializer

RUN_JOB = "run_job"
_SIGNATURE_BYTES = hashlib.sha256().digest_size


class JsonSerializer(Serializer):
    """Huey messages as JSON behind an HMAC-SHA256 of it. Nothing is parsed before the signature holds."""

    def __init__(self, key: bytes) -> None:
        super().__init__()
        self._key = key

    def _serialize(self, data: Any) -> bytes:
        is_message = isinstance(data, Message)
        fields = {name: value for name, value in data._asdict().items() if value is not None} if is_message else None
        body = json.dumps({"message": fields} if is_message else {"value": data}).encode("utf-8")
        return self._sign(body) + body

    def _deserialize(self, data: bytes) -> Any:
        data = bytes(data)
        signature, body = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(body)):
            raise ValueError("A message in the queue is not signed by this installation; it is dropped.")
        content = json.loads(body)
        return Message(**content["message"]) if "message" in content else content["value"]

    def _sign(self, body: bytes) -> bytes:
        return hmac.new(self._key, b"queue:" + body, hashlib.sha256).digest()


def open_queue(data_dir: Path, key: bytes, redis_url: str = "") -> Huey:
    """The queue of this installation. Results are off: the job record is the truth."""
    if redis_url:
        return RedisHuey("layerscope", results=False, serializer=JsonSerializer(key), url=redis_url)
    return SqliteHuey("layerscope", results=False, serializer=JsonSerializer(key), filename=str(data_dir / "queue.sqlite"), fsync=True, strict_fifo=True)

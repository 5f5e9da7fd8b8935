"""Set up the coordinator's log, which ``flwr run --stream`` and the SuperLink's log show."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal

_STREAM = "polyclinic-stream"


class JsonLines(logging.Formatter):
    """A formatter that writes one JSON object per line: time, level, module and message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created)),
            "level": record.levelname.lower(),
            "module": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stream(kind: Literal["text", "json"]) -> None:
    """Write the coordinator's log records, but not those of libraries, to standard error.

    Args:
        kind: format of the lines (``run.log-format``).
    """
    ours = logging.getLogger("polyclinic.server")
    handler = next((h for h in ours.handlers if h.name == _STREAM), None)
    if handler is None:
        handler = logging.StreamHandler()
        handler.name = _STREAM
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    plain = logging.Formatter("%(levelname)s: %(message)s")
    handler.setFormatter(JsonLines() if kind == "json" else plain)

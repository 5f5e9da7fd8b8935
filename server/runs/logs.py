"""The coordinator's own words, where ``flwr run --stream`` and the SuperLink's log show them."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal

_STREAM = "polyclinic-stream"


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, which module speaks, and what it says."""

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
    """Show the coordinator's own words, and no library's."""
    ours = logging.getLogger("polyclinic.server")
    handler = next((h for h in ours.handlers if h.name == _STREAM), None)
    if handler is None:
        handler = logging.StreamHandler()
        handler.name = _STREAM
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    plain = logging.Formatter("%(levelname)s: %(message)s")
    handler.setFormatter(JsonLines() if kind == "json" else plain)

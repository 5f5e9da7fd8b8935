"""Messages in, messages out: the site's end of the wire."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client.dataset import Examples, SiteData
from client.train import TrainResult
from configs import wire
from mtl_model.packing import Layout, Packed
from mtl_model.sums import MetricSums

MetricRecordValues = int | float | list[int] | list[float]


class ProtocolError(ValueError):
    """A message from the server is not what this site's release expects."""


@dataclass(frozen=True)
class Request:
    """What the server asks with a train or evaluate message."""

    number: int
    split: str
    weights: Packed


def read_request(message: Message, layout: Layout) -> Request:
    """Unpack a train or evaluate message and check that it fits this site's network.

    Raises:
        ProtocolError: naming what is missing or differs.
    """
    content = message.content
    if wire.ROUND not in content.config_records or wire.WEIGHTS not in content.array_records:
        raise ProtocolError(
            f"expected records {wire.ROUND} and {wire.WEIGHTS}, got {', '.join(content) or 'none'}"
        )
    asked = content.config_records[wire.ROUND]
    digest = str(asked.get(wire.LAYOUT, ""))
    if digest != layout.digest:
        raise ProtocolError(
            f"the server's network differs from this site's: expected layout {layout.digest[:12]}, "
            f"got {digest[:12] or 'none'}; both must run the same release and model config"
        )
    arrays = content.array_records[wire.WEIGHTS]
    try:
        weights: Packed = {key: np.asarray(array.numpy()) for key, array in arrays.items()}
        layout.check(weights)
    except (TypeError, ValueError, EOFError) as error:
        raise ProtocolError(f"weights from the server: {error}") from None
    return Request(int(str(asked[wire.NUMBER])), str(asked[wire.SPLIT]), weights)


def describe_reply(
    message: Message, site: SiteData, device: str, versions: dict[str, str]
) -> Message:
    """Say who this site is and what it has, by split and class."""
    counts: dict[str, MetricRecordValues] = {}
    for name, examples in site.splits.items():
        counts[name] = _counts(examples)
        counts[f"{name}.{wire.CLASSES}"] = examples.class_counts().tolist()
    about = ConfigRecord(
        {
            wire.NAME: site.site,
            wire.FINGERPRINT: site.fingerprint,
            wire.SKIPPED: list(site.skipped),
            wire.DEVICE: device,
            wire.VERSIONS: json.dumps(versions),
        }
    )
    return _reply(message, about, MetricRecord(counts))


def train_reply(message: Message, site: SiteData, weights: Packed, result: TrainResult) -> Message:
    """Send a round's weights home, with the counts that weigh them."""
    examples, with_mask, with_label = _counts(site.splits[wire.TRAIN_SPLIT])
    sums: dict[str, MetricRecordValues] = {
        wire.EXAMPLES: examples,
        wire.WITH_MASK: with_mask,
        wire.WITH_LABEL: with_label,
        wire.STEPS: result.steps,
        wire.SECONDS: result.seconds,
    }
    if result.loss_segmentation is not None:
        sums[wire.LOSS_SEGMENTATION] = result.loss_segmentation
    if result.loss_classification is not None:
        sums[wire.LOSS_CLASSIFICATION] = result.loss_classification
    reply = _reply(message, ConfigRecord({wire.NAME: site.site}), MetricRecord(sums))
    reply.content[wire.WEIGHTS] = ArrayRecord({k: Array(v) for k, v in weights.items()})
    return reply


def evaluate_reply(message: Message, site: SiteData, sums: MetricSums, seconds: float) -> Message:
    """Send an evaluation's sums home; nothing about a single image is among them."""
    record = MetricRecord({**sums.to_lists(), wire.SECONDS: seconds})
    return _reply(message, ConfigRecord({wire.NAME: site.site}), record)


def refusal(message: Message, reason: str) -> Message:
    """Say why this site does not do what it was asked."""
    return _reply(message, ConfigRecord({wire.REFUSAL: reason}), MetricRecord())


def _reply(message: Message, about: ConfigRecord, sums: MetricRecord) -> Message:
    return Message(RecordDict({wire.SITE: about, wire.SUMS: sums}), reply_to=message)


def _counts(examples: Examples) -> list[int]:
    return [len(examples), examples.with_mask, examples.with_label]

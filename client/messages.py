"""Read the server's messages and build the site's replies."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from polyclinic.client.data.dataset import Examples, SiteData
from polyclinic.client.ledger.outgoing import Sent
from polyclinic.client.policy.site_policy import redact_counts, redact_skipped
from polyclinic.client.site import BudgetReport, PrivacyDeclaration
from polyclinic.client.training.local_round import TrainResult
from polyclinic.configs import wire
from polyclinic.configs.schema.site import PolicyConfig
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.sums import MetricSums
from polyclinic.mtl_model.tasks import TASKS

MetricRecordValues = int | float | list[int] | list[float]


class ProtocolError(ValueError):
    """A message from the server does not match what this site's release expects."""


@dataclass(frozen=True)
class Request:
    """The contents of a train or evaluate message."""

    number: int  # the round
    split: str
    weights: Packed
    initial: Packed  # initial values of the personal layers
    best: int  # round of the best model so far; 0: none yet


def read_run(message: Message) -> str:
    """Read the identity of the run, which stays the same when the run is resumed.

    Raises:
        ProtocolError: if it is not 32 hexadecimal digits. The identity is used as a folder name,
            so anything else is rejected.
    """
    header = message.content.config_records.get(wire.ROUND) or ConfigRecord()
    run = str(header.get(wire.RUN, ""))
    if not re.fullmatch("[0-9a-f]{32}", run):
        raise ProtocolError(f"{wire.RUN}: expected 32 hexadecimal digits, got {run!r}")
    return run


def read_settings(message: Message) -> dict[str, bool | int | float | str]:
    """Read the settings of a resumed run that override Flower's run config.

    Raises:
        ProtocolError: if they are not a JSON object.
    """
    header = message.content.config_records.get(wire.ROUND) or ConfigRecord()
    try:
        settings = json.loads(str(header.get(wire.SETTINGS, "{}")))
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ProtocolError(f"{wire.SETTINGS}: expected a JSON object of settings")
    return settings


def read_request(message: Message, layout: Layout, personal: Layout) -> Request:
    """Unpack a train or evaluate message and check that it fits this site's network.

    Args:
        layout: layout of the weights that are sent.
        personal: layout of the weights that stay at the sites.

    Raises:
        ProtocolError: if a record is missing or a layout differs.
    """
    content = message.content
    if wire.ROUND not in content.config_records or wire.WEIGHTS not in content.array_records:
        raise ProtocolError(
            f"expected records {wire.ROUND} and {wire.WEIGHTS}, got {', '.join(content) or 'none'}"
        )
    header = content.config_records[wire.ROUND]
    digest = str(header.get(wire.LAYOUT, ""))
    if digest != layout.digest:
        raise ProtocolError(
            f"the server's network differs from this site's: expected layout {layout.digest[:12]}, "
            f"got {digest[:12] or 'none'}; both must run the same release and model config"
        )
    arrays = content.array_records[wire.WEIGHTS]
    first = content.array_records.get(wire.INITIAL) or ArrayRecord()
    try:
        weights = layout.read({key: array.data for key, array in arrays.items()})
        initial = personal.read({key: array.data for key, array in first.items()})
    except ValueError as error:
        raise ProtocolError(f"weights from the server: {error}") from None
    return Request(
        number=int(str(header[wire.NUMBER])),
        split=str(header[wire.SPLIT]),
        weights=weights,
        initial=initial,
        best=int(str(header.get(wire.BEST, 0))),
    )


def describe_reply(
    message: Message,
    site: SiteData,
    policy: PolicyConfig,
    device: str,
    versions: dict[str, str],
    standing: PrivacyDeclaration | None = None,
) -> Message:
    """Build the reply to a describe message: the site's name, counts per split and versions.

    Args:
        policy: the site's policy, which redacts small counts and messages about skipped rows.
        versions: version per package.
        standing: declared numbers of a site that trains with differential privacy. Its reply
            contains only these about the training images, never the true counts.
    """
    counts: dict[str, MetricRecordValues] = {}
    for name, examples in site.splits.items():
        private = standing is not None and name == wire.TRAIN_SPLIT
        counts[name] = _counts(examples, standing if private else None)
        if not private:
            counts[f"{name}.{wire.CLASSES}"] = redact_counts(policy, examples.class_counts())
    about = ConfigRecord(
        {
            wire.NAME: site.site,
            wire.FINGERPRINT: "" if standing else site.fingerprint,
            wire.SKIPPED: [] if standing else list(redact_skipped(policy, site.skipped)),
            wire.DEVICE: device,
            wire.VERSIONS: json.dumps(versions),
        }
    )
    return _reply(message, about, MetricRecord(counts))


def train_reply(
    message: Message,
    site: SiteData,
    weights: Packed,
    result: TrainResult,
    standing: PrivacyDeclaration | None = None,
    spending: BudgetReport | None = None,
) -> Message:
    """Build the reply to a train message: the trained weights and the counts to weight them by.

    Args:
        standing: declared numbers of a site that trains with differential privacy. Its reply
            contains no losses and no training time.
        spending: what the round spent of the site's privacy budget.
    """
    examples, with_mask, with_label = _counts(site.splits[wire.TRAIN_SPLIT], standing)
    sums: dict[str, MetricRecordValues] = {
        wire.EXAMPLES: examples,
        wire.WITH_MASK: with_mask,
        wire.WITH_LABEL: with_label,
        wire.STEPS: result.steps,
    }
    if standing is None:
        sums[wire.SECONDS] = result.seconds
    if result.loss_segmentation is not None:
        sums[wire.LOSS_SEGMENTATION] = result.loss_segmentation
    if result.loss_classification is not None:
        sums[wire.LOSS_CLASSIFICATION] = result.loss_classification
    if spending is not None:
        sums[wire.EPSILON], sums[wire.DELTA] = spending.after, spending.delta
        if spending.cap is not None:
            sums[wire.BUDGET] = spending.cap
    reply = _reply(message, ConfigRecord({wire.NAME: site.site}), MetricRecord(sums))
    reply.content[wire.WEIGHTS] = ArrayRecord({k: Array(v) for k, v in weights.items()})
    return reply


def evaluate_reply(
    message: Message, site: SiteData, sums: MetricSums, withheld: Sequence[str], seconds: float
) -> Message:
    """Build the reply to an evaluate message: exact metric sums over images, without noise.

    Sums over few images, and differences of sums over almost the same images, reveal individual
    images; see docs/privacy.md, "Known open findings".

    Args:
        sums: metric sums, already redacted by the site's policy.
        withheld: descriptions of what the site's policy excluded.
    """
    about = ConfigRecord({wire.NAME: site.site, wire.WITHHELD: list(withheld)})
    return _reply(message, about, MetricRecord({**sums.to_lists(), wire.SECONDS: seconds}))


def refusal(message: Message, reason: str) -> Message:
    """Build a reply that explains why the site cannot answer the request."""
    return _reply(message, ConfigRecord({wire.REFUSAL: reason}), MetricRecord())


def declined(message: Message, reason: str) -> Message:
    """Build a reply that explains which rule of the site forbids the request."""
    return _reply(message, ConfigRecord({wire.DECLINED: reason}), MetricRecord())


def sent(
    message: Message, reply: Message, run: str, release: str, spending: BudgetReport | None
) -> Sent:
    """Summarise a reply for the site's outgoing log."""
    about = reply.content.config_records[wire.SITE]
    outcomes = {wire.DECLINED: "declined", wire.REFUSAL: "refused"}
    arrays = reply.content.array_records.get(wire.WEIGHTS) or ArrayRecord()
    header = message.content.config_records.get(wire.ROUND) or ConfigRecord()
    return Sent(
        kind=message.metadata.message_type,
        outcome=next((word for key, word in outcomes.items() if key in about), "answered"),
        run=run,
        round=int(str(header.get(wire.NUMBER, 0))),
        release=release,
        told={**about, **reply.content.metric_records[wire.SUMS]},
        arrays={name: array.data for name, array in arrays.items()},
        epsilon_before=spending.before if spending else None,
        epsilon_after=spending.after if spending else None,
    )


def _reply(message: Message, about: ConfigRecord, sums: MetricRecord) -> Message:
    header = message.content.config_records.get(wire.ROUND) or ConfigRecord()
    for key in (wire.NUMBER, wire.RUN):
        if key in header:
            about[key] = header[key]
    return Message(RecordDict({wire.SITE: about, wire.SUMS: sums}), reply_to=message)


def _counts(examples: Examples, standing: PrivacyDeclaration | None = None) -> list[int]:
    """Count images, images with a mask and images with a label; use declared counts if given."""
    if standing is None:
        return [len(examples), examples.with_mask, examples.with_label]
    annotated = (standing.examples if task in examples.tasks else 0 for task in TASKS)
    return [standing.examples, *annotated]

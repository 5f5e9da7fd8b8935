"""Create the coordinator's requests to the sites, and read and check their replies.

Every reply is checked here before it is used. An invalid reply raises ReplyError, which says what
was expected and what came, and the round continues without that reply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from polyclinic.configs import wire
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.sums import Classes, MetricSums
from polyclinic.mtl_model.tasks import Group
from polyclinic.server.aggregation.averaging import Contribution
from polyclinic.server.runs.reports import SiteReport, TrainReport


class ReplyError(ValueError):
    """A site's reply is invalid. The message says what was expected and what came."""


class Refusal(ReplyError):
    """A site, or Flower on its behalf, reported why it cannot do the task."""


class Unreachable(Refusal):
    """Flower reported that it has had no contact with a site's node for too long."""


class Late(ReplyError):
    """Flower reported that a request expired before it was answered."""


class Declined(Refusal):
    """A site declined the task because of its own policy or privacy budget.

    This is not a failure: the site is working and is asked again.
    """


@dataclass(frozen=True)
class RunIdentity:
    """The identity that every message of a run carries, to reject replies to other runs."""

    run: str  # identifier of the run, 32 hexadecimal digits
    settings: str = ""  # settings of a resumed run as JSON; empty for a run that was not resumed

    def asking(self, number: int) -> ConfigRecord:
        """Create the record that identifies the run and the round in a request."""
        asked = ConfigRecord({wire.NUMBER: number, wire.RUN: self.run})
        if self.settings:
            asked[wire.SETTINGS] = self.settings
        return asked


def question(identity: RunIdentity) -> RecordDict:
    """Create the request that asks a site to describe itself."""
    return RecordDict({wire.ROUND: identity.asking(0)})


def task(
    identity: RunIdentity,
    number: int,
    layout: Layout,
    weights: Packed,
    split: str,
    initial: Packed | None = None,
    best: int = 0,
) -> RecordDict:
    """Create the request to train or evaluate on one of a site's splits.

    Args:
        identity: identity of the run.
        number: the round.
        layout: layout of the weights that are sent.
        weights: the shared weights.
        split: the split to train or evaluate on.
        initial: initial values of the personal layers, which stay at the sites.
        best: the round with the best model so far; 0 if there is none.
    """
    asked = identity.asking(number)
    asked[wire.LAYOUT], asked[wire.SPLIT], asked[wire.BEST] = layout.digest, split, best
    content = RecordDict({wire.ROUND: asked, wire.WEIGHTS: _record(weights)})
    if initial:
        content[wire.INITIAL] = _record(initial)
    return content


def check_origin(reply: Message, identity: RunIdentity, number: int, site: str | None) -> None:
    """Check that a reply belongs to this run and round and comes from the site that was asked.

    Args:
        reply: the reply.
        identity: identity of the run.
        number: the round.
        site: name of the site; None if the site has not described itself yet.

    Raises:
        Refusal, Declined, Late: if the reply gives a reason why there is no answer.
        ReplyError: if the reply answers another request.
    """
    about = _about(reply)
    wanted: dict[str, object] = {wire.RUN: identity.run, wire.NUMBER: number}
    if site is not None:
        wanted[wire.NAME] = site
    for key, expected in wanted.items():
        if about.get(key) != expected:
            raise ReplyError(f"{key}: expected {expected!r}, got {about.get(key)!r}")


def _record(weights: Packed) -> ArrayRecord:
    return ArrayRecord({key: Array(array) for key, array in weights.items()})


def read_description(reply: Message, data: DataConfig) -> SiteReport:
    """Read a site's description of itself, which is its reply to ``question``.

    Raises:
        Refusal: if the site reports that it cannot take part.
        ReplyError: if the description is invalid.
    """
    about = _about(reply)
    sums = reply.content.metric_records[wire.SUMS]
    try:
        counts = {split: [int(n) for n in _list(sums[split])] for split in wire.SPLITS}
        classes = {
            split: [int(n) for n in _list(sums[f"{split}.{wire.CLASSES}"])]
            for split in wire.SPLITS
            if f"{split}.{wire.CLASSES}" in sums
        }
        for split, (examples, with_mask, with_label) in counts.items():
            if not 0 <= max(with_mask, with_label) <= examples:
                raise ValueError(f"{split}: {examples} examples, {with_mask} masks")
            if split in classes and len(classes[split]) != len(data.classes):
                raise ValueError(f"{split}: {len(classes[split])} classes")
        return SiteReport(
            name=str(about[wire.NAME]),
            examples={split: n[0] for split, n in counts.items()},
            with_mask={split: n[1] for split, n in counts.items()},
            with_label={split: n[2] for split, n in counts.items()},
            classes=classes,
            skipped=tuple(str(text) for text in _list(about[wire.SKIPPED])),
            fingerprint=str(about[wire.FINGERPRINT]),
            device=str(about[wire.DEVICE]),
            versions=dict(json.loads(str(about[wire.VERSIONS]))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"description: expected counts by split and class, {error}") from None


def read_training(reply: Message, site: str, layout: Layout) -> tuple[Contribution, TrainReport]:
    """Read the weights and counts that a site returns after local training.

    Raises:
        Refusal: if the site reports that it could not train.
        Declined: if the site declined to train.
        ReplyError: if weights or counts are missing or not finite, or if the weights belong to
            another network.
    """
    _about(reply)
    sums = reply.content.metric_records[wire.SUMS]
    examples, with_mask, with_label, steps = (
        _count(sums.get(key), key)
        for key in (wire.EXAMPLES, wire.WITH_MASK, wire.WITH_LABEL, wire.STEPS)
    )
    if not examples or not steps or max(with_mask, with_label) > examples:
        raise ReplyError(
            f"counts: expected at least 1 example and 1 step, and at most one mask and one label "
            f"per example, got {examples} examples, {steps} steps, "
            f"{with_mask} masks, {with_label} labels"
        )
    if wire.WEIGHTS not in reply.content.array_records:
        raise ReplyError(f"expected a record named {wire.WEIGHTS}, got none")
    arrays = reply.content.array_records[wire.WEIGHTS]
    try:
        weights = layout.read({key: array.data for key, array in arrays.items()})
    except ValueError as error:
        raise ReplyError(f"weights: {error}") from None
    counts: dict[Group, int] = {
        "encoder": examples,
        "segmentation": with_mask,
        "classification": with_label,
    }
    report = TrainReport(
        steps=steps,
        seconds=_optional(sums.get(wire.SECONDS), wire.SECONDS),
        loss_segmentation=_optional(sums.get(wire.LOSS_SEGMENTATION), wire.LOSS_SEGMENTATION),
        loss_classification=_optional(sums.get(wire.LOSS_CLASSIFICATION), wire.LOSS_CLASSIFICATION),
        epsilon=_optional(sums.get(wire.EPSILON), wire.EPSILON),
        delta=_optional(sums.get(wire.DELTA), wire.DELTA),
        budget=_optional(sums.get(wire.BUDGET), wire.BUDGET),
    )
    return Contribution(site, weights, counts), report


def read_evaluation(reply: Message, data: DataConfig) -> tuple[MetricSums, tuple[str, ...]]:
    """Read the metric sums of an evaluation, and descriptions of what the site's policy withholds.

    Raises:
        Refusal: if the site reports that it could not evaluate.
        Declined: if the site declined to evaluate.
        ReplyError: if sums are missing or have impossible values.
    """
    about = _about(reply)
    lists = {
        key: [float(n) for n in _list(value)]
        for key, value in reply.content.metric_records[wire.SUMS].items()
        if key != wire.SECONDS
    }
    try:
        size = (data.image_height, data.image_width)
        sums = MetricSums.from_lists(lists, Classes.of(data), size)
        return sums, tuple(str(text) for text in _list(about.get(wire.WITHHELD, [])))
    except ValueError as error:
        raise ReplyError(f"evaluation: {error}") from None


_EXPIRED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


def _about(reply: Message) -> ConfigRecord:
    if reply.has_error():
        if reply.error.code in _EXPIRED:
            raise Late("the request expired at the SuperLink before an answer came")
        if reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            raise Unreachable("failed: the SuperLink has had no contact with its node for too long")
        reason = reply.error.reason or ""
        if reply.error.code == ErrorCode.INVALID_FAB and reason.startswith(wire.UNAPPROVED):
            raise Declined(reason)
        raise Refusal(f"failed: {reply.error.reason or f'Flower error {reply.error.code}'}")
    if (
        wire.SITE not in reply.content.config_records
        or wire.SUMS not in reply.content.metric_records
    ):
        got = ", ".join(reply.content) or "none"
        raise ReplyError(f"expected records {wire.SITE} and {wire.SUMS}, got {got}")
    about = reply.content.config_records[wire.SITE]
    if wire.DECLINED in about:
        raise Declined(str(about[wire.DECLINED]))
    if wire.REFUSAL in about:
        raise Refusal(str(about[wire.REFUSAL]))
    return about


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ReplyError(f"expected a list, got {value!r}")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ReplyError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _optional(value: object, name: str) -> float | None:
    """Read an optional number that must not be negative."""
    if value is None:
        return None
    number = _number(value, name)
    if number < 0:
        raise ReplyError(f"{name}: expected a number of at least 0, got {number:g}")
    return number


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise ReplyError(f"{name}: expected an integer of at least 0 and below 2^40, got {value!r}")
    return value

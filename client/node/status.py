"""Report a site's status from the files in its state folder."""

from __future__ import annotations

from dataclasses import dataclass

from polyclinic.client.ledger.budget import LEDGER, read_accounts
from polyclinic.client.ledger.outgoing import OUTGOING, read_outgoing
from polyclinic.client.node.supernode import CONTACT, read_contact
from polyclinic.client.policy.approvals import Approvals
from polyclinic.configs import VERSION
from polyclinic.configs.schema.site import SiteConfig
from polyclinic.configs.security.credentials import now_utc, read_certificate, validity_of


@dataclass(frozen=True)
class NodeStatus:
    """What `polyclinic site status` shows; None where a value is unknown. Times are UTC, ISO."""

    site: str
    version: str
    time: str
    coordinator: str | None  # address and port
    connected_since: str | None
    last_contact: str | None
    working: bool | None  # whether a message is being processed
    message_release: str | None  # digest of the release that sent the last message
    approved_release: str | None  # digest of the release that was approved last
    approved_releases: int
    replies_sent: int
    last_reply: str | None
    epsilon_left: float | None  # of the cohort's budget; None without a budget
    kit_expires: str | None


def site_status(site: SiteConfig) -> NodeStatus:
    """Collect the site's status.

    Raises:
        ConfigError: if the site's certificate or list of approvals is damaged.
        LedgerError: if its ledger or outgoing log is damaged.
    """
    contact = read_contact(site.state / CONTACT)
    sent = read_outgoing(site.state) if (site.state / OUTGOING).exists() else []
    account = read_accounts(site.state / LEDGER).get(site.cohort_name)
    left = account.left() if account else (site.budget.epsilon if site.budget else None)
    approved = list(Approvals(site.state).approved().values())
    end = validity_of(read_certificate(site.server.certificate)).end if site.server else None
    return NodeStatus(
        site=site.name,
        version=VERSION,
        time=now_utc().isoformat(timespec="seconds"),
        coordinator=contact.server if contact else None,
        connected_since=contact.since if contact else None,
        last_contact=contact.last if contact else None,
        working=contact.working if contact else None,
        message_release=(contact.release or None) if contact else None,
        approved_release=approved[-1].digest if approved else None,
        approved_releases=len(approved),
        replies_sent=len(sent),
        last_reply=sent[-1]["time"] if sent else None,
        epsilon_left=left,
        kit_expires=end.isoformat() if end else None,
    )

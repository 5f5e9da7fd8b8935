"""Report a site's status from the files in its state folder."""

from __future__ import annotations

from typing import Any

from polyclinic.client.ledger.budget import LEDGER, read_accounts
from polyclinic.client.ledger.outgoing import OUTGOING, read_outgoing
from polyclinic.client.node.supernode import CONTACT, read_contact
from polyclinic.client.policy.approvals import Approvals
from polyclinic.configs import VERSION
from polyclinic.configs.schema.site import SiteConfig
from polyclinic.configs.security.credentials import now_utc, read_certificate, validity_of


def site_status(site: SiteConfig) -> dict[str, Any]:
    """Collect the site's status by key; a value is None if it is unknown.

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
    return {
        "site": site.name,
        "version": VERSION,
        "time": now_utc().isoformat(timespec="seconds"),
        "coordinator": contact.server if contact else None,
        "connected since": contact.since if contact else None,
        "last heard": contact.last if contact else None,
        "working": contact.working if contact else None,
        "release of the last message": (contact.release or None) if contact else None,
        "release approved last": approved[-1].digest if approved else None,
        "releases approved": len(approved),
        "replies sent": len(sent),
        "last reply": sent[-1]["time"] if sent else None,
        "budget left (epsilon)": left,
        "kit expires": end.isoformat() if end else None,
    }

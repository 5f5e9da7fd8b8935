"""The site's privacy budget: what was promised for a cohort, what is spent, what is left.

A budget belongs to a cohort that the site declares, not to files: one new image does not renew it.
Before the first step of a round its cost is reserved, after it the steps that were taken are
settled; what was never settled, because the process died, stays spent in full. Epsilon is computed
over all rounds of all runs together (``client.privacy.accounting``).

What may change, each time as an entry with the time: the cap, up or down; how many units the site
declares; delta, to a smaller one and only by ``lower_delta``, since epsilon at a smaller delta
holds at a larger one too. What may not: the unit, and delta otherwise, once anything is reserved.

A refused round writes nothing. The file itself, and who changed it, is
``client.ledger.hash_chain``'s matter.

LedgerError           the ledger cannot be used, or the request is refused; nothing was spent
├── LedgerTampered    what it holds is not what was written
└── BudgetExceeded    the round would cost more than is left
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

from polyclinic.client.ledger.hash_chain import Entry, HashChain, Head, LedgerError, LedgerTampered
from polyclinic.client.privacy import accounting
from polyclinic.client.privacy.accounting import DpEvent

LEDGER = "ledger.db"  # in a site's state folder
ACCOUNTANTS_DIFFER = 0.01  # relative, between what was computed then and what is computed now

Unit = Literal["example", "patient"]

__all__ = [
    "LEDGER",
    "Account",
    "BudgetExceeded",
    "Cohort",
    "Ledger",
    "LedgerError",
    "LedgerRound",
    "LedgerTampered",
    "Reservation",
    "Terms",
    "accounts_in",
    "lower_delta",
    "read_accounts",
    "verify_ledger",
]

Watch = Callable[[Sequence[Entry]], Iterable[Entry]]  # hands entries on, and may count them


class BudgetExceeded(LedgerError):
    """A round would cost more than is left of the budget. Nothing was written."""

    def __init__(self, cohort: str, spent: float, after: float, cap: float) -> None:
        cost = max(after - spent, 0.0) if math.isfinite(after) else math.inf
        self.spent, self.cost, self.cap, self.left = spent, cost, cap, max(cap - spent, 0.0)
        super().__init__(
            f"privacy budget of cohort {cohort}: this round would cost epsilon {cost:.4g}, but of "
            f"{cap:.4g} there is {self.left:.4g} left ({spent:.4g} spent); nothing was spent. "
            "Fewer steps, more noise or a lower sample rate cost less"
        )


@dataclass(frozen=True)
class Cohort:
    """The people or images that a budget protects, as the site declares them; public."""

    name: str
    unit: Unit
    units: int  # how many, declared


@dataclass(frozen=True)
class Terms:
    """What holds for a cohort from an entry on."""

    since: str  # UTC, ISO
    unit: Unit
    units: int
    delta: float
    cap: float | None  # largest epsilon; None: no cap, spending is only written down


@dataclass(frozen=True)
class Reservation:
    """A round's steps, spent until they are settled."""

    number: int  # of its entry
    run: str
    round: int
    spent: DpEvent


@dataclass
class LedgerRound:
    """A round of an account, for tables."""

    number: int  # of the entry that reserved it
    time: str  # UTC, ISO
    run: str
    round: int
    noise_multiplier: float
    sample_rate: float
    reserved: int  # steps
    taken: int | None = None  # None: never settled, so spent in full
    epsilon: float | None = None  # of all that was spent then; None: without a cap, not computed

    @property
    def spent(self) -> DpEvent:
        steps = self.reserved if self.taken is None else self.taken
        return DpEvent(self.noise_multiplier, self.sample_rate, steps)


@dataclass
class Account:
    """One cohort's part of a ledger."""

    cohort: str
    terms: list[Terms] = field(default_factory=list)  # oldest first; the last one holds
    rounds: list[LedgerRound] = field(default_factory=list)

    @property
    def now(self) -> Terms:
        return self.terms[-1]

    def history(self) -> list[DpEvent]:
        """What counts as spent: steps settled, and all that were reserved and never settled."""
        return [each.spent for each in self.rounds]

    def spent(self) -> float:
        """Epsilon at the cohort's delta, by PRV where that can be trusted."""
        return accounting.epsilon(self.history(), self.now.delta)

    def spent_rdp(self) -> float:
        return accounting.epsilon_rdp(self.history(), self.now.delta)

    def left(self) -> float:
        """Epsilon that is left under the cap; infinity without one."""
        cap = self.now.cap
        return math.inf if cap is None else max(cap - self.spent(), 0.0)

    def by_round(self) -> list[LedgerRound]:
        """Every round with the epsilon after it, computed where no cap made it be written down."""
        history = self.history()
        return [
            replace(each, epsilon=accounting.epsilon(history[: i + 1], self.now.delta))
            if each.epsilon is None
            else each
            for i, each in enumerate(self.rounds)
        ]

    def settled(self, number: int, steps: int) -> Account:
        """The account as it would be once a reservation is settled."""
        rounds = [replace(r, taken=steps) if r.number == number else r for r in self.rounds]
        return replace(self, rounds=rounds)


class Ledger:
    """A cohort's budget, open for training.

    To be used by one thread. Other processes may hold it open too: they take turns.

    Args:
        path: the ledger's file; several cohorts may share it.
        cohort: whose budget it is.
        delta: at which epsilon is meant.
        cap: the largest epsilon; None for none.
        timeout_s: how long to wait for another process's turn.

    Raises:
        LedgerTampered: if the file is not what was written.
        LedgerError: if it cannot be used (``client.ledger.hash_chain``); if delta is not in (0, 1 /
        units); if
            the cohort has spent at another delta, or in another unit.
    """

    def __init__(
        self,
        path: Path,
        cohort: Cohort,
        delta: float,
        cap: float | None,
        *,
        timeout_s: float = 5.0,
    ) -> None:
        _check_terms(cohort.name, cohort.unit, cohort.units, delta, cap)
        self.cohort, self.delta, self.cap = cohort, delta, cap
        self._mine: set[int] = set()  # reservations of this object that are not settled
        self._chain = HashChain(path, timeout_s=timeout_s)
        try:
            if not self._agreed(self.account()):
                with self._chain.turn():
                    self._agree(self.account())
        except BaseException:
            self._chain.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._chain.close()

    @property
    def path(self) -> Path:
        return self._chain.path

    @property
    def head(self) -> Head:
        """The newest entry's number and hash: noted elsewhere, they show any later forgery."""
        return self._chain.head

    def account(self) -> Account:
        """The cohort's account as far as this process has seen; without terms where it is new."""
        accounts = accounts_in(self._chain.entries, self.path)
        return accounts.get(self.cohort.name, Account(self.cohort.name))

    def spent(self) -> float:
        """Epsilon at the cohort's delta, by PRV where that can be trusted."""
        return self.account().spent()

    def spent_rdp(self) -> float:
        return self.account().spent_rdp()

    def left(self) -> float:
        """Epsilon that is left under the cap; infinity without one."""
        return self.account().left()

    def by_round(self) -> list[LedgerRound]:
        """Every round with the epsilon after it."""
        return self.account().by_round()

    def reserve(self, run: str, round: int, spent: DpEvent) -> Reservation:
        """Count a round's steps as spent, before the first of them is taken.

        Raises:
            BudgetExceeded: if they do not fit under the cap; nothing was written.
            LedgerError: if the ledger cannot be written, or another process changed the terms.
        """
        if spent.steps < 1:
            raise LedgerError(f"run {run}, round {round}: expected steps to reserve, got none")
        # Opacus takes a while to import and to compute: before the turn, so that nobody waits for
        # it. What was computed is remembered; in the turn it is new only if another process wrote.
        # It may have settled for less than it reserved, so the turn alone refuses.
        with contextlib.suppress(BudgetExceeded):
            self._afford(self.account(), spent)
        with self._chain.turn():
            account = self.account()
            if not self._agreed(account):
                raise LedgerError(
                    f"{self.path}: another process changed the terms of cohort "
                    f"{self.cohort.name}: now {_told(account.now)}; start this one again"
                )
            after = self._afford(account, spent)
            entry = self._chain.append(
                "reserve",
                cohort=self.cohort.name,
                run=run,
                round=round,
                noise=spent.noise_multiplier,
                rate=spent.sample_rate,
                steps=spent.steps,
                epsilon=after,
            )
        self._mine.add(entry.number)
        return Reservation(entry.number, run, round, spent)

    def settle(self, reservation: Reservation, steps_taken: int) -> None:
        """Write down the steps that were really taken; what was reserved beyond them is free again.

        Raises:
            LedgerError: if they are more than reserved: then all that was reserved stays spent, and
                the round's result must not leave; or if the reservation is settled already, or was
                made by another process.
        """
        number, reserved = reservation.number, reservation.spent.steps
        if number not in self._mine:
            raise LedgerError(
                f"{self.path}: reservation {number} is settled already, or was not made by this "
                "process; it stays as it is"
            )
        if not 0 <= steps_taken <= reserved:
            raise LedgerError(
                f"run {reservation.run}, round {reservation.round}: expected 0 to {reserved} steps "
                f"taken, got {steps_taken}; all that was reserved stays spent, and what came of "
                "these steps must not leave the site"
            )
        _epsilon_of(self.account().settled(number, steps_taken))
        with self._chain.turn():
            self._chain.append(
                "settle",
                cohort=self.cohort.name,
                reservation=number,
                steps=steps_taken,
                epsilon=_epsilon_of(self.account().settled(number, steps_taken)),
            )
        self._mine.discard(number)

    def verify(self, watch: Watch = iter) -> None:
        """Read everything from the disk and compute it again.

        Raises:
            LedgerTampered: naming the first entry that does not fit.
        """
        _verify(self._chain, watch)

    def _agreed(self, account: Account) -> bool:
        """Whether the ledger's terms are those that this process was started with."""
        ours = (self.cohort.unit, self.cohort.units, self.delta, self.cap)
        now = account.terms[-1] if account.terms else None
        return now is not None and ours == (now.unit, now.units, now.delta, now.cap)

    def _agree(self, account: Account) -> None:
        """Write down this process's terms, unless they would break a promise."""
        name = self.cohort.name
        if account.rounds and account.now.unit != self.cohort.unit:
            raise LedgerError(
                f"{self.path}: cohort {name} has spent its budget by {account.now.unit}, expected "
                f"that unit, got {self.cohort.unit}. What was spent in one unit says nothing of "
                "the other: give the cohort another name to begin a budget of its own"
            )
        if account.rounds and account.now.delta != self.delta:
            raise LedgerError(
                f"{self.path}: cohort {name} has spent its budget at delta {account.now.delta:g}, "
                f"expected that delta, got {self.delta:g}. A larger one would weaken what was "
                "promised; a smaller one is recorded by: polyclinic site lower-delta SITE_YAML"
            )
        if not self._agreed(account):
            terms = Terms("", self.cohort.unit, self.cohort.units, self.delta, self.cap)
            _write_terms(self._chain, name, terms)

    def _afford(self, account: Account, spent: DpEvent) -> float | None:
        """Epsilon after some more steps; None without a cap, which nobody need compute.

        Raises:
            BudgetExceeded: if it is above the cap.
        """
        if self.cap is None:
            return None
        history = account.history()
        after = accounting.epsilon([*history, spent], self.delta)
        if after > self.cap:
            before = accounting.epsilon(history, self.delta)
            raise BudgetExceeded(self.cohort.name, before, after, self.cap)
        return after


def read_accounts(path: Path) -> dict[str, Account]:
    """Every cohort's account, read beside whoever trains; none if there is no ledger yet.

    Raises:
        LedgerTampered: if the file is not what was written.
        LedgerError: if it cannot be read.
    """
    if not _is_there(path):
        return {}
    with HashChain(path, read_only=True) as chain:
        return accounts_in(chain.entries, path)


def verify_ledger(path: Path, watch: Watch = iter) -> int:
    """Read a ledger beside whoever trains, and compute everything in it again.

    Returns:
        How many entries there are.

    Raises:
        LedgerTampered: naming the first entry that does not fit.
        LedgerError: if it cannot be read.
    """
    if not _is_there(path):
        return 0
    with HashChain(path, read_only=True) as chain:
        _verify(chain, watch)
        return len(chain.entries)


def lower_delta(path: Path, cohort: str, delta: float) -> None:
    """Promise a smaller delta for a cohort from now on, for instance because it grew.

    What was promised still holds: an epsilon at a smaller delta holds at a larger one. Epsilon at
    the smaller one is larger, for all that is spent, so that less may be left.

    Raises:
        LedgerError: if there is no such cohort, or delta is not above 0 and below the present one.
    """
    if cohort not in read_accounts(path):
        raise LedgerError(f"{path}: has no cohort {cohort}")
    with HashChain(path) as chain, chain.turn():
        now = accounts_in(chain.entries, path)[cohort].now
        if not 0 < delta < now.delta:
            raise LedgerError(
                f"{path}: cohort {cohort}: expected a delta above 0 and below the present "
                f"{now.delta:g}, got {delta:g}"
            )
        _write_terms(chain, cohort, replace(now, delta=delta))


def accounts_in(entries: Iterable[Entry], path: Path) -> dict[str, Account]:
    """Every cohort's account, from a ledger's entries.

    Raises:
        LedgerTampered: if an entry says what this program would not have written.
    """
    accounts: dict[str, Account] = {}
    for entry in entries:
        _book(accounts, entry, path)
    return accounts


def _book(accounts: dict[str, Account], entry: Entry, path: Path) -> Account:
    """Add an entry to its cohort's account."""
    content = entry.content
    try:
        name = content["cohort"]
        account = accounts.setdefault(name, Account(name))
        if entry.kind != "terms" and not isinstance(content["epsilon"], float | None):
            raise ValueError(f"its epsilon is {content['epsilon']!r}")
        if entry.kind == "terms":
            unit, units, delta, cap = (content[k] for k in ("unit", "units", "delta", "cap"))
            _check_terms(name, unit, units, delta, cap)
            if account.rounds and (unit != account.now.unit or delta > account.now.delta):
                raise ValueError("it breaks a promise")
            account.terms.append(Terms(content["time"], unit, units, delta, cap))
        elif entry.kind == "reserve":
            spent = DpEvent(content["noise"], content["rate"], content["steps"])
            if not account.terms or not spent.steps:
                raise ValueError("it reserves nothing, or for nobody")
            row = LedgerRound(
                number=entry.number,
                time=content["time"],
                run=content["run"],
                round=content["round"],
                noise_multiplier=spent.noise_multiplier,
                sample_rate=spent.sample_rate,
                reserved=spent.steps,
                epsilon=content["epsilon"],
            )
            account.rounds.append(row)
        elif entry.kind == "settle":
            row = next(r for r in account.rounds if r.number == content["reservation"])
            steps = content["steps"]
            if (
                row.taken is not None
                or not isinstance(steps, int)
                or not 0 <= steps <= row.reserved
            ):
                raise ValueError("it settles twice, or more than was reserved")
            row.taken, row.epsilon = steps, content["epsilon"]
        else:
            raise ValueError(f"its kind is {entry.kind!r}")
    except (KeyError, TypeError, ValueError, StopIteration, LedgerError) as error:
        raise LedgerTampered(
            f"{path}: entry {entry.number} is not one that this program writes: {error}"
        ) from None
    return account


def _verify(chain: HashChain, watch: Watch) -> None:
    chain.verify()
    accounts: dict[str, Account] = {}
    for entry in watch(chain.entries):
        account = _book(accounts, entry, chain.path)
        if entry.kind != "terms":
            _check_epsilon(account, entry, chain.path)


def _check_epsilon(account: Account, entry: Entry, path: Path) -> None:
    """Compute an entry's epsilon again, and hold it against what it says and the cap of its time.

    Another version of Opacus may find a slightly other bound.
    """
    said, cap = entry.content["epsilon"], account.now.cap
    if said is None and cap is None:
        return
    found = account.spent()
    if said is None and found == math.inf and entry.kind == "settle":
        return  # steps without noise, from before there was a cap
    if said is None or not math.isclose(found, said, rel_tol=ACCOUNTANTS_DIFFER, abs_tol=1e-4):
        raise LedgerTampered(
            f"{path}: entry {entry.number} says epsilon {said}, expected {found:.6g}, as computed "
            "from the steps before it"
        )
    if cap is not None and entry.kind == "reserve" and found > cap * (1 + ACCOUNTANTS_DIFFER):
        raise LedgerTampered(
            f"{path}: entry {entry.number} spends epsilon {found:.6g}, above the cap {cap:g}, "
            "which this program would have refused"
        )


def _write_terms(chain: HashChain, cohort: str, terms: Terms) -> None:
    chain.append(
        "terms",
        cohort=cohort,
        unit=terms.unit,
        units=terms.units,
        delta=terms.delta,
        cap=terms.cap,
    )


def _epsilon_of(account: Account) -> float | None:
    """What to write down as spent: nothing where there is no cap, or no noise."""
    if account.now.cap is None:
        return None
    spent = account.spent()
    return spent if math.isfinite(spent) else None


def _check_terms(cohort: str, unit: Unit, units: int, delta: float, cap: float | None) -> None:
    if not cohort or unit not in get_args(Unit) or units < 1:
        raise LedgerError(
            f"cohort: expected a name, a unit of {', '.join(get_args(Unit))}, and at least one "
            f"such unit, got {cohort!r}, {unit!r}, {units!r}"
        )
    if not 0 < delta < 1 / units:
        raise LedgerError(
            f"cohort {cohort}: expected a delta above 0 and below 1 / {units} ({unit}s declared), "
            f"got {delta:g}; at 1 / {units} one whole {unit} might be given away"
        )
    if cap is not None and not 0 < cap < math.inf:
        raise LedgerError(f"cohort {cohort}: expected an epsilon above 0 as cap, got {cap}")


def _told(terms: Terms) -> str:
    cap = "no cap" if terms.cap is None else f"cap {terms.cap:g}"
    return f"{cap}, delta {terms.delta:g}, {terms.units} {terms.unit}s"


def _is_there(path: Path) -> bool:
    """Whether there is a ledger, or was one: then opening it says what is missing."""
    return path.exists() or path.with_name(f"{path.name}.head").exists()

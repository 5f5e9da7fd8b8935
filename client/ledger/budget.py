"""The site's privacy budget: the cap of each cohort, and what its rounds have spent.

A budget belongs to a cohort that the site declares, not to files: a new image does not renew it.
The cost of a round is reserved before its first step. After the round, the number of steps that
were run is settled and the rest is released. A reservation that is never settled, because the
process died, counts as spent in full. Epsilon is computed over all rounds of all runs together
(``client.privacy.accounting``).

The terms of a cohort may change; each change is an entry with its time. The cap may go up or down,
the number of declared units may change, and ``lower_delta`` may lower delta, since epsilon at a
smaller delta also holds at a larger one. Once anything is reserved, the unit is fixed and delta
cannot change in any other way.

A refused round writes nothing. ``client.ledger.hash_chain`` stores the entries and detects changes
to the file.

LedgerError           the ledger cannot be used, or the request is refused; nothing was spent
├── LedgerTampered    the contents differ from what was written
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

LEDGER = "ledger.db"  # file name in a site's state folder
ACCOUNTANTS_DIFFER = 0.01  # relative tolerance between recorded and recomputed epsilon

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

Watch = Callable[[Sequence[Entry]], Iterable[Entry]]  # wraps the entries, e.g. in a progress bar


class BudgetExceeded(LedgerError):
    """A round would cost more than is left of the budget. Nothing was written."""

    def __init__(self, cohort: str, spent: float, after: float, cap: float) -> None:
        cost = max(after - spent, 0.0) if math.isfinite(after) else math.inf
        self.spent, self.cost, self.cap, self.left = spent, cost, cap, max(cap - spent, 0.0)
        super().__init__(
            f"privacy budget of cohort {cohort}: this round would cost epsilon {cost:.4g}, but of "
            f"{cap:.4g} there is {self.left:.4g} left ({spent:.4g} spent); nothing was spent. "
            "Use fewer steps, more noise or a lower sample rate"
        )


@dataclass(frozen=True)
class Cohort:
    """The patients or examples that a budget protects, as declared by the site; public."""

    name: str
    unit: Unit
    units: int  # declared number of examples or patients


@dataclass(frozen=True)
class Terms:
    """The terms of a cohort's budget from one entry on."""

    since: str  # time of the entry, UTC, ISO 8601
    unit: Unit
    units: int  # declared number of examples or patients
    delta: float
    cap: float | None  # largest epsilon; None: no cap, spending is only recorded


@dataclass(frozen=True)
class Reservation:
    """The reserved steps of a round, which count as spent until they are settled."""

    number: int  # number of the reserving entry
    run: str
    round: int
    spent: DpEvent


@dataclass
class LedgerRound:
    """One round of an account."""

    number: int  # number of the reserving entry
    time: str  # time of the reservation, UTC, ISO 8601
    run: str
    round: int
    noise_multiplier: float
    sample_rate: float
    reserved: int  # reserved steps
    taken: int | None = None  # settled steps; None: never settled, so spent in full
    epsilon: float | None = None  # total epsilon after the round; None: not recorded without a cap

    @property
    def spent(self) -> DpEvent:
        steps = self.reserved if self.taken is None else self.taken
        return DpEvent(self.noise_multiplier, self.sample_rate, steps)


@dataclass
class Account:
    """The terms and rounds of one cohort."""

    cohort: str
    terms: list[Terms] = field(default_factory=list)  # oldest first; the last ones apply
    rounds: list[LedgerRound] = field(default_factory=list)

    @property
    def now(self) -> Terms:
        return self.terms[-1]

    def history(self) -> list[DpEvent]:
        """List what is spent: settled steps, and all reserved steps that were never settled."""
        return [each.spent for each in self.rounds]

    def spent(self) -> float:
        """Compute the spent epsilon at the cohort's delta, by PRV where it is reliable."""
        return accounting.epsilon(self.history(), self.now.delta)

    def spent_rdp(self) -> float:
        """Compute the spent epsilon at the cohort's delta by RDP only."""
        return accounting.epsilon_rdp(self.history(), self.now.delta)

    def left(self) -> float:
        """Compute the epsilon that is left under the cap; infinite without a cap."""
        cap = self.now.cap
        return math.inf if cap is None else max(cap - self.spent(), 0.0)

    def by_round(self) -> list[LedgerRound]:
        """List all rounds with the epsilon after each, computed where it was not recorded."""
        history = self.history()
        return [
            replace(each, epsilon=accounting.epsilon(history[: i + 1], self.now.delta))
            if each.epsilon is None
            else each
            for i, each in enumerate(self.rounds)
        ]

    def settled(self, number: int, steps: int) -> Account:
        """Return a copy of the account in which a reservation is settled."""
        rounds = [replace(r, taken=steps) if r.number == number else r for r in self.rounds]
        return replace(self, rounds=rounds)


class Ledger:
    """A cohort's budget, open for training.

    Use it from one thread only. Other processes may have the same file open.

    Args:
        path: the ledger's file; several cohorts may share it.
        cohort: the cohort that the budget protects.
        delta: delta at which epsilon is computed, in (0, 1 / units).
        cap: largest epsilon; None: no cap.
        timeout_s: how long to wait for another process's transaction, in seconds.

    Raises:
        LedgerTampered: if the contents differ from what was written.
        LedgerError: if the file cannot be used (``client.ledger.hash_chain``), if delta is not in
            (0, 1 / units), or if the cohort has spent at another delta or in another unit.
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
        self._mine: set[int] = set()  # numbers of this object's reservations that are not settled
        self._chain = HashChain(path, timeout_s=timeout_s)
        try:
            if not self._agreed(self.account()):
                with self._chain.transaction():
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
        """Number and hash of the newest entry; a copy in another place detects any forgery."""
        return self._chain.head

    def account(self) -> Account:
        """Read the cohort's account from the entries seen so far; a new cohort has no terms."""
        accounts = accounts_in(self._chain.entries, self.path)
        return accounts.get(self.cohort.name, Account(self.cohort.name))

    def spent(self) -> float:
        """Compute the spent epsilon at the cohort's delta, by PRV where it is reliable."""
        return self.account().spent()

    def spent_rdp(self) -> float:
        """Compute the spent epsilon at the cohort's delta by RDP only."""
        return self.account().spent_rdp()

    def left(self) -> float:
        """Compute the epsilon that is left under the cap; infinite without a cap."""
        return self.account().left()

    def by_round(self) -> list[LedgerRound]:
        """List all rounds with the epsilon after each."""
        return self.account().by_round()

    def reserve(self, run: str, round: int, spent: DpEvent) -> Reservation:
        """Record the steps of a round as spent, before the first of them runs.

        Raises:
            BudgetExceeded: if they do not fit under the cap; nothing was written.
            LedgerError: if the ledger cannot be written, or another process changed the terms.
        """
        if spent.steps < 1:
            raise LedgerError(f"run {run}, round {round}: expected steps to reserve, got none")
        # Opacus is slow to import and to compute, so this runs before the transaction, in which
        # other processes would have to wait. The result is cached; the transaction computes again
        # only if another process wrote in between. That process may have settled fewer steps than
        # it reserved, so only the check in the transaction refuses the round.
        with contextlib.suppress(BudgetExceeded):
            self._afford(self.account(), spent)
        with self._chain.transaction():
            account = self.account()
            if not self._agreed(account):
                raise LedgerError(
                    f"{self.path}: another process changed the terms of cohort "
                    f"{self.cohort.name} to {_in_words(account.now)}; restart this process"
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
        """Record the steps that were run and release the rest of the reservation.

        Raises:
            LedgerError: if more steps were run than reserved; then the whole reservation stays
                spent, and the round's result must not leave the site. Also if the reservation is
                already settled or was made by another process.
        """
        number, reserved = reservation.number, reservation.spent.steps
        if number not in self._mine:
            raise LedgerError(
                f"{self.path}: reservation {number} is settled already, or was not made by this "
                "process; it was not changed"
            )
        if not 0 <= steps_taken <= reserved:
            raise LedgerError(
                f"run {reservation.run}, round {reservation.round}: expected 0 to {reserved} steps "
                f"taken, got {steps_taken}; the whole reservation stays spent, and the round's "
                "result must not leave the site"
            )
        _epsilon_of(self.account().settled(number, steps_taken))
        with self._chain.transaction():
            self._chain.append(
                "settle",
                cohort=self.cohort.name,
                reservation=number,
                steps=steps_taken,
                epsilon=_epsilon_of(self.account().settled(number, steps_taken)),
            )
        self._mine.discard(number)

    def verify(self, watch: Watch = iter) -> None:
        """Read all entries from the disk again and recompute every epsilon.

        Raises:
            LedgerTampered: if an entry does not match; names the first one.
        """
        _verify(self._chain, watch)

    def _agreed(self, account: Account) -> bool:
        """Whether the ledger's current terms equal the terms of this process."""
        ours = (self.cohort.unit, self.cohort.units, self.delta, self.cap)
        now = account.terms[-1] if account.terms else None
        return now is not None and ours == (now.unit, now.units, now.delta, now.cap)

    def _agree(self, account: Account) -> None:
        """Record the terms of this process, unless they would weaken the promised privacy."""
        name = self.cohort.name
        if account.rounds and account.now.unit != self.cohort.unit:
            raise LedgerError(
                f"{self.path}: cohort {name} has spent its budget by {account.now.unit}, expected "
                f"that unit, got {self.cohort.unit}. Spending in one unit cannot be converted to "
                "the other: use another cohort name to start a separate budget"
            )
        if account.rounds and account.now.delta != self.delta:
            raise LedgerError(
                f"{self.path}: cohort {name} has spent its budget at delta {account.now.delta:g}, "
                f"expected that delta, got {self.delta:g}. A larger one would weaken the promised "
                "privacy; to lower delta, run: polyclinic site lower-delta SITE_YAML"
            )
        if not self._agreed(account):
            terms = Terms("", self.cohort.unit, self.cohort.units, self.delta, self.cap)
            _write_terms(self._chain, name, terms)

    def _afford(self, account: Account, spent: DpEvent) -> float | None:
        """Compute epsilon after some more steps; return None without a cap.

        Raises:
            BudgetExceeded: if epsilon would exceed the cap.
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
    """Read the account of every cohort, also during training; empty if there is no ledger yet.

    Raises:
        LedgerTampered: if the contents differ from what was written.
        LedgerError: if the file cannot be read.
    """
    if not _is_there(path):
        return {}
    with HashChain(path, read_only=True) as chain:
        return accounts_in(chain.entries, path)


def verify_ledger(path: Path, watch: Watch = iter) -> int:
    """Check all hashes of a ledger and recompute every epsilon, also during training.

    Returns:
        The number of entries.

    Raises:
        LedgerTampered: if an entry does not match; names the first one.
        LedgerError: if the file cannot be read.
    """
    if not _is_there(path):
        return 0
    with HashChain(path, read_only=True) as chain:
        _verify(chain, watch)
        return len(chain.entries)


def lower_delta(path: Path, cohort: str, delta: float) -> None:
    """Lower the delta of a cohort from now on, for instance because the cohort has grown.

    The earlier guarantee still holds, since an epsilon at a smaller delta also holds at a larger
    one. The spent epsilon is larger at the smaller delta, so less of the budget may be left.

    Raises:
        LedgerError: if there is no such cohort, or delta is not above 0 and below the present one.
    """
    if cohort not in read_accounts(path):
        raise LedgerError(f"{path}: the ledger has no cohort {cohort}")
    with HashChain(path) as chain, chain.transaction():
        now = accounts_in(chain.entries, path)[cohort].now
        if not 0 < delta < now.delta:
            raise LedgerError(
                f"{path}: cohort {cohort}: expected a delta above 0 and below the present "
                f"{now.delta:g}, got {delta:g}"
            )
        _write_terms(chain, cohort, replace(now, delta=delta))


def accounts_in(entries: Iterable[Entry], path: Path) -> dict[str, Account]:
    """Build the account of every cohort from a ledger's entries.

    Raises:
        LedgerTampered: if an entry is not one that this program would have written.
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
                raise ValueError("it weakens the promised privacy")
            account.terms.append(Terms(content["time"], unit, units, delta, cap))
        elif entry.kind == "reserve":
            spent = DpEvent(content["noise"], content["rate"], content["steps"])
            if not account.terms or not spent.steps:
                raise ValueError("it reserves no steps, or its cohort has no terms")
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
                raise ValueError("it settles a reservation twice, or more steps than were reserved")
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
    """Recompute an entry's epsilon and compare it with the recorded value and the cap at the time.

    A tolerance allows for other versions of Opacus, which may find a slightly different bound.
    """
    said, cap = entry.content["epsilon"], account.now.cap
    if said is None and cap is None:
        return
    found = account.spent()
    if said is None and found == math.inf and entry.kind == "settle":
        return  # steps without noise, recorded while there was no cap
    if said is None or not math.isclose(found, said, rel_tol=ACCOUNTANTS_DIFFER, abs_tol=1e-4):
        raise LedgerTampered(
            f"{path}: entry {entry.number} says epsilon {said}, expected {found:.6g}, as computed "
            "from the recorded steps"
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
    """Compute the epsilon to record: None without a cap or without noise."""
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
            f"got {delta:g}; delta = 1 / {units} would permit revealing one whole {unit}"
        )
    if cap is not None and not 0 < cap < math.inf:
        raise LedgerError(f"cohort {cohort}: expected an epsilon above 0 as cap, got {cap}")


def _in_words(terms: Terms) -> str:
    cap = "no cap" if terms.cap is None else f"cap {terms.cap:g}"
    return f"{cap}, delta {terms.delta:g}, {terms.units} {terms.unit}s"


def _is_there(path: Path) -> bool:
    """Whether there is a ledger or its head file; if one is missing, opening it reports that."""
    return path.exists() or path.with_name(f"{path.name}.head").exists()

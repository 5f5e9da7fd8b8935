"""Show a run's progress: a status line that is updated, and a table of the sites every round."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.server.runs.central_releases import CentralRelease
from polyclinic.server.runs.history import NOT_DRAWN, POOLED
from polyclinic.server.runs.tables import central_text, metrics_table, spent_text

_WORDS = {
    "declined": "declined",
    "failed": "failed",
    "late": "is late",
    "refused": "sent an invalid reply",
    "left_out": "was not asked",
}


class Display:
    """A display of a run's events, updated in place on a terminal and line by line elsewhere.

    Args:
        config: settings of the run.
        console: console to write to; use standard error to keep standard output for results.
        first_words: text shown until the first event.
    """

    def __init__(
        self, config: RunConfig, console: Console, first_words: str = "starting Flower"
    ) -> None:
        self.config = config
        self.console = console
        self.first_words = first_words
        self.began: float | None = None  # time of the first event, in seconds since the epoch
        self.answered = 0
        self.asked = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TimeElapsedColumn(),
            console=console,
        )
        self.task = self.progress.add_task(first_words, total=config.rounds.count)
        self.live = Live(self.progress, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        else:
            self.console.print(self.first_words)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def follow(self, event: Mapping[str, Any]) -> None:
        """Show one event from progress.jsonl."""
        kind, now = event["event"], float(event["time"])
        self.began = now if self.began is None else self.began
        if kind == "phase":
            self.answered, self.asked = 0, event["sites"]
            self._say(event)
        elif kind == "answer":
            self.answered += 1
            self._say(event)
        elif kind == "sites":
            self._sites(event["sites"])
            self._failed(event["failed"])
        elif kind == "round":
            self._round(event)
        elif kind == "settled":
            for outcome, word in _WORDS.items():
                for site, reason in event[outcome].items():
                    if reason == NOT_DRAWN:
                        continue
                    text = f"  round {event['round']}, {event['phase']}: {site} {word}: {reason}"
                    self.console.print(text, style="yellow", soft_wrap=True)
        elif kind == "suspended":
            self.console.print(
                f"  {event['site']} is suspended until round {event['until']}", style="yellow"
            )
        elif kind == "resumed":
            self.console.print(f"resuming after round {event['round']}")
            self.progress.update(self.task, completed=event["round"])
        elif kind == "joined":
            self.console.print(f"  {event['site']} {'is back' if event['back'] else 'joins'}")

    def _say(self, event: Mapping[str, Any]) -> None:
        round_ = f"round {event['round']}, " if event["round"] else ""
        text = f"{round_}{event['phase']}: {self.answered} of {self.asked} sites answered"
        self.progress.update(self.task, description=text)

    def _sites(self, sites: Mapping[str, Any]) -> None:
        for name, site in sites.items():
            counts = ", ".join(f"{split} {n}" for split, n in site["examples"].items())
            skipped = f"; {len(site['skipped'])} rows left out" if site["skipped"] else ""
            self.console.print(f"site {name}: {counts} images on {site['device']}{skipped}")
            for sentence in site["skipped"][:5]:
                self.console.print(f"  left out: {sentence}", style="yellow", soft_wrap=True)

    def _failed(self, failed: Mapping[str, str]) -> None:
        for site, reason in failed.items():
            self.console.print(f"  {site} did not take part: {reason}", style="yellow")

    def _round(self, event: Mapping[str, Any]) -> None:
        rows = {site: Metrics.from_json(values) for site, values in event["metrics"].items()}
        self.progress.update(self.task, completed=event["round"])
        if self.console.is_terminal:
            title = f"Round {event['round']} on the validation images (best: {event['best']})"
            table = metrics_table(title, rows, self.config.data.positive)
            table.caption = "\n".join([str(table.caption), *self._spent(event)])
            self.live.update(Group(table, self.progress), refresh=True)
            return
        parts = [
            f"{site} {shown(m.dice)}/{shown(m.balanced_accuracy)}"
            for site, m in rows.items()
            if site != POOLED
        ]
        pooled = rows[POOLED]
        self.console.print(
            f"round {event['round']}/{self.config.rounds.count} "
            f"({event['time'] - (self.began or 0.0):.0f} s): Dice/balanced accuracy on val: "
            f"{', '.join(parts)}; pooled {shown(pooled.dice)}/{shown(pooled.balanced_accuracy)}"
            f"{''.join(f'; {text}' for text in self._spent(event))}",
            soft_wrap=True,
        )

    def _spent(self, event: Mapping[str, Any]) -> list[str]:
        """Format the privacy spent so far, by the sites and by central differential privacy."""
        texts = []
        if event["epsilon"]:
            texts.append(spent_text(event["epsilon"], self.config.privacy.unit))
        if event["central"]:
            texts.append(central_text(CentralRelease(**event["central"])))
        return texts


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

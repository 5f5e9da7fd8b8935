"""Commands of a site, and of whoever has images and a finished model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from polyclinic.client.ledger.budget import (
    LEDGER,
    Account,
    LedgerRound,
    lower_delta,
    read_accounts,
    verify_ledger,
)
from polyclinic.client.ledger.hash_chain import Entry
from polyclinic.client.ledger.outgoing import OUTGOING, read_outgoing
from polyclinic.client.policy.releases import own_release
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.ports import SITE_HEALTH
from polyclinic.configs.schema.site import read_site_config
from polyclinic.configs.security.release import check_signature, read_release

app = typer.Typer()
site = typer.Typer(help="Look after a site.", no_args_is_help=True)
app.add_typer(site, name="site")

JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
SiteFile = Annotated[Path, typer.Argument(metavar="SITE_YAML", help="The site's site.yaml.")]


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(help="A .safetensors, .onnx or .pt file, or a run by its folder or name."),
    ],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write masks and classes into.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also draw outlines on each image.")
    ] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds run folders.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print predictions.json.")] = False,
) -> None:
    """Outline and classify images with a finished model, on the CPU.

    Masks are as large as their images. Only open ONNX and TorchScript files that you trust: graphs
    and programs are run as they stand. Exit status: 1 if any image could not be used; the others
    are done.
    """
    path = _model_file(model, runs)
    if (out / "predictions.json").exists():
        raise ConfigError(f"--out: {out} holds predictions already; they are not written over")

    # torch takes seconds to import; a mistyped path need not wait for it
    from rich.console import Console
    from rich.progress import track

    from polyclinic.client.predict import images_in, write_predictions
    from polyclinic.client.predict import predict as predict_each
    from polyclinic.mtl_model.saved import open_model

    found = images_in(images)
    opened = open_model(path)
    out.mkdir(parents=True, exist_ok=True)
    words = Console(stderr=True, markup=False, highlight=False)
    steps = track(
        predict_each(opened, found, out, overlay),
        "predicting",
        total=len(found),
        console=words,
        disable=not words.is_terminal,
    )
    outcomes = list(steps)
    content = write_predictions(out, opened, path, outcomes)
    if as_json:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    for outcome in outcomes:
        if outcome.entry is None:
            words.print(f"error: {outcome.reason}", soft_wrap=True)
        elif not as_json:
            sys.stdout.write(f"{outcome.image}: {_brief(outcome.entry)}\n")
    failed = len(content["failed"])
    words.print(f"{len(found) - failed} images done: {out.absolute()}", soft_wrap=True)
    if failed:
        words.print(f"error: {failed} of {len(found)} images could not be used")
        raise typer.Exit(1)


def _model_file(model: str, runs: Path) -> Path:
    """A file as it is; of a run, the best round's weights.

    Raises:
        ConfigError: if there is neither.
    """
    if Path(model).is_file():
        return Path(model)
    for folder in (Path(model), runs / model):
        if (folder / "config.toml").is_file():
            best = folder / "best.safetensors"
            if not best.is_file():
                raise ConfigError(f"{folder}: has no best round's weights ({best.name})")
            return best
    raise ConfigError(
        f"{model}: expected a model's file or a run, found neither here nor in {runs}"
    )


def _brief(entry: dict[str, Any]) -> str:
    """An image's classes with their probabilities, and what share of it each mask covers."""
    classes = ", ".join(f"{name} {p:.3f}" for name, p in entry["probabilities"].items())
    masks = ", ".join(f"{name} {share:.1%}" for name, share in entry["area"].items())
    return f"{classes}; {masks} of the image"


@site.command()
def ledger(
    site_file: SiteFile,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check and compute every entry again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what training has spent of the site's privacy budget, by run and round.

    May be called while the site trains. Exit status: 1 if an entry was changed, removed or added,
    or if the file is damaged. A ledger that was replaced together with its head is not noticed.
    """
    from rich.console import Console

    config = read_site_config(site_file)
    path = config.state / LEDGER
    words = Console(stderr=True, markup=False, highlight=False)
    entries = verify_ledger(path, _counted(words)) if verify else None
    account = read_accounts(path).get(config.cohort_name)
    if account is None:
        if as_json:
            sys.stdout.write(json.dumps({"ledger": str(path), "cohort": None}) + "\n")
        words.print(f"cohort {config.cohort_name}: nothing spent, nothing in {path}")
        return
    with words.status("computing epsilon"):
        rounds = account.by_round()
        spent, spent_rdp, left = account.spent(), account.spent_rdp(), account.left()
    if as_json:
        content = {
            "ledger": str(path),
            "cohort": account.cohort,
            **{key: asdict(account.now)[key] for key in ("unit", "units", "delta", "cap")},
            "spent": _number(spent),
            "spent-rdp": _number(spent_rdp),
            "left": None if account.now.cap is None else left,
            "verified-entries": entries,
            "terms": [asdict(terms) for terms in account.terms],
            "rounds": [{**asdict(row), "epsilon": _number(row.epsilon)} for row in rounds],
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    cap = account.now.cap
    out = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)
    out.print(_rounds_table(account.cohort, rounds))
    of = "no cap" if cap is None else f"of {cap:g}, left {left:.4g}"
    out.print(f"spent    epsilon {spent:.4g} {of} (RDP alone: {spent_rdp:.4g})")
    out.print(f"at delta {account.now.delta:g}")
    out.print(
        f"for each {account.now.unit} of cohort {account.cohort} ({account.now.units} declared)"
    )
    for line in _changes(account):
        out.print(line)
    if entries is not None:
        out.print(f"verified {entries} entries, {path}", soft_wrap=True)


@site.command("lower-delta")
def lower_delta_command(site_file: SiteFile) -> None:
    """Record the smaller budget.delta of site.yaml for a cohort that has spent at a larger one.

    For a cohort that grew. What was promised still holds; at the smaller delta more counts as
    spent, so that less may be left. It cannot be raised again.
    """
    config = read_site_config(site_file)
    if config.budget is None:
        raise ConfigError(f"{site_file}: expected a section budget with the smaller delta")
    lower_delta(config.state / LEDGER, config.cohort_name, config.budget.delta)
    typer.echo(f"cohort {config.cohort_name}: delta {config.budget.delta:g} from now on")


@site.command()
def outgoing(
    site_file: SiteFile,
    last: Annotated[int, typer.Option(min=0, help="Only so many; 0 for all.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON lines, with every number that left.")
    ] = False,
) -> None:
    """Show what has left the site: every reply, its size, and what it did to the budget.

    The log is checked on the way; exit status 1 if an entry was changed,
    removed or added. A log that was replaced together with its head is not noticed.
    """
    from rich.console import Console
    from rich.table import Table

    config = read_site_config(site_file)
    found = read_outgoing(config.state)
    shown = found[-last:] if last else found
    if as_json:
        sys.stdout.writelines(json.dumps(entry) + "\n" for entry in shown)
        return
    table = Table(title=f"Left site {config.name}", title_justify="left")
    columns = ("time (UTC)", "run", "round", "message", "outcome", "MB", "sha256", "epsilon")
    for name in columns:
        table.add_column(name, justify="right" if name in ("round", "MB") else "left")
    for entry in shown:
        before, after = entry["epsilon_before"], entry["epsilon_after"]
        table.add_row(
            entry["time"][:19],
            entry["run"],
            str(entry["round"]),
            entry["message"],
            entry["outcome"],
            f"{entry['bytes'] / 1e6:.1f}",
            (entry["sha256"] or "")[:12],
            "" if after is None else f"{before:.4g} -> {after:.4g}",
        )
    out = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    out.print(table)
    out.print(f"{len(shown)} of {len(found)} replies, {config.state / OUTGOING}", soft_wrap=True)


@site.command()
def release(
    fab: Annotated[
        Path | None, typer.Argument(help="A packed app (.fab); without one, the code installed.")
    ] = None,
) -> None:
    """Print the digest of a release: as `approve` shows it, and policy.releases wants it."""
    typer.echo(own_release() if fab is None else read_release(fab)[1].digest)


HealthOption = Annotated[
    str,
    typer.Option("--health", envvar="POLYCLINIC_HEALTH", help="Address of the health service."),
]
PresetOption = Annotated[
    Path | None,
    typer.Option("--config", help="A run's preset, by whose settings every image is read."),
]


@site.command()
def keygen(
    out: Annotated[Path, typer.Option("--out", help="Folder for the private key.")] = Path(),
) -> None:
    """Make this site's own key; print the public line that the coordinator needs.

    The private key never leaves the site. Copy it beside the kit's site.yaml as site.key.
    """
    from polyclinic.client.node.keys import make_key

    path, line = make_key(out)
    typer.echo(f"private key: {path}", err=True)
    typer.echo(line)


@site.command()
def approve(
    site_file: SiteFile,
    fab: Annotated[
        Path | None, typer.Argument(metavar="RELEASE.fab", help="A packed app (flwr build).")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    withdraw: Annotated[
        str, typer.Option("--withdraw", metavar="DIGEST", help="Take an approval back.")
    ] = "",
    brief: Annotated[bool, typer.Option("--brief", help="Name changed files alone.")] = False,
) -> None:
    """Show a release and what it changes, and allow it to run here.

    Only approved releases run under `polyclinic site start`, whatever the coordinator ships.
    Without a file: list what is approved. Where site.yaml has a release-signer, RELEASE.fab.sig
    must lie beside the file. Exit status: 1 if you say no.
    """
    from polyclinic.client.policy.approvals import Approvals, changes, visible

    config = read_site_config(site_file)
    approvals = Approvals(config.state)
    if withdraw:
        decision = approvals.withdraw(withdraw)
        typer.echo(f"withdrawn: {decision.digest}")
        return
    if fab is None:
        for each in approvals.approved().values():
            typer.echo(f"{each.digest}  {each.version}  {each.time}  by {each.by}")
        return
    content, found = read_release(fab)
    if config.release_signer:
        signature = Path(f"{fab}.sig")
        if not signature.is_file():
            raise ConfigError(
                f"{signature}: expected the release's signature, since site.yaml has a "
                "release-signer; ask the coordinator for it"
            )
        check_signature(found, signature.read_text(encoding="utf-8"), config.release_signer)
        typer.echo("signed by this site's release-signer")
    version = visible(found.version)
    typer.echo(f"release {found.digest}, version {version}, {len(found.files)} files")
    before = approvals.latest()
    if before is None:
        typer.echo("no release was approved before: everything is new")
    elif before.digest == found.digest:
        typer.echo("it is approved already")
        return
    else:
        typer.echo(
            f"against {before.digest[:12]}, version {visible(before.version)}, approved before:"
        )
    for change in changes(before, found):
        typer.echo(f"{change.kind:<7}  {change.name}")
        if before is not None and not brief:
            for line in change.lines:
                typer.echo(f"    {line}")
    if not yes and not typer.confirm("Allow this release to run on this site?"):
        raise typer.Exit(1)
    decision = approvals.approve(content)
    typer.echo(f"approved: {decision.digest}, by {decision.by}")


@site.command("preflight")
def preflight_command(
    site_file: SiteFile, preset: PresetOption = None, as_json: JsonOption = False
) -> None:
    """Look at everything that keeps sites from working, and say what to do.

    Not while the site is connected: the coordinator is asked with the site's own key. Exit status:
    1 if anything fails.
    """
    from polyclinic.client.node.preflight import preflight
    from polyclinic.client.node.supernode import probe_registration
    from polyclinic.configs.diagnostics.checks import failed, report_checks
    from polyclinic.configs.presets import load_run_config

    looks = preflight(site_file, load_run_config(preset, ()).data, probe_registration)
    if failed(report_checks(looks, typer.echo, as_json)):
        raise typer.Exit(1)


@site.command()
def start(
    site_file: SiteFile, health: HealthOption = SITE_HEALTH, preset: PresetOption = None
) -> None:
    """Connect this site to the coordinator, and work for it until it is stopped.

    Looks at everything first, as preflight does. Only approved releases run. Ends with a status
    that is not 0 when the connection is lost for good; have it started again (compose, systemd).
    """
    from polyclinic.client.node.start import start_site
    from polyclinic.configs.presets import load_run_config

    start_site(site_file, load_run_config(preset, ()).data, health, typer.echo)


@site.command("health")
def health_command(site_file: SiteFile, health: HealthOption = SITE_HEALTH) -> None:
    """Whether this site runs and hears its coordinator. Exit status: 1 if not."""
    from polyclinic.client.node.start import site_health

    trouble = site_health(read_site_config(site_file), health)
    typer.echo(trouble or "well")
    if trouble:
        raise typer.Exit(1)


@site.command()
def status(site_file: SiteFile, as_json: JsonOption = False) -> None:
    """Show what this site is doing, what it allows, and what is left of its budget."""
    from polyclinic.client.node.status import site_status

    found = site_status(read_site_config(site_file))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for key, value in found.items():
        typer.echo(f"{key:<{width}}  {'-' if value is None else value}")


def _counted(words: Any) -> Any:  # noqa: ANN401
    """Entries with a progress bar, since each takes a fraction of a second to compute."""
    from rich.progress import track

    def watch(entries: Sequence[Entry]) -> Iterable[Entry]:
        hidden = not words.is_terminal
        return track(entries, "verifying", console=words, disable=hidden, transient=True)

    return watch


def _rounds_table(cohort: str, rounds: Sequence[LedgerRound]) -> Any:  # noqa: ANN401
    from rich.table import Table

    table = Table(title=f"Rounds of cohort {cohort}", title_justify="left")
    for name in ("run", "round", "reserved", "taken", "noise", "rate", "epsilon after"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rounds:
        table.add_row(
            row.run,
            str(row.round),
            str(row.reserved),
            "all, not settled" if row.taken is None else str(row.taken),
            f"{row.noise_multiplier:.4g}",
            f"{row.sample_rate:.4g}",
            f"{row.epsilon:.4g}",
        )
    return table


def _changes(account: Account) -> Iterable[str]:
    """What was changed of the terms since the first, and when."""
    for before, after in zip(account.terms, account.terms[1:], strict=False):
        then, now = asdict(before), asdict(after)
        for key in ("unit", "units", "delta", "cap"):
            if then[key] != now[key]:
                yield f"{after.since[:19]}Z {key}: {then[key]} -> {now[key]}"


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "infinity" if value is not None and math.isinf(value) else value

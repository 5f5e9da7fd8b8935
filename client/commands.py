"""Commands of a site, and ``predict`` for anyone with images and a finished model."""

from __future__ import annotations

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
from polyclinic.configs.output import (
    group,
    messages,
    new_table,
    print_json,
    print_json_line,
    print_message,
    print_result,
    print_table,
)
from polyclinic.configs.ports import SITE_HEALTH
from polyclinic.configs.schema.site import read_site_config
from polyclinic.configs.security.release import check_signature, read_release

app = group()
site = group("Manage a site.", no_args_is_help=True)
app.add_typer(site, name="site")

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that contains run folders.")]
SiteFile = Annotated[
    Path, typer.Argument(metavar="SITE_YAML", help="Path of the site's site.yaml.")
]


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(help="A .safetensors, .onnx or .pt file, or a run's name or folder."),
    ],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write masks and predictions.json to.")
    ],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also draw each mask's outline on its image.")
    ] = False,
    runs: RunsOption = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the content of predictions.json.")
    ] = False,
) -> None:
    """Segment and classify images with a finished model, on the CPU.

    Masks have the size of their images. Only open ONNX and TorchScript files that you trust, since
    they contain programs that are executed. Exit status: 1 if any image could not be processed;
    the other images are processed all the same.
    """
    path = _model_file(model, runs)
    if (out / "predictions.json").exists():
        raise ConfigError(
            f"--out: {out} already contains predictions.json, which is not overwritten; give "
            "another folder"
        )

    # torch takes seconds to import, which a mistyped path does not have to wait for
    from rich.progress import track

    from polyclinic.client.predict import images_in, write_predictions
    from polyclinic.client.predict import predict as predict_each
    from polyclinic.mtl_model.saved import open_model

    found = images_in(images)
    opened = open_model(path)
    out.mkdir(parents=True, exist_ok=True)
    words = messages()
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
        print_json(content)
    for outcome in outcomes:
        if outcome.entry is None:
            print_message(f"error: {outcome.reason}")
        elif not as_json:
            print_result(f"{outcome.image}: {_brief(outcome.entry)}")
    failed = len(content["failed"])
    print_message(f"{len(found) - failed} images done: {out.absolute()}")
    if failed:
        print_message(f"error: {failed} of {len(found)} images could not be processed")
        raise typer.Exit(1)


def _model_file(model: str, runs: Path) -> Path:
    """Find a model's file, or the best round's weights of a run.

    Raises:
        ConfigError: if there is neither.
    """
    if Path(model).is_file():
        return Path(model)
    for folder in (Path(model), runs / model):
        if (folder / "config.toml").is_file():
            best = folder / "best.safetensors"
            if not best.is_file():
                raise ConfigError(f"{folder}: the run has not saved a best round ({best.name})")
            return best
    raise ConfigError(
        f"{model}: expected a model file or a run; there is no such file, and no such run in {runs}"
    )


def _brief(entry: dict[str, Any]) -> str:
    """Describe one prediction: probability per class, and the share of the image per mask."""
    classes = ", ".join(f"{name} {p:.3f}" for name, p in entry["probabilities"].items())
    masks = ", ".join(f"{name} {share:.1%}" for name, share in entry["area"].items())
    return f"{classes}; {masks} of the image"


@site.command()
def ledger(
    site_file: SiteFile,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every entry and recompute its epsilon.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what training has spent of the site's privacy budget, per run and round.

    The site may be training meanwhile. Exit status: 1 if an entry was changed, removed or added,
    or if the file is damaged. A ledger that was replaced together with its head file is not
    detected.
    """
    config = read_site_config(site_file)
    path = config.state / LEDGER
    words = messages()
    entries = verify_ledger(path, _counted(words)) if verify else None
    account = read_accounts(path).get(config.cohort_name)
    if account is None:
        if as_json:
            print_json({"ledger": str(path), "cohort": None})
        print_message(f"cohort {config.cohort_name}: nothing has been spent; {path} has no entry")
        return
    with words.status("computing epsilon"):
        rounds = account.by_round()
        spent, spent_rdp, left = account.spent(), account.spent_rdp(), account.left()
    cap = account.now.cap
    if as_json:
        print_json(
            {
                "ledger": str(path),
                "cohort": account.cohort,
                **{key: asdict(account.now)[key] for key in ("unit", "units", "delta", "cap")},
                "spent": spent,
                "spent_rdp": spent_rdp,
                "left": None if cap is None else left,
                "verified_entries": entries,
                "terms": [asdict(terms) for terms in account.terms],
                "rounds": [asdict(row) for row in rounds],
            }
        )
        return
    for run in dict.fromkeys(row.run for row in rounds):
        print_result(f"run {run}")
        print_table(_rounds_table([row for row in rounds if row.run == run]))
    budget = "no cap" if cap is None else f"of {cap:g}, left {left:.4g}"
    print_result(f"spent: epsilon {spent:.4g} {budget}, at delta {account.now.delta:g}")
    print_result(f"(an RDP accountant would report {spent_rdp:.4g})")
    print_result(
        f"per {account.now.unit} of cohort {account.cohort} ({account.now.units} declared)"
    )
    for line in _changes(account):
        print_result(line)
    if entries is not None:
        print_result(f"verified {entries} entries of {path}")


@site.command("lower-delta")
def lower_delta_command(site_file: SiteFile) -> None:
    """Record a smaller budget.delta from site.yaml for a cohort that has already spent.

    Use it when the cohort grew. Earlier guarantees still hold; at the smaller delta, more epsilon
    counts as spent, so less may be left. Delta cannot be raised again.
    """
    config = read_site_config(site_file)
    if config.budget is None:
        raise ConfigError(f"{site_file}: expected a section budget with the smaller delta")
    lower_delta(config.state / LEDGER, config.cohort_name, config.budget.delta)
    print_result(f"cohort {config.cohort_name}: delta is {config.budget.delta:g} from now on")


@site.command()
def outgoing(
    site_file: SiteFile,
    last: Annotated[
        int, typer.Option("--last", min=0, help="Number of latest replies to show; 0 shows all.")
    ] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines with every number that left the site.")
    ] = False,
) -> None:
    """Show every reply that left the site, its size, and what it spent of the budget.

    The log is verified first. Exit status: 1 if an entry was changed, removed or added. A log
    that was replaced together with its head file is not detected.
    """
    config = read_site_config(site_file)
    found = read_outgoing(config.state)
    shown = found[-last:] if last else found
    if as_json:
        for entry in shown:
            print_json_line(entry)
        return
    names = ("time (UTC)", "message", "outcome", "sha256", "epsilon")
    for run in dict.fromkeys(entry["run"] for entry in shown):
        table = new_table(names, ("round", "MB"))
        for entry in shown:
            before, after = entry["epsilon_before"], entry["epsilon_after"]
            if entry["run"] == run:
                table.add_row(
                    entry["time"][:16],
                    entry["message"],
                    entry["outcome"],
                    (entry["sha256"] or "")[:8],
                    "" if after is None else f"{before:.4g} -> {after:.4g}",
                    str(entry["round"]),
                    f"{entry['bytes'] / 1e6:.1f}",
                )
        print_result(f"run {run}")
        print_table(table)
    print_result(f"{len(shown)} of {len(found)} replies in {config.state / OUTGOING}")


@site.command()
def release(
    fab: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RELEASE.fab]", help="A packed app (.fab); omit it for the installed code."
        ),
    ] = None,
) -> None:
    """Print the digest of a release, as `approve` shows it and policy.releases expects it."""
    print_result(own_release() if fab is None else read_release(fab)[1].digest)


HealthOption = Annotated[
    str,
    typer.Option(
        "--health", envvar="POLYCLINIC_HEALTH", help="Address and port of the health service."
    ),
]
PresetOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Preset with the data settings that images are checked with."
    ),
]


@site.command()
def keygen(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write the private key to.")
    ] = Path(),
) -> None:
    """Create this site's private key and print the public line for the coordinator.

    The private key never leaves the site. Copy it next to the kit's site.yaml as site.key.
    """
    from polyclinic.client.node.keys import make_key

    path, line = make_key(out)
    print_message(f"private key: {path}")
    print_result(line)


@site.command()
def approve(
    site_file: SiteFile,
    fab: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RELEASE.fab]",
            help="A packed app (flwr build); omit it to list approved releases.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    withdraw: Annotated[
        str,
        typer.Option("--withdraw", metavar="DIGEST", help="Withdraw the approval of a release."),
    ] = "",
    brief: Annotated[
        bool, typer.Option("--brief", help="Show only the names of changed files.")
    ] = False,
) -> None:
    """Show what a release changes, and allow it to run at this site.

    Only approved releases run under `polyclinic site start`, whatever the coordinator sends. If
    site.yaml has a release-signer, RELEASE.fab.sig must be next to the file. Exit status: 1 if you
    answer no.
    """
    from polyclinic.client.policy.approvals import Approvals, changes, visible

    config = read_site_config(site_file)
    approvals = Approvals(config.state)
    if withdraw:
        decision = approvals.withdraw(withdraw)
        print_result(f"withdrawn: {decision.digest}")
        return
    if fab is None:
        for each in approvals.approved().values():
            print_result(f"{each.digest}  {each.version}  {each.time}  by {each.by}")
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
        print_result("signed by this site's release-signer")
    version = visible(found.version)
    print_result(f"release {found.digest}, version {version}, {len(found.files)} files")
    before = approvals.latest()
    if before is None:
        print_result("no release has been approved before: all files are new")
    elif before.digest == found.digest:
        print_result("it is already approved")
        return
    else:
        print_result(
            f"compared with approved release {before.digest[:12]}, version "
            f"{visible(before.version)}:"
        )
    for change in changes(before, found):
        print_result(f"{change.kind:<7}  {change.name}")
        if before is not None and not brief:
            for line in change.lines:
                print_result(f"    {line}")
    if not yes and not typer.confirm("Allow this release to run on this site?"):
        raise typer.Exit(1)
    decision = approvals.approve(content)
    print_result(f"approved: {decision.digest}, by {decision.by}")


@site.command("preflight")
def preflight_command(
    site_file: SiteFile, preset: PresetOption = None, as_json: JsonOption = False
) -> None:
    """Check everything a site needs to run, and say how to fix what fails.

    Stop the site first: the coordinator is contacted with the site's own key. Exit status: 1 if a
    check fails.
    """
    from polyclinic.client.node.preflight import preflight
    from polyclinic.client.node.supernode import probe_registration
    from polyclinic.configs.diagnostics.checks import failed, report_checks
    from polyclinic.configs.presets import load_run_config

    looks = preflight(site_file, load_run_config(preset, ()).data, probe_registration)
    if failed(report_checks(looks, print_result, as_json)):
        raise typer.Exit(1)


@site.command()
def start(
    site_file: SiteFile, health: HealthOption = SITE_HEALTH, preset: PresetOption = None
) -> None:
    """Connect this site to the coordinator and take part in runs until it is stopped.

    Runs the checks of `preflight` first. Only approved releases run. Ends with a non-zero status
    when the connection is lost for good; let compose or systemd restart it.
    """
    from polyclinic.client.node.start import start_site
    from polyclinic.configs.presets import load_run_config

    start_site(site_file, load_run_config(preset, ()).data, health, print_result)


@site.command("health")
def health_command(site_file: SiteFile, health: HealthOption = SITE_HEALTH) -> None:
    """Check that the site is running and connected. Exit status: 1 if it is not."""
    from polyclinic.client.node.start import site_health

    trouble = site_health(read_site_config(site_file), health)
    print_result(trouble or "healthy")
    if trouble:
        raise typer.Exit(1)


@site.command()
def status(site_file: SiteFile, as_json: JsonOption = False) -> None:
    """Show what this site is doing, what its policy allows, and how much budget is left."""
    from polyclinic.client.node.status import site_status

    found = asdict(site_status(read_site_config(site_file)))
    if as_json:
        print_json(found)
        return
    width = max(map(len, found))
    for key, value in found.items():
        print_result(f"{key.replace('_', ' '):<{width}}  {'-' if value is None else value}")


def _counted(words: Any) -> Any:  # noqa: ANN401
    """Show progress over entries, each of which takes a fraction of a second to recompute."""
    from rich.progress import track

    def watch(entries: Sequence[Entry]) -> Iterable[Entry]:
        hidden = not words.is_terminal
        return track(entries, "verifying", console=words, disable=hidden, transient=True)

    return watch


def _rounds_table(rounds: Sequence[LedgerRound]) -> Any:  # noqa: ANN401
    """Lay out the rounds of one run; ``taken`` is the number of optimiser steps that were run."""
    table = new_table((), ("round", "reserved", "taken", "noise", "rate", "epsilon after"))
    for row in rounds:
        table.add_row(
            str(row.round),
            str(row.reserved),
            "all, not settled" if row.taken is None else str(row.taken),
            f"{row.noise_multiplier:.4g}",
            f"{row.sample_rate:.4g}",
            f"{row.epsilon:.4g}",
        )
    return table


def _changes(account: Account) -> Iterable[str]:
    """Describe each change of the account's terms, with its time."""
    for before, after in zip(account.terms, account.terms[1:], strict=False):
        then, now = asdict(before), asdict(after)
        for key in ("unit", "units", "delta", "cap"):
            if then[key] != now[key]:
                yield f"{after.since[:19]}Z {key}: {then[key]} -> {now[key]}"

"""The command line as a whole: help, option names, tables and JSON results."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import polyclinic
from polyclinic.configs.output import SCHEMA_VERSION, new_table, print_table

SHORT = {"-c": "--config", "-s": "--set", "-o": "--out", "-d": "--data", "-r": "--rounds"}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command of the tree with its full name."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            for word, inner in command.commands.items():
                yield from walk(f"{name} {word}".strip(), inner)

    yield from walk("", typer.main.get_command(polyclinic.command_line()))


COMMANDS = dict(commands())


def words(text: str) -> str:
    """Join rendered help into one line of words, without the boxes."""
    return " ".join(re.sub(r"[╭╮╰╯│─*]", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_a_sentence_for_every_parameter_at_80_columns(name: str) -> None:
    command = COMMANDS[name]
    environment = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    shown = CliRunner(env=environment).invoke(
        polyclinic.command_line(), [*name.split(), "--help"], catch_exceptions=False
    )
    assert max(map(len, shown.output.splitlines())) <= 80
    text = words(shown.output)
    assert command.help
    assert command.help.strip().splitlines()[0].rstrip(".").split()[0] in text
    for parameter in command.params:
        sentence = getattr(parameter, "help", None)
        assert sentence, f"{name} {parameter.name}: no help"
        # help columns are narrow, so words of other columns may stand in between
        assert all(word in text for word in sentence.replace("`", "").split()), parameter.name
        if parameter.name != "help":
            assert sentence.endswith("."), f"{name} {parameter.name}: {sentence}"


def test_option_names_have_one_meaning() -> None:
    """The same long name has the same short flag and the same kind of value everywhere."""
    found = defaultdict(set)
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--"):
                    short = tuple(o for o in parameter.opts if not o.startswith("--"))
                    found[option].add(short)
                    assert all(SHORT[o] == option for o in short), f"{name} {option}"
    assert not {option: shorts for option, shorts in found.items() if len(shorts) > 1}


def test_short_flags_exist() -> None:
    flags = {o for c in COMMANDS.values() for p in c.params for o in p.opts}
    assert set(SHORT) <= flags


def test_table_wider_than_the_console_is_printed_whole() -> None:
    name = "a-name-of-more-than-eighty-characters-" + "x" * 80
    table = new_table(("site",), ("Dice", "IoU"))
    table.add_row(name, "0.333", "0.250")
    out = io.StringIO()
    print_table(table, Console(file=out, width=80))
    assert name in out.getvalue()
    assert "0.333" in out.getvalue()
    assert "…" not in out.getvalue()


def test_tables_of_a_finished_run_fit_80_columns(finished_run: Path, cli: Callable) -> None:
    runs = finished_run.parent
    for arguments in (("runs", "--runs", runs), ("runs", "show", "a-run", "--runs", runs)):
        status, out, _ = cli(*arguments)
        assert status == 0
        lines = [line for line in out.splitlines() if not line.startswith("run folder")]
        assert max(map(len, lines)) <= 80, out
        assert "…" not in out


def keys_of(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


# Keys that are names chosen by users: runs and sites.
CHOSEN = {"a-run", "site-1", "site-2"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "--json"),
        ("runs", "show", "a-run", "--json"),
        ("model", "info", "--json"),
    ],
    ids=" ".join,
)
def test_json_results_have_a_schema_version_and_snake_case_keys(
    arguments: tuple[str, ...], finished_run: Path, cli: Callable
) -> None:
    where = () if arguments[0] == "model" else ("--runs", finished_run.parent)
    status, out, _ = cli(*arguments, *where)
    content = json.loads(out)
    assert status == 0
    assert next(iter(content)) == "schema_version"
    assert content["schema_version"] == SCHEMA_VERSION
    wrong = {k for k in keys_of(content) if not re.fullmatch(r"[a-z][a-z0-9_]*", k)} - CHOSEN
    assert not wrong


def test_runs_list_names_what_distinguishes_runs(finished_run: Path, cli: Callable) -> None:
    status, out, _ = cli("runs", "--runs", finished_run.parent, "--json")
    (run,) = json.loads(out)["runs"]
    assert status == 0
    assert (run["run"], run["status"], run["strategy"]) == ("a-run", "completed", "fedavg")
    assert (run["seed"], run["data"], run["select_by"]) == (0, "phantoms", "score")
    assert 0 <= run["best_value"] <= 1


def test_stopped_run_is_listed_as_stopped(
    finished_run: Path, tmp_path: Path, cli: Callable
) -> None:
    stopped = tmp_path / "runs" / "stopped"
    stopped.mkdir(parents=True)
    (stopped / "config.toml").write_text((finished_run / "config.toml").read_text())
    for status in ("stopped", "failed"):  # "failed": written by earlier versions
        outcome = {"status": status, "reason": "stopped by the user"}
        (stopped / "outcome.json").write_text(json.dumps(outcome))
        out = cli("runs", "--runs", tmp_path / "runs", "--json")[1]
        assert json.loads(out)["runs"][0]["status"] == "stopped"


def test_damaged_run_folder_does_not_hide_other_runs(
    finished_run: Path, tmp_path: Path, cli: Callable
) -> None:
    for name, text in (("good", (finished_run / "config.toml").read_text()), ("bad", "[x]\ny = 1")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").write_text(text)
    status, out, err = cli("runs", "--runs", tmp_path / "runs", "--json")
    assert status == 0
    assert [run["run"] for run in json.loads(out)["runs"]] == ["good"]
    assert f"not listed: {tmp_path / 'runs' / 'bad' / 'config.toml'}: x.y: unknown key" in err

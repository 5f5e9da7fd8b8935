"""Commands of a federation on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from configs.run import ConfigError, RunConfig, load_run_config
from server.commands import ConfigOption, SetOption

app = typer.Typer()
bench = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@app.command()
def simulate(
    config: ConfigOption = None,
    settings: SetOption = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the sites' images (data.root); without it, phantoms."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds (rounds.count).")] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Sites of the data by name, with commas; or how many phantoms."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder that holds run folders (run.output-dir).")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sites that compute at once; by default 1 on a GPU, else by cores."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON.")] = False,
) -> None:
    """Train and evaluate a federation on this machine, through Flower's simulation.

    Exit status: 0 done, 1 failed, 2 settings or data do not fit (nothing was started), 130 stopped.
    """
    overrides = list(settings or ())
    if data is not None:
        overrides.append(f"data.root={json.dumps(str(data.expanduser().absolute()))}")
    if rounds is not None:
        overrides.append(f"rounds.count={rounds}")
    if out is not None:
        overrides.append(f"run.output-dir={json.dumps(str(out))}")
    run_config = _with_sites(load_run_config(config, overrides), sites)

    # torch, flwr and Ray take seconds to import; a mistyped key need not wait for them
    from simulation.run import run_simulation

    raise typer.Exit(run_simulation(run_config, parallel, as_json))


def _with_sites(config: RunConfig, sites: str | None) -> RunConfig:
    if sites is None:
        return config
    flat = config.to_flat()
    if config.data.root:
        flat["data.sites"] = sites
    elif sites.isdigit():
        flat["phantom.sites"] = int(sites)
    else:
        raise ConfigError(f"--sites: expected a number of phantom hospitals, got {sites!r}")
    return RunConfig.from_flat(flat)


@app.command()
def phantom(
    out: Annotated[Path, typer.Option(help="Folder to write a folder for each site into.")],
    sites: Annotated[int, typer.Option(min=1, help="Hospitals.")] = 3,
    examples: Annotated[int, typer.Option(min=10, help="Images a hospital, on average.")] = 120,
    size: Annotated[int, typer.Option(min=32, help="Long side of the images, pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    normal_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of images without a lesion.")
    ] = 0.0,
) -> None:
    """Write phantom hospitals: synthetic ultrasound as ordinary site folders."""
    from simulation.phantom import write_phantoms

    folders = [out.absolute() / f"site-{number}" for number in range(1, sites + 1)]
    for folder in folders:
        if folder.exists():
            raise ConfigError(f"--out: {folder} is there already; it is not written over")
    write_phantoms(
        out, sites=sites, examples=examples, seed=seed, size=size, normal_fraction=normal_fraction
    )
    for folder in folders:
        images = len(list((folder / "images").iterdir()))
        typer.echo(f"{folder}: {images} images")


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="Folder of a finished simulation.")],
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON.")] = False,
) -> None:
    """Train each site alone, and all pooled, as many steps as a run's sites did; compare.

    Answers whether federation was worth it: the same network, images, splits and steps a site.
    """
    from simulation.compare import compare_run

    raise typer.Exit(compare_run(run, as_json))


@bench.command("model")
def bench_model(
    size: Annotated[int, typer.Option(min=64, help="Side of the images, pixels.")] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="Times that each network is timed.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[
        str | None,
        typer.Option(
            help="Contestants by name, with commas; ratios are to plain, or to the first."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Time the network beside itself written plainly and beside others, in turns.

    Milliseconds an image and peak memory, of inference and of a training step. The others need
    `pip install 'polyclinic[bench]'`.
    """
    from simulation.bench import run_bench

    run_bench(size, batch, threads, turns, device, only, as_json)

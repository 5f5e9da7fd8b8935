"""Commands of a federation on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.presets import load_run_config
from polyclinic.configs.run import RunConfig
from polyclinic.server.commands import ConfigOption, SetOption

app = typer.Typer()
bench = typer.Typer(help="Measure speed, memory and privacy.", no_args_is_help=True)
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
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with a run, by name or folder; its settings need not be given."),
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
    if resume is not None:
        overrides.append(f"run.resume={json.dumps(resume)}")
    run_config = _with_sites(load_run_config(config, overrides), sites)
    if run_config.run.resume:
        from polyclinic.server.runs.resume import resumed_config

        run_config = resumed_config(run_config)

    # torch, flwr and Ray take seconds to import; a mistyped key need not wait for them
    from polyclinic.simulation.local.run import run_simulation

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
    from polyclinic.simulation.phantom.writer import write_phantoms

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
    from polyclinic.simulation.experiments.compare import compare_run

    raise typer.Exit(compare_run(run, as_json))


@app.command()
def tradeoff(
    config: ConfigOption = None,
    settings: SetOption = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the sites' images (data.root); without it, phantoms."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder that holds run folders (run.output-dir).")
    ] = None,
    name: Annotated[str, typer.Option(help="Begins the names of its runs.")] = "tradeoff",
    epsilons: Annotated[str, typer.Option(help="With commas; inf is without privacy.")] = (
        "inf,10,3,1"
    ),
    units: Annotated[str, typer.Option(help="example, patient, or both.")] = "example,patient",
    seeds: Annotated[str, typer.Option(help="Of initial weights and order.")] = "0,1",
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Sites that compute at once, as in simulate.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON.")] = False,
) -> None:
    """Run the same federation at several epsilons, by image and by patient; compare the quality.

    Runs that are there already are not run again, so it may be stopped and called again.
    """
    overrides = [*(settings or ()), f"run.name={json.dumps(name)}"]
    if data is not None:
        overrides.append(f"data.root={json.dumps(str(data.expanduser().absolute()))}")
    if out is not None:
        overrides.append(f"run.output-dir={json.dumps(str(out))}")
    run_config = load_run_config(config, overrides)

    from polyclinic.simulation.experiments.tradeoff import run_tradeoff

    raise typer.Exit(run_tradeoff(run_config, epsilons, units, seeds, parallel, as_json))


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
    from polyclinic.simulation.benchmarks.bench import run_bench

    run_bench(size, batch, threads, turns, device, only, as_json)


@bench.command("privacy")
def bench_privacy(
    size: Annotated[int, typer.Option(min=32, help="Side of the images, pixels.")] = 224,
    preset: Annotated[str, typer.Option(help="model.preset: full or light.")] = "full",
    images: Annotated[
        str, typer.Option(help="Images a pass (privacy.physical-batch-size), with commas.")
    ] = "2,8",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    turns: Annotated[int, typer.Option(min=1, help="Times that each way is timed.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    only: Annotated[
        str | None, typer.Option(help="Some of plain, ghost, hooks, functorch, with commas.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Time a step with differential privacy beside a plain one, in turns, and peak memory."""
    from polyclinic.simulation.benchmarks.privacy import run_privacy_bench

    run_privacy_bench(size, preset, images, threads, turns, device, precision, only, as_json)


@bench.command("memory")
def bench_memory(
    sites: Annotated[
        str, typer.Option(help="Numbers of sites whose replies are folded, with commas.")
    ] = "3,30,300",
    gathered: Annotated[
        str, typer.Option(help="Numbers of sites whose replies are gathered, as fedmedian needs.")
    ] = "3,10",
    preset: Annotated[str, typer.Option(help="model.preset: full or light.")] = "full",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure the server's peak memory while it takes in a round's replies."""
    from polyclinic.simulation.benchmarks.memory import run_memory_bench

    run_memory_bench(sites, gathered, preset, as_json)


@bench.command("audit")
def bench_audit(
    only: Annotated[str | None, typer.Option(help="Rounds by name, with commas.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of coins and noise; by default the system's, as at a site."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Attack private rounds: a lower bound of epsilon beside the one that is accounted for.

    Exit status: 0 all bounds hold, 1 a lower bound is above its epsilon.
    """
    from polyclinic.simulation.attacks.audit import run_audit

    raise typer.Exit(run_audit(only, seed, as_json))


@bench.command("inversion")
def bench_inversion(
    out: Annotated[Path | None, typer.Option(help="PNG to draw the pictures into.")] = None,
    noise: Annotated[
        str, typer.Option(help="Noise multipliers of DP-SGD, with commas.")
    ] = "0.01,0.1,1",
    seed: Annotated[int, typer.Option(min=0, help="Of the phantom, noise and search.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Attack one step on one image: the picture found from it, without privacy and with.

    Two minutes on one core.
    """
    from polyclinic.simulation.attacks.inversion import run_inversion

    run_inversion(out, noise, seed, as_json)

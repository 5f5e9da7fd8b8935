"""Commands of a federation on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import group, print_result
from polyclinic.configs.presets import load_run_config
from polyclinic.configs.run import RunConfig
from polyclinic.server.commands import (
    ConfigOption,
    JsonOption,
    RunArgument,
    RunsOption,
    SetOption,
    folder_of,
)

app = group()
bench = group("Measure speed, memory and privacy.", no_args_is_help=True)
app.add_typer(bench, name="bench")

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", "-d", help="Folder of the sites' images (data.root); without it, phantoms."
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder to write run folders to (run.output-dir)."),
]
ParallelOption = Annotated[
    int | None,
    typer.Option(
        "--parallel",
        min=1,
        help="Sites that compute at the same time; default: 1 on a GPU, else by CPU cores.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random choices.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
TurnsOption = Annotated[
    int, typer.Option("--turns", min=1, help="Number of times that each one is timed.")
]
ModelPresetOption = Annotated[
    str, typer.Option("--model-preset", help="model.preset: full or light.")
]


@app.command()
def simulate(
    config: ConfigOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", "-r", help="Number of rounds (rounds.count).")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites", help="Names of sites in the data, comma-separated; or a number of phantoms."
        ),
    ] = None,
    out: OutOption = None,
    parallel: ParallelOption = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Resume a run, by name or folder, with its own settings."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train and evaluate a federation on this machine with Flower's simulation runtime.

    Exit status: 0 completed; 1 failed; 2 invalid settings or data, nothing was started; 130
    stopped.
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

    # torch, flwr and Ray take seconds to import, which a mistyped key does not have to wait for
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
        raise ConfigError(f"--sites: expected a number of phantom sites, got {sites!r}")
    return RunConfig.from_flat(flat)


@app.command()
def phantom(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write one folder per site to.")
    ],
    sites: Annotated[int, typer.Option("--sites", min=1, help="Number of phantom sites.")] = 3,
    examples: Annotated[
        int, typer.Option("--examples", min=10, help="Images per site, on average.")
    ] = 120,
    size: Annotated[
        int, typer.Option("--size", min=32, help="Longer side of the images in pixels.")
    ] = 128,
    seed: SeedOption = 0,
    normal_fraction: Annotated[
        float,
        typer.Option(
            "--normal-fraction", min=0.0, max=0.99, help="Share of images without a lesion."
        ),
    ] = 0.0,
) -> None:
    """Write phantom sites: synthetic ultrasound images in ordinary site folders."""
    from polyclinic.simulation.phantom.writer import write_phantoms

    folders = [out.absolute() / f"site-{number}" for number in range(1, sites + 1)]
    for folder in folders:
        if folder.exists():
            raise ConfigError(f"--out: {folder} already exists and is not overwritten")
    write_phantoms(
        out, sites=sites, examples=examples, seed=seed, size=size, normal_fraction=normal_fraction
    )
    for folder in folders:
        images = len(list((folder / "images").iterdir()))
        print_result(f"{folder}: {images} images")


@app.command()
def compare(run: RunArgument, runs: RunsOption = Path("runs"), as_json: JsonOption = False) -> None:
    """Compare a finished simulation with local and pooled training.

    Trains each site by itself, and all sites' images together, with the run's network, images,
    splits and number of steps, and tests every model at every site.
    """
    from polyclinic.simulation.experiments.compare import compare_run

    raise typer.Exit(compare_run(folder_of(run, runs), as_json))


@app.command()
def tradeoff(
    config: ConfigOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    out: OutOption = None,
    name: Annotated[str, typer.Option("--name", help="Prefix of the runs' names.")] = "tradeoff",
    epsilons: Annotated[
        str, typer.Option("--epsilons", help="Comma-separated; inf is without privacy.")
    ] = "inf,10,3,1",
    units: Annotated[
        str, typer.Option("--units", help="example, patient, or both, comma-separated.")
    ] = "example,patient",
    seeds: Annotated[
        str, typer.Option("--seeds", help="Seeds of weights and order, comma-separated.")
    ] = "0,1",
    parallel: ParallelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one federation at several epsilons, per image and per patient, and compare quality.

    Runs that are already finished are not repeated, so the command can be stopped and restarted.
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
    size: Annotated[int, typer.Option("--size", min=64, help="Image side in pixels.")] = 224,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images per training step.")
    ] = 2,
    threads: ThreadsOption = 2,
    turns: TurnsOption = 7,
    device: DeviceOption = "cpu",
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Networks by name, comma-separated; ratios are to plain, or to the first.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the network against a reference implementation and other networks, interleaved.

    Reports milliseconds per image and peak memory, of inference and of a training step. The other
    networks need the optional dependencies `bench`.
    """
    from polyclinic.simulation.benchmarks.bench import run_bench

    run_bench(size, batch_size, threads, turns, device, only, as_json)


@bench.command("privacy")
def bench_privacy(
    size: Annotated[int, typer.Option("--size", min=32, help="Image side in pixels.")] = 224,
    model_preset: ModelPresetOption = "full",
    images: Annotated[
        str,
        typer.Option(
            "--physical-batch-sizes",
            help="Numbers of images per pass, comma-separated.",
        ),
    ] = "2,8",
    threads: ThreadsOption = 2,
    turns: TurnsOption = 5,
    device: DeviceOption = "cpu",
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16.")] = "fp32",
    only: Annotated[
        str | None,
        typer.Option(
            "--only", help="Methods: plain, ghost, hooks, functorch, comma-separated; default: all."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a step with differential privacy against a plain one, interleaved, and peak memory."""
    from polyclinic.simulation.benchmarks.privacy import run_privacy_bench

    run_privacy_bench(size, model_preset, images, threads, turns, device, precision, only, as_json)


@bench.command("memory")
def bench_memory(
    folded: Annotated[
        str,
        typer.Option("--folded", help="Numbers of sites, if replies are averaged as they arrive."),
    ] = "3,30,300",
    gathered: Annotated[
        str,
        typer.Option(
            "--gathered", help="Numbers of sites, if all replies are kept, as fedmedian needs."
        ),
    ] = "3,10",
    model_preset: ModelPresetOption = "full",
    as_json: JsonOption = False,
) -> None:
    """Measure the server's peak memory while it receives the replies of one round."""
    from polyclinic.simulation.benchmarks.memory import run_memory_bench

    run_memory_bench(folded, gathered, model_preset, as_json)


@bench.command("audit")
def bench_audit(
    only: Annotated[
        str | None,
        typer.Option("--only", help="Rounds by name, comma-separated; default: all."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, help="Seed of coins and noise; default: system entropy, as at a site."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Attack private rounds: compare a lower bound of epsilon with the accounted epsilon.

    Exit status: 0 if every bound holds, 1 if a lower bound exceeds its epsilon.
    """
    from polyclinic.simulation.attacks.audit import run_audit

    raise typer.Exit(run_audit(only, seed, as_json))


@bench.command("inversion")
def bench_inversion(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG file to write the pictures to.")
    ] = None,
    noise: Annotated[
        str, typer.Option("--noise", help="Noise multipliers of DP-SGD, comma-separated.")
    ] = "0.01,0.1,1",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Reconstruct an image from one training step on it, without privacy and with.

    Takes about two minutes on one core.
    """
    from polyclinic.simulation.attacks.inversion import run_inversion

    run_inversion(out, noise, seed, as_json)

"""The settings that an interrupted run goes on with."""

from __future__ import annotations

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.run import RunConfig, resumed
from polyclinic.server.runs.folder import RunFolder


def resumed_config(given: RunConfig) -> RunConfig:
    """The settings of the run that ``run.resume`` names, with the changes that ``given`` makes.

    Returns:
        Settings whose ``run.resume`` is that run's folder, absolute.

    Raises:
        ConfigError: if there is no such run, one of the changes would make it another run, or
            nothing is left to do.
    """
    folder = RunFolder.of(given.run.resume, given.run.output_dir)
    config = resumed(read_run_config(folder.config), given)
    place = {"run.name": folder.name, "run.output-dir": str(folder.path.parent)}
    config = RunConfig.from_flat({**config.to_flat(), **place, "run.resume": str(folder.path)})
    done = (folder.checkpoints() or [0])[-1]
    if folder.read_outcome().get("status") == "completed" and done >= config.rounds.count:
        raise ConfigError(
            f"run.resume: {folder.path} completed its {done} rounds; give a larger rounds.count to "
            "go on"
        )
    return config

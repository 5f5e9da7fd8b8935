"""Determine the settings of a resumed run."""

from __future__ import annotations

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.run import RunConfig, resumed
from polyclinic.server.runs.folder import RunFolder


def resumed_config(given: RunConfig) -> RunConfig:
    """Read the settings of the run that ``run.resume`` names, and apply the changes in ``given``.

    Returns:
        The settings, with ``run.resume`` set to the absolute path of the run's folder.

    Raises:
        ConfigError: if there is no such run, if a setting is changed that must stay the same, or
            if all rounds are already completed.
    """
    folder = RunFolder.of(given.run.resume, given.run.output_dir)
    config = resumed(read_run_config(folder.config), given)
    place = {"run.name": folder.name, "run.output-dir": str(folder.path.parent)}
    config = RunConfig.from_flat({**config.to_flat(), **place, "run.resume": str(folder.path)})
    done = (folder.checkpoints() or [0])[-1]
    if folder.read_outcome().get("status") == "completed" and done >= config.rounds.count:
        raise ConfigError(
            f"run.resume: {folder.path} has already completed its {done} rounds; set a larger "
            "rounds.count to continue it"
        )
    return config

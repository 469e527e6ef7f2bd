"""``cli.py``: the old flags as Sixfold's commands. Run: ``python -m sixfold.compat.hamha.cli``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sixfold.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The old flags."""
    flags = argparse.ArgumentParser(description="HAMHA + LMA, on Sixfold")
    flags.add_argument("--mode", choices=("demo", "train"), default="demo")
    flags.add_argument("--steps", type=int, help="optimizer steps")
    flags.add_argument(
        "--config", type=Path, help="a SystemConfig as JSON, or a run's TOML or JSON"
    )
    flags.add_argument("--checkpoint", type=Path, help="a run's folder to go on with")
    flags.add_argument(
        "--save-telemetry", action="store_true", help="print where telemetry is saved"
    )
    return flags


def words(given: argparse.Namespace) -> list[str]:
    """The same request as words of ``sixfold``.

    Raises ConfigError for a pickled checkpoint (unpickling runs whatever code the file holds) and
    for a demo with a configuration of its own.
    """
    config = [] if given.config is None else [str(given.config)]
    steps = [] if given.steps is None else [f"train.steps={given.steps}"]
    if given.checkpoint is not None:
        if given.checkpoint.suffix in (".pt", ".pth", ".bin"):
            raise ConfigError(
                f"{given.checkpoint} would have to be unpickled, which runs the code in it; "
                "give the folder of a Sixfold run"
            )
        return ["train", "--resume", str(given.checkpoint), *config, *steps]
    if given.mode == "demo":
        if config:
            raise ConfigError("the demo has its own configuration; use --config with --mode train")
        return ["demo", *steps]
    return ["train", "demo", *config, *steps]


def main(arguments: list[str] | None = None) -> None:
    """Translate and run."""
    from sixfold import cli

    given, runs = parser().parse_args(arguments), Path("runs")
    before = set(runs.glob("*"))
    code = cli.guarded(lambda: cli.app(words(given), exit_on_error=True))
    if given.save_telemetry and code == 0:
        made = sorted(set(runs.glob("*")) - before)
        folders = made if given.checkpoint is None else [cli.find(str(given.checkpoint), runs)]
        for file in (folder / "telemetry.jsonl" for folder in folders):
            if file.exists():
                cli.console.print(f"telemetry  {file}")
    sys.exit(code)


if __name__ == "__main__":
    main()

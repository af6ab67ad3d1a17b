"""Sweeps, ``mimicbrush train -m``. If a sweep is started again, it skips complete jobs and runs the others.

Hydra itself gives every job a number, runs all of them again, and reports no more than the first that failed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from mimicbrush import assembly
from mimicbrush.assembly.command_line import resolve_config
from mimicbrush.assembly.sweep_table import FAILED_FILE, JOB_FILE, print_table
from mimicbrush.errors import LockedError, MimicBrushError, cli_main
from mimicbrush.io.atomic import write_aside, write_json
from mimicbrush.io.outputs import check_output_folder

#: Hydra writes it when a sweep begins.
_SWEEP_FILE = "multirun.yaml"


class SweepCallback(Callback):
    """Callback of Hydra that names the folder of each job by its options, and prints a table at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name the folders, unless ``hydra.sweep.subdir`` is given on the command line.

        Raises:
            SystemExit: nothing can be written to ``hydra.sweep.dir``, which is printed. Hydra hears no other exception.
        """
        if _is_first_process():
            cli_main(lambda: check_output_folder(Path(config.hydra.sweep.dir), "hydra.sweep.dir="))
        overrides = config.hydra.overrides.hydra
        if any(override.lstrip("+").startswith("hydra.sweep.subdir=") for override in overrides):
            return
        params = config.hydra.sweeper.get("params") or {}
        swept = [*(f"{key}={params[key]}" for key in params), *config.hydra.overrides.task]
        # Each job is composed again, from these overrides and its own.
        with read_write(config), open_dict(config):
            overrides.append(f"hydra.sweep.subdir='{subdir_for(swept)}'")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table, and list the jobs that failed; if any did, the exit status is 1."""
        if not _is_first_process():
            return
        folder = Path(config.hydra.sweep.dir)
        runs = print_table(folder)
        began_ns = (folder / _SWEEP_FILE).stat().st_mtime_ns
        failed = [run for run in runs if run.state == "failed" and run.failed_ns >= began_ns]
        if failed:
            names = "".join(f"\n  {run.folder}: {run.error}" for run in failed)
            print(
                f"error: {len(failed)} of the jobs failed. Run the same command again to retry them:{names}",
                file=sys.stderr,
            )
            raise SystemExit(1)


def subdir_for(overrides: Sequence[str]) -> str:
    """Name the folder of a job within its sweep, as text with interpolations that each job fills in.

    Name and seed of the run, and each other option that is swept: two jobs must never share a folder. An experiment
    or an ablation sets the name itself, so it is not repeated unless another name takes its place.

    Args:
        overrides: of the command line, such as "seed=0,1".
    """
    parsed = [each for each in OverridesParser.create().parse_overrides(list(overrides)) if not each.is_delete()]
    given = [each.key_or_group for each in parsed]
    named_by = next((key for key in ("run_name", "ablation", "experiment") if key in given), "run_name")
    swept = {each.key_or_group for each in parsed if each.is_sweep_override()} - {"run_name", "seed", named_by}
    values = {
        key: f"${{{key}}}" if "." in key or key == "run_dir" else f"${{hydra:runtime.choices.{key}}}"
        for key in sorted(swept)
    }
    # Neither "=" nor ",": users also give the folder of a job on command lines of Hydra.
    return "${run_name}-seed${seed}" + "".join(f"-{key.replace('/', '.')}_{value}" for key, value in values.items())


def train_job(config: DictConfig) -> None:
    """Train one job of a sweep. A failure is written into its folder, and the other jobs run.

    Raises:
        SystemExit: a signal ended the training, or one of several processes that train together failed, without which
            the others cannot go on. This ends the whole sweep; the same command goes on with it.
    """
    resolve_config(config)
    job = HydraConfig.get()
    # Hydra stores the path without escapes: a "${" in it is text, and no interpolation.
    run_dir = Path(OmegaConf.to_container(job.runtime, resolve=False)["output_dir"])  # type: ignore[call-overload, index]
    if not any(override.lstrip("+").startswith("train.resume=") for override in job.overrides.task):
        config.train.resume = "latest"
    _write_job(config, run_dir)
    (run_dir / FAILED_FILE).unlink(missing_ok=True)
    _connect_tasks()
    status = 0
    try:
        status = assembly.train(config, run_dir, stay_connected=True)
    except LockedError as error:  # the folder, and what is written there, belong to the other process
        print(f"left out: {run_dir.name}: {error}", file=sys.stderr)
    except MimicBrushError as error:
        print(f"error: {run_dir.name}: {error}", file=sys.stderr)
        status = _write_failure(run_dir, str(error))
    except Exception as error:  # noqa: BLE001 - any error ends this job alone; it is printed and written down
        traceback.print_exc()
        status = _write_failure(run_dir, f"{type(error).__name__}: {error}")
    finally:
        _reset_process()
    if status:
        raise SystemExit(status)


def _write_job(config: DictConfig, run_dir: Path) -> None:
    """Write the file by which the table finds the job, unless it already has this text."""
    about = {"run_name": config.run_name, "seed": config.seed, "max_steps": config.train.max_steps}
    text, path = json.dumps(about), run_dir / JOB_FILE
    if not path.is_file() or path.read_text() != text:
        write_aside(path, lambda aside: aside.write_text(text))


def _write_failure(run_dir: Path, error: str) -> int:
    """Write why the job failed; return the exit status, 0 if the sweep can continue."""
    write_json(run_dir / FAILED_FILE, {"error": error})
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0
    print(
        f"error: the sweep ends with {run_dir.name}, because its other processes may wait for this one. Leave out this "
        "job to continue with the others",
        file=sys.stderr,
    )
    return 1


def _connect_tasks() -> None:
    """Connect the tasks of a submitit job, as torchrun would (``hydra.launcher.tasks_per_node=8``)."""
    if "SUBMITIT_EXECUTOR" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _reset_process() -> None:
    """Reset the process for the next job, which may use another precision or need all of the memory."""
    accelerate_state, wandb, torch = (sys.modules.get(name) for name in ("accelerate.state", "wandb", "torch"))
    if accelerate_state is not None:
        connected = torch is not None and torch.distributed.is_initialized()
        accelerate_state.AcceleratorState._reset_state(reset_partial_state=not connected)
    if wandb is not None and wandb.run is not None:  # of a job that failed: the next one would continue its run
        wandb.finish(exit_code=1)
    gc.collect()
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

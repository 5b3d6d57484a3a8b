"""Make a working copy of the project in another folder, and run Snakemake's command line in it, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from snakemake.cli import args_to_api, parse_args
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("Snakefile", "workflow", "profiles", "slurm", "envs", "resources/pretrained")


def make_checkout(folder: Path) -> Path:
    """Create `folder` with links to the code and a copy of the configurations; return it."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "resources").mkdir()
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def set_key(tree: Path, name: str, key: str, value) -> None:
    """Write `value` at a key such as `optimizer/params/beta2` of `configs/{name}`."""
    path = tree / "configs" / name
    config = section = OmegaConf.load(path)
    *sections, leaf = key.split("/")
    for part in sections:
        section = section[part]
    section[leaf] = value
    OmegaConf.save(config, path)


@dataclass
class Plan:
    """What one Snakemake invocation planned and printed."""

    ok: bool = False
    text: str = ""
    jobs: list[dict] = field(default_factory=list)  # rule_name, wildcards, input, output, shellcmd, reason …

    @property
    def rules(self) -> set[str]:
        """Return the names of the planned rules without the target rules."""
        return {job["rule_name"] for job in self.jobs} - {"all", "data", "stages"}

    def of(self, rule: str) -> list[dict]:
        """Return the jobs of one rule."""
        return [job for job in self.jobs if job["rule_name"] == rule]


def snakemake(tree: Path, *arguments: str) -> Plan:
    """Run `snakemake` in `tree`; collect its planned jobs from the records of its logger."""
    plan, said = Plan(), io.StringIO()

    def watch(record) -> bool:
        if getattr(record, "event", None) is LogEvent.JOB_INFO:
            plan.jobs.append(dict(vars(record)))
        return True

    logger.addFilter(watch)
    before = dict(os.environ), list(sys.path)
    with contextlib.chdir(tree), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            parser, options = parse_args(list(arguments))
            plan.ok = args_to_api(options, parser)
        finally:  # the Snakefile changes the environment and sys.path
            logger.removeFilter(watch)
            os.environ.clear()
            os.environ.update(before[0])
            sys.path[:] = before[1]
    plan.text = said.getvalue()
    return plan


def make_results(tree: Path, *arguments: str) -> None:
    """Write placeholders for all results of a run, and record them as results of the present configuration."""
    profile = ("--profile", "profiles/local")
    planned = snakemake(tree, *profile, "--dry-run", *arguments)
    assert planned.ok, planned.text
    for job in planned.jobs:
        for name in job["output"]:
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"stand-in for {name}\n")
    touched = snakemake(tree, *profile, "--touch", "--forceall", *arguments)
    assert touched.ok, touched.text

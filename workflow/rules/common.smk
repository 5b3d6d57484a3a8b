# Connects the rules to the configuration: every path and parameter that a rule needs comes from `plan`. No rules here.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

from sdtrain.config import load as configuration
from sdtrain.errors import did_you_mean
from sdtrain.orchestration import invocations, slurm
from sdtrain.orchestration.plan import Plan

if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method:
    # `make env` installs the library into .venv; the environments that Snakemake makes from envs/ do not contain it.
    # A prefix replaces Snakemake's strict mode; without `pipefail`, `| tee` would hide a failure.
    shell.prefix(f"export PYTHONPATH='{workflow.basedir}/workflow'; set -euo pipefail; ")

RUN = str(config.get("run", "demo"))
OVERRIDES = config.get("set", [])
OVERRIDES = OVERRIDES.split() if isinstance(OVERRIDES, str) else list(OVERRIDES)

if workflow.is_main_process:
    os.environ.pop(configuration.CONFIGS, None)
    ALONE = invocations.register()

plan = Plan(RUN, OVERRIDES, error=WorkflowError)
plan.check()
invocations.pass_on_api_key(plan.load_run(RUN).wandb.api_key)
if workflow.is_main_process:  # jobs read this copy, so that later edits do not affect them
    os.environ[configuration.CONFIGS] = str(invocations.keep_configs(configuration.config_folder()))

# Environment variables for launch lines, so that the profile states each count once, as a resource
COUNTS = (
    "JOB_NODES={resources.nodes} JOB_TASKS_PER_NODE={resources.tasks_per_node}"
    " JOB_CPUS_PER_TASK={resources.cpus_per_task} JOB_GRES={resources.gres}; "
)


def gpu_job(launch="python"):
    """Return the default resources of a rule on a GPU; `set-resources` in a profile has an entry for each such rule."""
    return {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 2, "gres": "", "launch": launch}


def check_rule_names():
    """Refuse resources and threads for rules that do not exist, since Snakemake ignores them."""
    known, given = [rule.name for rule in workflow.rules], workflow.resource_settings
    for key, settings in (("set-resources", given.overwrite_resources), ("set-threads", given.overwrite_threads)):
        for name in sorted(set(settings) - set(known)):
            raise WorkflowError(f"{key}: no rule {name!r}{did_you_mean(name, known)}; correct the profile or --{key}")


TRAINED = [name for name, entry in plan.load_components().items() if entry.source == "train"]


wildcard_constraints:
    where=r"(results/.+|resources/components)",
    step=r"[\w.-]+",
    run=r"[^/]+",
    stage=r"[^/]+",
    dataset=r"[^/]+",
    component=r"[^/]+",
    split=r"train|held_out",
    part=r"\d+",
    parts=r"\d+",
    images=r"\d+",
    resolution=r"\d+",


onstart:
    if workflow.executor_plugin.name == "slurm":
        if "launch" not in workflow.resource_settings.overwrite_resources.get("train", {}):
            raise WorkflowError(
                "--set-resources: the rule train has no launch line, because a key on the command line replaces the whole "
                "key of the profile. Put your values into a copy of the profile: cp -r profiles/slurm profiles/mine"
            )
        if ALONE:  # no other invocation runs in this folder, so jobs in the queue are left over from a killed one
            try:
                slurm.wait_for_jobs(Path(), say=logger.warning)
            except slurm.SlurmError as error:
                raise WorkflowError(str(error))


onerror:
    for file in log:
        print(*slurm.reasons(Path(file).read_text(errors="replace")), sep="\n", file=sys.stderr)

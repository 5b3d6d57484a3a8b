# The bridge to sdtrain.config: what rules ask of the configuration. One rule only, which freezes slices of it.
import functools
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf
from snakemake.exceptions import WorkflowError

LIBRARY = str(Path(workflow.basedir, "workflow"))
sys.path.insert(0, LIBRARY)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [LIBRARY, os.environ.get("PYTHONPATH")]))
from sdtrain import config as settings

RUN = str(config.get("run", "demo"))
OVERRIDES = config.get("set", [])
OVERRIDES = OVERRIDES.split() if isinstance(OVERRIDES, str) else list(OVERRIDES)


def planned(function):
    """Cache a reader of the configuration; where it fails, planning ends with its message."""

    @functools.cache
    def read(*args):
        try:
            return function(*args)
        except settings.ConfigError as error:
            raise WorkflowError(str(error)) from None

    return read


# `--config set=…` is for the run that `--config run=…` names
load_run = planned(lambda run: settings.load_run(run, OVERRIDES if run == RUN else []))
load_stage = planned(lambda run, stage: settings.load_stage(run, stage, OVERRIDES if run == RUN else []))
load_data = planned(settings.load_data)
load_components = planned(settings.load_components)
load_component = planned(settings.load_component)

TRAINED = [name for name, entry in load_components().items() if entry.source == "train"]
if load_run(RUN).wandb.api_key:  # jobs get it by their environment, never by a file
    os.environ["WANDB_API_KEY"] = load_run(RUN).wandb.api_key


wildcard_constraints:
    where=r"(results/.+|resources/components)",
    step=r"[\w.-]+",
    run=r"[^/]+",
    stage=r"[^/]+",
    dataset=r"[^/]+",
    component=r"[^/]+",
    split=r"train|held_out",
    images=r"\d+",
    resolution=r"\d+",


def slice_of(wildcards):
    """What one step depends on, and nothing else: the text of the file that the step reads."""
    kind, name, stage = (wildcards.where.split("/") + [None, None])[1:4]
    if wildcards.where == "resources/components":
        entry = load_component(wildcards.step)
        part = entry.train if entry.source == "train" else entry
    elif kind == "data":
        part = load_data(name)[settings.DATA_STEPS[wildcards.step]]
    elif wildcards.step == "evaluate":
        part = load_run(name).evaluation
    else:
        return OmegaConf.to_yaml(settings.freeze_stage(load_stage(name, stage)))
    return OmegaConf.to_yaml(part, resolve=True)


def components_of(model):
    """The records of the components that a `model` section names."""
    sources = [model.pretrained, *(model[part].pretrained for part in settings.MODEL_PARTS)]
    return sorted({settings.component_record(s) for s in sources if s and s.startswith("resources/components/")})


def milestones(run, stage):
    return list(load_stage(run, stage).experiment.milestones)


def milestone_result(run, stage, images=None):
    """The record of a stage's milestone, by default its last."""
    return f"results/runs/{run}/{stage}/{milestones(run, stage)[-1] if images is None else images}/train.json"


def earlier_result(wildcards):
    """The milestone before this one; before a stage's first, the one that the stage starts from."""
    earlier = [m for m in milestones(wildcards.run, wildcards.stage) if m < int(wildcards.images)]
    if earlier:
        return milestone_result(wildcards.run, wildcards.stage, earlier[-1])
    init = load_stage(wildcards.run, wildcards.stage).init
    return f"{Path(init).parent}/train.json" if init and init.startswith("results/runs/") else []


def made_here(path):
    """A path as an input where the workflow makes it; shards that exist already are no input of any rule."""
    return path if path.startswith("results/") else []


rule freeze:
    output:
        "{where}/config/{step}.yaml",
    log:
        "logs/{where}/config/{step}.log",
    params:
        text=slice_of,
    run:
        settings.write_text(output[0], params.text)

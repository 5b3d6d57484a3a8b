# The bridge to sdtrain.config: what rules ask of the configuration. No rules here.
import functools
import sys
from pathlib import Path

from omegaconf import OmegaConf
from snakemake.exceptions import WorkflowError

LIBRARY = str(Path(workflow.basedir, "workflow"))
sys.path.insert(0, LIBRARY)
from sdtrain import config as settings
from sdtrain import predicates

# a prefix of one's own takes the place of Snakemake's strict mode, without which `| tee` hides a failure
shell.prefix(f"export PYTHONPATH='{LIBRARY}':$PYTHONPATH; set -euo pipefail; ")

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
settings.pass_on_key(load_run(RUN))


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
        return OmegaConf.to_yaml(settings.freeze_stage(load_stage(name, stage)), sort_keys=True)
    return OmegaConf.to_yaml(part, resolve=True, sort_keys=True)


def components_of(model):
    """The records of the components that a `model` section names."""
    sources = [model.pretrained, *(model[part].pretrained for part in settings.MODEL_PARTS)]
    return sorted({settings.component_record(s) for s in sources if s and s.startswith("resources/components/")})


def check(run):
    """Read whatever a run names, so that a mistake ends planning with its own message."""
    evaluation = load_run(run).evaluation
    named = {evaluation.features, evaluation.alignment} - {None, "fitted"}
    for stage in load_run(run).stages:
        named |= {Path(record).stem for record in components_of(load_stage(run, stage).model)}
        check_filters(f"configs/{run}.yaml: dataset.params.filters", load_stage(run, stage).dataset.params.filters)
    for name in sorted(named):
        load_component(name)
    if data := load_run(run).data:
        check_filters(f"configs/data/{data}.yaml: select.filters", load_data(data).select.filters)


def check_filters(where, filters):
    try:
        predicates.parse(OmegaConf.to_container(filters) if filters else None)
    except predicates.PredicateError as error:
        raise WorkflowError(f"{where}: {error}") from None


check(RUN)


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


# ---- components and data
def folder_files(wildcards):
    """The files of a component that is a local folder: an edit of one copies it again."""
    entry = load_component(wildcards.component)
    found = Path(entry.path).rglob("*") if entry.source == "folder" else []
    return sorted(str(f) for f in found if f.is_file())


def selection_of(dataset, split):
    """The rows to download; shards that exist already need none."""
    return [] if load_data(dataset).shards.path else f"results/data/{dataset}/{split}/selected.parquet"


# ---- evaluation
def data_folder(wildcards):
    return f"results/data/{load_run(wildcards.run).data}"


def held_out(wildcards):
    return f"{data_folder(wildcards)}/held_out/shards/manifest.json"


def images_of(wildcards):
    return f"{data_folder(wildcards)}/train/shards/manifest.json"


def feature_network(wildcards):
    return f"resources/components/{load_run(wildcards.run).evaluation.features}"


def score_model(wildcards):
    """The model of the clip-score: a CLIP component, or a map fitted on the dataset's own features."""
    run = load_run(wildcards.run)
    if run.evaluation.alignment != "fitted":
        return f"resources/components/{run.evaluation.alignment}"
    return f"{data_folder(wildcards)}/alignment/{run.evaluation.features}-{score_text(wildcards)}.safetensors"


def score_text(wildcards):
    """The component that embeds captions for a fitted map: the run's own text encoder."""
    folder = load_run(wildcards.run).model.text_encoder.pretrained or ""
    if not folder.startswith("resources/components/"):
        where = f"configs/{wildcards.run}.yaml: evaluation.alignment"
        raise WorkflowError(f"{where}: fitted needs a component as model.text_encoder.pretrained")
    return Path(folder).name


def score_networks(wildcards):
    """The arguments that name the networks of a fitted map; a CLIP model has its own."""
    if load_run(wildcards.run).evaluation.alignment != "fitted":
        return ""
    return f"features={feature_network(wildcards)} text=resources/components/{score_text(wildcards)}"


def score_record(wildcards):
    """What the clip-score's model is known by: a component's record, or the fitted map itself."""
    model = score_model(wildcards)
    return model if model.endswith(".safetensors") else f"{model}.json"


def rows(wildcards):
    """Every stage and milestone of a run, in order."""
    return [f"{stage}/{m}" for stage in load_run(wildcards.run).stages for m in milestones(wildcards.run, stage)]


def measured(wildcards):
    """Everything that the report shows."""
    records = ["train", "samples", "frechet_distance"] + ["clip_score"] * bool(
        load_run(wildcards.run).evaluation.alignment
    )
    return [f"results/runs/{wildcards.run}/{row}/{record}.json" for row in rows(wildcards) for record in records]


def yields(wildcards):
    """The yield table, where the dataset was selected from a table."""
    selected = not load_data(load_run(wildcards.run).data).shards.path
    return f"{data_folder(wildcards)}/yields.json" if selected else []

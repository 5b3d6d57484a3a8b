"""What the rules ask of the configuration: which files a run, a stage or a dataset needs. Planning imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdtrain.config.fingerprint import freeze_stage
from sdtrain.config.load import (
    MODEL_PARTS,
    check_existing,
    component_record,
    data_slice,
    load_component,
    load_components,
    load_data,
    load_run,
    load_stage,
    way_in,
)
from sdtrain.data import predicates
from sdtrain.errors import ConfigError


class Plan:
    """The configurations behind one call of Snakemake, each read once, and the paths that follow from them.

    `overrides` are for the run of that name only. A mistake in a configuration is raised as `error`, with its message.
    Methods that take `wildcards` are input functions of rules.
    """

    def __init__(self, run: str, overrides: list[str], error: type[Exception]):
        self.run, self.error = run, error
        self.load_run = self._read(lambda name: load_run(name, overrides if name == run else []))
        self.load_stage = self._read(lambda name, stage: load_stage(name, stage, overrides if name == run else []))
        self.load_data = self._read(load_data)
        self.data_slice = self._read(lambda name, step: data_slice(load_data(name), step))
        self.load_components = self._read(load_components)
        self.load_component = self._read(load_component)

    def _read(self, function: Callable) -> Callable:
        @functools.cache
        def read(*args):
            try:
                return function(*args)
            except ConfigError as error:
                raise self.error(str(error)) from None

        return read

    def check(self) -> None:
        """Read whatever the run names, so that a mistake ends planning with its own message."""
        run = self.load_run(self.run)
        named = {run.evaluation.features, run.evaluation.alignment} - {None, "fitted"}
        for stage in run.stages:
            config = self.load_stage(self.run, stage)
            named |= {Path(record).stem for record in self.components_of(config.model)}
            self._check_filters(f"configs/{self.run}.yaml: dataset.params.filters", config.dataset.params.filters)
        if run.data:
            data = self.load_data(run.data)
            self._check_filters(f"configs/data/{run.data}.yaml: select.filters", data.select.filters)
            named |= {data.latents.text_encoder} - {None}
            if data.shards.path:
                self._check_existing(f"configs/data/{run.data}.yaml", data.select)
            if data.shards.parts < 1:
                raise self.error(f"configs/data/{run.data}.yaml: shards.parts: {data.shards.parts} is not at least 1")
        for name in sorted(named):
            self.load_component(name)

    def _check_filters(self, where: str, filters: DictConfig | None) -> None:
        try:
            predicates.parse(OmegaConf.to_container(filters) if filters else None)
        except predicates.PredicateError as error:
            raise self.error(f"{where}: {error}") from None

    def _check_existing(self, where: str, select: DictConfig) -> None:
        try:
            check_existing(select)
        except ConfigError as error:
            raise self.error(f"{where}: {error}") from None

    def slice_of(self, wildcards: Any) -> str:
        """What one step depends on, and nothing else: the text of the file that the step reads."""
        kind, name, stage = (wildcards.where.split("/") + [None, None])[1:4]
        if wildcards.where == "resources/components":
            entry = self.load_component(wildcards.step)
            part = entry.train if entry.source == "train" else entry
        elif kind == "data":
            part = self.data_slice(name, wildcards.step)
        elif wildcards.step == "evaluate":
            part = self.load_run(name).evaluation
        else:
            return OmegaConf.to_yaml(freeze_stage(self.load_stage(name, stage)), sort_keys=True)
        return OmegaConf.to_yaml(part, resolve=True, sort_keys=True)

    # ------------------------------------------------------------ stages and milestones
    def milestones(self, run: str, stage: str) -> list[int]:
        """The numbers of images seen at which a stage is exported and measured."""
        return list(self.load_stage(run, stage).experiment.milestones)

    def milestone_result(self, run: str, stage: str, images: int | None = None) -> str:
        """The record of a stage's milestone, by default its last."""
        return f"results/runs/{run}/{stage}/{self.milestones(run, stage)[-1] if images is None else images}/train.json"

    def earlier_result(self, wildcards: Any) -> str | list:
        """The milestone before this one; before a stage's first, the one that the stage starts from."""
        run, stage = wildcards.run, wildcards.stage
        earlier = [m for m in self.milestones(run, stage) if m < int(wildcards.images)]
        if earlier:
            return self.milestone_result(run, stage, earlier[-1])
        init = self.load_stage(run, stage).init
        return f"{Path(init).parent}/train.json" if init and init.startswith("results/runs/") else []

    def trained_on(self, run: str, stage: str) -> str | list:
        """The manifest that a stage trains on, where the workflow makes it."""
        return made_here(self.load_stage(run, stage).dataset.params.path)

    # ------------------------------------------------------------ components
    def components_of(self, model: DictConfig) -> list[str]:
        """The records of the components that a `model` section names."""
        sources = [model.pretrained, *(model[part].pretrained for part in MODEL_PARTS)]
        return sorted({component_record(s) for s in sources if s and s.startswith("resources/components/")})

    def folder_files(self, wildcards: Any) -> list[str]:
        """The files of a component that is a local folder: an edit of one copies it again."""
        entry = self.load_component(wildcards.component)
        found = Path(entry.path).rglob("*") if entry.source == "folder" else []
        return sorted(str(f) for f in found if f.is_file())

    def perceptual_record(self, wildcards: Any) -> str | list:
        """The record of the component whose features the loss of a trained component compares."""
        loss = self.load_component(wildcards.component).train.loss
        made = loss.perceptual and (loss.perceptual_network or "").startswith("resources/components/")
        return component_record(loss.perceptual_network) if made else []

    # ------------------------------------------------------------ data
    def parts(self, wildcards: Any) -> list[str]:
        """The manifests of the parts of a split; the few images held out need one, unless resharding looks for them."""
        data = self.load_data(wildcards.dataset)
        way = way_in(data)
        parts = data.shards.parts if wildcards.split == "train" or way == "resharded" else 1
        folder = f"results/data/{wildcards.dataset}/{wildcards.split}/{way}"
        return [f"{folder}/{part}-of-{parts}.json" for part in range(parts)]

    def existing_shards(self, wildcards: Any) -> str | list:
        """The shards that a dataset takes over, where the workflow makes them."""
        shards = self.load_data(wildcards.dataset).shards
        held_out = wildcards.split == "held_out" and shards.held_out_path
        return made_here(held_out or shards.path or "")

    def text_record(self, wildcards: Any) -> str | list:
        """The record of the component whose states of the captions are kept beside a dataset's latents."""
        name = self.load_data(wildcards.dataset).latents.text_encoder
        return f"resources/components/{name}.json" if name else []

    def text_argument(self, wildcards: Any) -> str:
        """The argument that names that component."""
        name = self.load_data(wildcards.dataset).latents.text_encoder
        return f"text_encoder=resources/components/{name}" if name else ""

    def manifests(self) -> list[str]:
        """The manifests that the run trains on and is measured against."""
        run = self.load_run(self.run)
        found = [self.trained_on(self.run, stage) for stage in run.stages]
        if run.data:
            found += [f"results/data/{run.data}/{split}/shards/manifest.json" for split in ("train", "held_out")]
        return list(dict.fromkeys(name for name in found if name))

    def yields(self, run: str) -> str | list:
        """What tells the yields of a run's dataset: a file of their own; of shards that exist, their manifest."""
        data = self.load_run(run).data
        if not data:
            return []
        existing = self.load_data(data).shards.path
        return f"results/data/{data}/" + ("train/shards/manifest.json" if existing else "yields.json")

    # ------------------------------------------------------------ evaluation
    def data_folder(self, wildcards: Any) -> str:
        """Where the data of a run lie."""
        return f"results/data/{self.load_run(wildcards.run).data}"

    def train_images(self, wildcards: Any) -> str:
        """The images that a run trains on."""
        return f"{self.data_folder(wildcards)}/train/shards/manifest.json"

    def held_out_images(self, wildcards: Any) -> str:
        """The images that a run never trains on."""
        return f"{self.data_folder(wildcards)}/held_out/shards/manifest.json"

    def feature_network(self, wildcards: Any) -> str:
        """The network of the Frechet distance."""
        return f"resources/components/{self.load_run(wildcards.run).evaluation.features}"

    def score_model(self, wildcards: Any) -> str:
        """The model of the clip-score: a CLIP component, or a map fitted on the dataset's own features."""
        evaluation = self.load_run(wildcards.run).evaluation
        if evaluation.alignment != "fitted":
            return f"resources/components/{evaluation.alignment}"
        names = f"{evaluation.features}-{self.score_text(wildcards)}"
        return f"{self.data_folder(wildcards)}/alignment/{names}.safetensors"

    def score_text(self, wildcards: Any) -> str:
        """The component that embeds captions for a fitted map: the run's own text encoder."""
        folder = self.load_run(wildcards.run).model.text_encoder.pretrained or ""
        if not folder.startswith("resources/components/"):
            where = f"configs/{wildcards.run}.yaml: evaluation.alignment"
            raise self.error(f"{where}: fitted needs a component as model.text_encoder.pretrained")
        return Path(folder).name

    def score_networks(self, wildcards: Any) -> str:
        """The arguments that name the networks of a fitted map; a CLIP model has its own."""
        if self.load_run(wildcards.run).evaluation.alignment != "fitted":
            return ""
        text = f"resources/components/{self.score_text(wildcards)}"
        return f"features={self.feature_network(wildcards)} text={text}"

    def score_record(self, wildcards: Any) -> str:
        """What the clip-score's model is known by: a component's record, or the fitted map itself."""
        model = self.score_model(wildcards)
        return model if model.endswith(".safetensors") else f"{model}.json"

    def rows(self, wildcards: Any) -> list[str]:
        """Every stage and milestone of a run, in order."""
        run = wildcards.run
        return [f"{stage}/{m}" for stage in self.load_run(run).stages for m in self.milestones(run, stage)]

    def measured(self, wildcards: Any) -> list[str]:
        """Everything that the report shows."""
        records = ["train", "samples", "frechet_distance"]
        if self.load_run(wildcards.run).evaluation.alignment:
            records.append("clip_score")
        return [f"results/runs/{wildcards.run}/{row}/{name}.json" for row in self.rows(wildcards) for name in records]


def made_here(path: str) -> str | list:
    """A path as an input where the workflow makes it; what exists already is no input of any rule."""
    return path if path.startswith("results/") else []

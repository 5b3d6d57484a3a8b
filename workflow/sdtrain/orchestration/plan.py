"""Paths and parameters of the rules, derived from the configuration. Imports no torch: planning stays fast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdtrain.config.fingerprint import freeze_stage, slice_text
from sdtrain.config.load import (
    MODEL_PARTS,
    check_existing,
    component_record,
    config_folder,
    data_slice,
    load_components,
    load_data,
    load_run,
    way_in,
)
from sdtrain.data import predicates
from sdtrain.errors import SDTrainError, did_you_mean
from sdtrain.evaluation.registry import measured, metric_of


class Plan:
    """The configurations of one Snakemake invocation, each read once, and the paths that follow from them.

    `overrides` apply to the run `run` only. A mistake in a configuration is raised as `error`, with its message.
    Methods that take `wildcards` are input functions of rules; an empty list means no input.
    """

    def __init__(self, run: str, overrides: list[str], error: type[Exception]):
        self.run, self.error = run, error
        self._load_run = self._read(lambda name: load_run(name, overrides if name == run else []))
        self.load_data = self._read(load_data)
        self.data_slice = self._read(lambda name, step: data_slice(self.load_data(name), step))
        self.load_components = self._read(load_components)

    def _read(self, function: Callable) -> Callable:
        @functools.cache
        def read(*args):
            with self._errors():
                return function(*args)

        return read

    @contextlib.contextmanager
    def _errors(self, prefix: str = "") -> Iterator[None]:
        try:
            yield
        except SDTrainError as error:
            raise self.error(f"{prefix}{error}") from None

    def load_run(self, run: str) -> DictConfig:
        """Return the configuration of a run."""
        return self._load_run(run)[0]

    def load_stage(self, run: str, stage: str) -> DictConfig:
        """Return the whole configuration of a run's stage."""
        return self._find(stage, self._load_run(run)[1], f"{run}.yaml: stages: no stage")

    def load_component(self, name: str) -> DictConfig:
        """Return an entry of `configs/components.yaml`."""
        return self._find(name, self.load_components(), "components.yaml: no component")

    def _find(self, name: str, known: dict[str, DictConfig], problem: str) -> DictConfig:
        if name not in known:
            raise self.error(f"{config_folder()}/{problem} {name!r}{did_you_mean(name, known)}")
        return known[name]

    def check(self) -> None:
        """Read every configuration that the run names, so that a mistake in one ends planning with its message."""
        run = self.load_run(self.run)
        for stage in run.stages:
            filters = self.load_stage(self.run, stage).dataset.params.filters
            with self._errors(f"configs/{self.run}.yaml: dataset.params.filters: "):
                predicates.parse(filters)
        if run.data:
            data, where = self.load_data(run.data), f"configs/data/{run.data}.yaml"
            with self._errors(f"{where}: select.filters: "):
                predicates.parse(data.select.filters)
            if data.shards.path:
                with self._errors(f"{where}: "):
                    check_existing(data.select)
        for name in self.components():
            self.load_component(name)

    def slice_of(self, wildcards: Any) -> str:
        """Return the frozen slice of a step: the YAML text of the keys that decide its result."""
        kind, name, stage = (wildcards.where.split("/") + [None, None])[1:4]
        if wildcards.where == "resources/components":
            entry = self.load_component(wildcards.step)
            part = entry.train if entry.source == "train" else entry
        elif kind == "data":
            part = self.data_slice(name, wildcards.step)
        elif wildcards.step == "evaluate":
            part = self.load_run(name).evaluation
        else:
            return slice_text(freeze_stage(self.load_stage(name, stage)), resolve=False)
        return slice_text(part)

    # ------------------------------------------------------------ stages and milestones
    def milestones(self, run: str, stage: str) -> list[int]:
        """Return the numbers of images seen at which a stage is exported and evaluated."""
        return list(self.load_stage(run, stage).experiment.milestones)

    def milestone_result(self, run: str, stage: str, images: int | None = None) -> str:
        """Return the record of a stage's milestone, by default of its last."""
        return f"results/runs/{run}/{stage}/{self.milestones(run, stage)[-1] if images is None else images}/train.json"

    def earlier_result(self, wildcards: Any) -> str | list:
        """Return the record of the milestone before this one; for a stage's first, of the one that `init` names."""
        run, stage = wildcards.run, wildcards.stage
        earlier = [m for m in self.milestones(run, stage) if m < int(wildcards.images)]
        if earlier:
            return self.milestone_result(run, stage, earlier[-1])
        init = self.load_stage(run, stage).init
        return f"{Path(init).parent}/train.json" if init and init.startswith("results/runs/") else []

    def trained_on(self, run: str, stage: str) -> str | list:
        """Return the manifest that a stage trains on, if the workflow makes it."""
        return made_here(self.load_stage(run, stage).dataset.params.path)

    # ------------------------------------------------------------ components
    def components(self) -> list[str]:
        """Return the names of the components that the run's training, data and evaluation need."""
        run = self.load_run(self.run)
        found = self.evaluation_components(run)
        for stage in run.stages:
            found |= {Path(record).stem for record in self.components_of(self.load_stage(self.run, stage).model)}
        if run.data and (text_encoder := self.load_data(run.data).latents.text_encoder):
            found.add(text_encoder)
        return sorted(found)

    def components_of(self, model: DictConfig) -> list[str]:
        """Return the records of the components that a `model` section names."""
        sources = [model.pretrained, *(model[part].pretrained for part in MODEL_PARTS)]
        return sorted({component_record(s) for s in sources if s and s.startswith("resources/components/")})

    def folder_files(self, wildcards: Any) -> list[str]:
        """Return the files of a component that is a local folder; an edit of one copies the folder again."""
        entry = self.load_component(wildcards.component)
        found = Path(entry.path).rglob("*") if entry.source == "folder" else []
        return sorted(str(f) for f in found if f.is_file())

    def perceptual_record(self, wildcards: Any) -> str | list:
        """Return the record of the component that the perceptual loss of a trained component uses."""
        loss = self.load_component(wildcards.component).train.loss
        made = loss.perceptual and (loss.perceptual_network or "").startswith("resources/components/")
        return component_record(loss.perceptual_network) if made else []

    # ------------------------------------------------------------ data
    def parts(self, wildcards: Any) -> list[str]:
        """Return the manifests of a split's shard partitions.

        The held-out split is small and needs one partition, unless resharding has to look for it in every source shard.
        """
        data = self.load_data(wildcards.dataset)
        way = way_in(data)
        parts = data.shards.parts if wildcards.split == "train" or way == "resharded" else 1
        folder = f"results/data/{wildcards.dataset}/{wildcards.split}/{way}"
        return [f"{folder}/{part}-of-{parts}.json" for part in range(parts)]

    def existing_shards(self, wildcards: Any) -> str | list:
        """Return the manifest of the existing shards that a dataset uses, if the workflow makes it."""
        shards = self.load_data(wildcards.dataset).shards
        held_out = wildcards.split == "held_out" and shards.held_out_path
        return made_here(held_out or shards.path or "")

    def text_record(self, wildcards: Any) -> str | list:
        """Return the record of the text encoder whose states are stored with a dataset's latents."""
        name = self.load_data(wildcards.dataset).latents.text_encoder
        return f"resources/components/{name}.json" if name else []

    def text_argument(self, wildcards: Any) -> str:
        """Return the argument of precompute_latents that names this text encoder."""
        name = self.load_data(wildcards.dataset).latents.text_encoder
        return f"text_encoder=resources/components/{name}" if name else ""

    def manifests(self) -> list[str]:
        """Return the manifests that the run trains on and is evaluated against."""
        run = self.load_run(self.run)
        found = [self.trained_on(self.run, stage) for stage in run.stages]
        if run.data:
            found += [f"results/data/{run.data}/{split}/shards/manifest.json" for split in ("train", "held_out")]
        return list(dict.fromkeys(str(name) for name in found if name))

    def yields(self, run: str) -> str | list:
        """Return the file with the yields of a run's dataset; for existing shards, their manifest."""
        data = self.load_run(run).data
        if not data:
            return []
        existing = self.load_data(data).shards.path
        return f"results/data/{data}/" + ("train/shards/manifest.json" if existing else "yields.json")

    # ------------------------------------------------------------ evaluation
    def data_folder(self, wildcards: Any) -> str:
        """Return the data folder of a run."""
        return f"results/data/{self.load_run(wildcards.run).data}"

    def train_images(self, wildcards: Any) -> str:
        """Return the manifest of the images that a run trains on."""
        return f"{self.data_folder(wildcards)}/train/shards/manifest.json"

    def held_out_images(self, wildcards: Any) -> str:
        """Return the manifest of the held-out images of a run."""
        return f"{self.data_folder(wildcards)}/held_out/shards/manifest.json"

    def feature_network(self, wildcards: Any) -> str:
        """Return the folder of the feature network of the Frechet distance."""
        return f"resources/components/{self.load_run(wildcards.run).evaluation.features}"

    def measured_with(self, wildcards: Any) -> dict[str, str]:
        """Return what a metric is measured with: component folders and files, by the argument of `measure`."""
        evaluation, metric = self.load_run(wildcards.run).evaluation, metric_of(wildcards.metric)
        with_reference = {"reference": f"results/runs/{wildcards.run}/{wildcards.stage}/reference.safetensors"}
        found = with_reference if metric.with_reference else {}
        if evaluation[metric.setting] != "fitted":
            return {"network": f"resources/components/{evaluation[metric.setting]}", **found}
        text = self.text_encoder(wildcards)
        fitted = f"{self.data_folder(wildcards)}/alignment/{evaluation.features}-{Path(text).name}.safetensors"
        return {"network": fitted, "features": self.feature_network(wildcards), "text": text, **found}

    def measured_from(self, wildcards: Any) -> list[str]:
        """Return the input files for these: the file itself, or the record of a component."""
        paths = self.measured_with(wildcards).values()
        return [path if path.endswith(".safetensors") else component_record(path) for path in paths]

    def measure_arguments(self, wildcards: Any) -> str:
        """Return these as arguments of `measure`."""
        return " ".join(f"{name}={path}" for name, path in self.measured_with(wildcards).items())

    def text_encoder(self, wildcards: Any) -> str:
        """Return the folder of the component that embeds captions for a fitted map: the run's text encoder."""
        folder = self.load_run(wildcards.run).model.text_encoder.pretrained or ""
        if not folder.startswith("resources/components/"):
            where = f"configs/{wildcards.run}.yaml: evaluation.alignment: `fitted`"
            raise self.error(f"{where} needs resources/components/… as model.text_encoder.pretrained")
        return folder

    def evaluation_components(self, run: DictConfig) -> set[str]:
        """Return the names of the components that the evaluation of a run needs."""
        return {run.evaluation[metric.setting] for metric in measured(run.evaluation)} - {"fitted"}

    def metrics(self, run: str) -> list[str]:
        """Return the names of the records of a run's metrics."""
        return [metric.record for metric in measured(self.load_run(run).evaluation)]

    def rows(self, wildcards: Any) -> list[str]:
        """Return every `stage/milestone` of a run, in order."""
        run = wildcards.run
        return [f"{stage}/{m}" for stage in self.load_run(run).stages for m in self.milestones(run, stage)]

    def measured(self, wildcards: Any) -> list[str]:
        """Return every record that the report shows."""
        records = ["train", "samples", *self.metrics(wildcards.run)]
        return [f"results/runs/{wildcards.run}/{row}/{name}.json" for row in self.rows(wildcards) for name in records]


def made_here(path: str) -> str | list:
    """Return the path if the workflow makes it, else no input: existing files are not inputs of rules."""
    return path if path.startswith("results/") else []

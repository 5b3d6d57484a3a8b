"""Configurations for tests: a complete stage, and a run of two stages."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from sdtrain.config import schema
from sdtrain.config.load import load_config, load_run

FILLED = ["wandb.api_key=null", "experiment.log_dir=logs", "experiment.name=n", "experiment.project=p"]
FILLED += ["experiment.num_examples_to_see=100", "dataset.params.path=shards/{00000..00009}.tar"]

RUN = """
data: emoji
system: {batch_size: 16}
model: {vae: {pretrained: resources/components/little-vae}}
dataset: {type: LatentDataset, params: {filters: {group: 'in [a]', width: '>=64'}}}
stages:
  stage1:
    experiment: {num_examples_to_see: 100, milestones: [50, 0, 50]}
    dataset: {params: {resolution: 64}}
  stage2:
    init: stage1
    system: {batch_size: 4}
    experiment: {num_examples_to_see: 40}
    dataset: {params: {resolution: 128, filters: {width: '>=128'}}}
"""


def load_stage(run: str, name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the whole configuration of a run's stage."""
    return load_run(run, overrides)[1][name]


def stage(text: str = "", *overrides: str) -> DictConfig:
    """Return the configuration of a stage from a YAML text, with all required keys."""
    return load_config(schema.StageConfig, overrides=[*FILLED, *overrides], values=OmegaConf.create(text))

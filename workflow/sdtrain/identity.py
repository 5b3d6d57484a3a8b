"""What a training is known by: its folder, the fingerprints of its inputs, and which checkpoints it may go on from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sdtrain import config, storage
from sdtrain.checkpoint import CheckpointError
from sdtrain.models import PARTS, ModelError
from sdtrain.shards import read_manifest
from sdtrain.sources import DataError


@dataclass(frozen=True)
class Identity:
    """A training's folder, and what decides its weights; `key` is the fingerprint of it all."""

    folder: Path
    sources: dict[str, str]
    decisive: dict
    frozen: bool

    @property
    def key(self) -> str:
        """16 hex digits."""
        return config.fingerprint(self.decisive, self.sources)

    @property
    def run_id(self) -> str:
        """What wandb knows it by: the same in another folder is another run."""
        return config.fingerprint(self.key, str(self.folder))

    @property
    def saves(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints" / self.key

    @property
    def about(self) -> dict:
        """What stands beside the checkpoints."""
        return {"key": self.key, "sources": self.sources, "decisive": self.decisive}


def identify(cfg, global_batch: int) -> Identity:
    """The identity of a stage's training. Raises ModelError for latents that other networks made."""
    sources = source_fingerprints(cfg)
    check_latents(cfg, sources)
    decisive = {**config.decisive(cfg), "system": {"global_batch": global_batch}}
    return Identity(run_folder(cfg), sources, decisive, bool(cfg.frozen))


def run_folder(cfg) -> Path:
    """log_dir/project/name; a frozen configuration with other values by hand gets a folder of its own beside it."""
    e, trial = cfg.experiment, ""
    if cfg.frozen and cfg.frozen != config.stage_fingerprint(cfg):
        trial = f"-trial-{config.stage_fingerprint(cfg)[:6]}"
    return Path(e.log_dir, e.project, e.name + trial)


def claim(own: Identity, anew: bool) -> None:
    """Mark the folder as this training's, or refuse one that holds another's checkpoints; `anew` starts in it anyway.

    A configuration that the workflow has frozen was edited on purpose, so it trains anew beside the old checkpoints;
    but another global batch is never that purpose: it comes with another number of ranks.
    """
    if not own.saves.is_dir() and not anew:
        for file in sorted(own.folder.glob("checkpoints/*/about.json"), key=os.path.getmtime, reverse=True):
            other = json.loads(file.read_text())
            differ = config.differences(other["decisive"], own.decisive)
            differ += config.differences(other["sources"], own.sources, "the fingerprint of ")
            if differ == ["system.global_batch"] or not own.frozen:
                raise CheckpointError(_refusal(file.parent, other["decisive"], own.decisive, differ))
    config.write_json(own.saves / "about.json", own.about)


def _refusal(saves: Path, theirs: dict, ours: dict, differ: list[str]) -> str:
    remedy = "start anew with experiment.requeue=false, or in another folder with experiment.name=…"
    if differ == ["system.global_batch"]:
        before, now = theirs["system"]["global_batch"], ours["system"]["global_batch"]
        return (
            f"{saves}: these checkpoints saw {before} images a step, this launch {now} on all its ranks; "
            f"go on with system.global_batch={before} (gradient_accumulation follows), or {remedy}"
        )
    return f"{saves}: these checkpoints are of another training ({', '.join(differ)} differ); {remedy}"


def code() -> str:
    """The code and the packages that train: with others, the same configuration may give other weights."""
    return config.fingerprint(config.code_digest(), config.versions())


# ---------------------------------------------------------------- inputs
def source_fingerprints(cfg) -> dict[str, str]:
    """What the inputs' own records say they are: they decide the weights as the configuration does."""
    records = {part: cfg.model[part].pretrained or cfg.model.pretrained for part in (*PARTS, "unet")}
    found = {part: config.record_fingerprint(f"{source}.json") for part, source in records.items() if source}
    found["dataset"] = data_fingerprint(cfg.dataset.params.path)
    if cfg.init:
        found["init"] = init_fingerprint(Path(cfg.init).resolve())
    return {k: v for k, v in found.items() if v}


def init_fingerprint(folder: Path) -> str:
    """What the record of a training or of a component says that a pipeline folder is; else the folder itself."""
    records = (folder.parent / "train.json", f"{folder}.json")
    return next((found for record in records if (found := config.record_fingerprint(record))), str(folder))


def data_fingerprint(path: str) -> str:
    """What a manifest says it is; of shards or tables without one, which files they are and how large."""
    if path.endswith(".json"):
        return read_manifest(path)["fingerprint"]
    try:
        addresses = storage.expand(path)
    except storage.StorageError as error:
        raise DataError(f"dataset.params.path: {error}") from None
    return config.fingerprint([(a, os.path.getsize(a) if os.path.isfile(a) else None) for a in addresses])


def check_latents(cfg, sources: dict[str, str]) -> None:
    """Refuse latents, and states of captions, that were made by other networks than this run's."""
    path = cfg.dataset.params.path
    if cfg.dataset.type != "LatentDataset" or not path.endswith(".json"):
        return
    made_by = config.read_json(path).get("made_by", {})
    for part, maker in (("vae", "vae"), ("text_encoder", "text_encoder"), ("tokenizer", "text_encoder")):
        ours, theirs = sources.get(part), made_by.get(maker)
        if ours and theirs and ours != theirs:
            folder = cfg.model[part].pretrained or cfg.model.pretrained
            remedy = f"train with the {part} it was made with, or make it again: snakemake --force {path}"
            raise ModelError(f"model.{part}: {folder} is {ours}, but {path} was made with {theirs}; {remedy}")

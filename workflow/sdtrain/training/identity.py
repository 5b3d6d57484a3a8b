"""The identity of a training: its folder, the fingerprints of its inputs, and the checkpoints that it may resume."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.fingerprint import (
    code_digest,
    decisive_keys,
    differences,
    fingerprint,
    record_fingerprint,
    stage_fingerprint,
    versions,
)
from sdtrain.data.manifest import read_manifest
from sdtrain.errors import DataError
from sdtrain.io import storage
from sdtrain.io.files import read_json, write_json
from sdtrain.models.parts import PARTS, ModelError
from sdtrain.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class Identity:
    """The folder of a training and all that decides its weights; `key` is the fingerprint of the latter."""

    folder: Path
    sources: dict[str, str]
    decisive: dict
    frozen: bool

    @property
    def key(self) -> str:
        """Return the fingerprint, 16 hexadecimal digits."""
        return fingerprint(self.decisive, self.sources)

    @property
    def run_id(self) -> str:
        """Return the id of the wandb run; the same training in another folder is another run."""
        return fingerprint(self.key, str(self.folder))

    @property
    def saves(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.folder / "checkpoints" / self.key

    @property
    def about(self) -> dict:
        """Return the description that is written beside the checkpoints."""
        return {"key": self.key, "sources": self.sources, "decisive": self.decisive}


def identify(cfg, global_batch: int) -> Identity:
    """Return the identity of a stage's training. Raise ModelError for latents that other networks made."""
    sources = source_fingerprints(cfg)
    check_latents(cfg, sources)
    decisive = {**decisive_keys(cfg), "system": {"global_batch": global_batch}}
    return Identity(run_folder(cfg), sources, decisive, bool(cfg.frozen))


def run_folder(cfg) -> Path:
    """Return log_dir/project/name; `-trial-…` is added for a frozen configuration changed by hand."""
    e, trial = cfg.experiment, ""
    if cfg.frozen and cfg.frozen != stage_fingerprint(cfg):
        trial = f"-trial-{stage_fingerprint(cfg)[:6]}"
    return Path(e.log_dir, e.project, e.name + trial)


def claim(own: Identity, anew: bool) -> None:
    """Mark the folder as this training's. Raise CheckpointError if it has another's checkpoints, unless `anew`.

    A frozen configuration was edited on purpose, so it trains anew beside the old checkpoints. A different global batch
    alone is an error all the same, since it usually comes from a different number of ranks.
    """
    if not own.saves.is_dir() and not anew:
        for file in sorted(own.folder.glob("checkpoints/*/about.json"), key=os.path.getmtime, reverse=True):
            other = json.loads(file.read_text())
            differ = differences(other["decisive"], own.decisive)
            differ += differences(other["sources"], own.sources, "the fingerprint of ")
            if differ == ["system.global_batch"] or not own.frozen:
                raise CheckpointError(_refusal(file.parent, other["decisive"], own.decisive, differ))
    write_json(own.saves / "about.json", own.about)


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
    """Return a fingerprint of code and packages: with others, the same configuration may give other weights."""
    return fingerprint(code_digest(), versions())


# ---------------------------------------------------------------- inputs
def source_fingerprints(cfg) -> dict[str, str]:
    """Return the fingerprints of the inputs, from their records: they decide the weights like the configuration."""
    records = {part: cfg.model[part].pretrained or cfg.model.pretrained for part in (*PARTS, "unet")}
    found = {part: record_fingerprint(f"{source}.json") for part, source in records.items() if source}
    found["dataset"] = data_fingerprint(cfg.dataset.params.path)
    if cfg.init:
        found["init"] = init_fingerprint(Path(cfg.init).resolve())
    return {k: v for k, v in found.items() if v}


def init_fingerprint(folder: Path) -> str:
    """Return the fingerprint in the record of a pipeline folder (of a training or component), else its path."""
    records = (folder.parent / "train.json", f"{folder}.json")
    return next((found for record in records if (found := record_fingerprint(record))), str(folder))


def data_fingerprint(path: str) -> str:
    """Return the fingerprint of a manifest; without one, a fingerprint of the names and sizes of the files."""
    if path.endswith(".json"):
        return read_manifest(path)["fingerprint"]
    try:
        addresses = storage.expand(path)
    except storage.StorageError as error:
        raise DataError(f"dataset.params.path: {error}") from None
    return fingerprint([(a, os.path.getsize(a) if os.path.isfile(a) else None) for a in addresses])


def check_latents(cfg, sources: dict[str, str]) -> None:
    """Raise ModelError for latents or text states that were made by other networks than this run's."""
    path = cfg.dataset.params.path
    if cfg.dataset.type != "LatentDataset" or not path.endswith(".json"):
        return
    made_by = read_json(path).get("made_by", {})
    for part, maker in (("vae", "vae"), ("text_encoder", "text_encoder"), ("tokenizer", "text_encoder")):
        ours, theirs = sources.get(part), made_by.get(maker)
        if ours and theirs and ours != theirs:
            folder = cfg.model[part].pretrained or cfg.model.pretrained
            remedy = f"train with the {part} it was made with, or make it again: snakemake --force {path}"
            raise ModelError(f"model.{part}: {folder} is {ours}, but {path} was made with {theirs}; {remedy}")

"""The identity of a training: its folder, the fingerprints of its inputs, and the checkpoints that it may resume."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sdtrain.config.fingerprint import (
    code_digest,
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

REMEDIES = (  # of a stage, see Identity
    "set system.global_batch={} (gradient_accumulation follows)",
    "start anew with experiment.requeue=false, or in another folder with experiment.name=…",
)


@dataclass(frozen=True)
class Identity:
    """The folder of a training and all that decides its weights; `key` is the fingerprint of the latter.

    `frozen` says that the configuration is one that the workflow has frozen. `world_size` is set for a configuration
    that gives the images of each rank instead of the global batch. `remedies` are two parts of error messages: how to
    keep a global batch, and how to start anew.
    """

    folder: Path
    sources: dict[str, str]
    decisive: dict
    frozen: bool
    world_size: int | None = None
    remedies: tuple[str, str] = REMEDIES

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
        ranks = {} if self.world_size is None else {"world_size": self.world_size}
        return {"key": self.key, "sources": self.sources, "decisive": self.decisive, **ranks}


def run_folder(cfg) -> Path:
    """Return log_dir/project/name; `-trial-…` is added for a frozen configuration changed by hand."""
    e, trial = cfg.experiment, ""
    if cfg.frozen and cfg.frozen != stage_fingerprint(cfg):
        trial = f"-trial-{stage_fingerprint(cfg)[:6]}"
    return Path(e.log_dir, e.project, e.name + trial)


def claim(own: Identity, anew: bool) -> None:
    """Mark the folder as this training's. Raise CheckpointError if it has another's checkpoints, unless `anew`.

    A frozen configuration was edited on purpose, so it trains anew beside the old checkpoints. A different global batch
    alone is an error all the same, since it usually comes from a different number of ranks; if the checkpoints tell
    their number of ranks, it is an error only if that differs, too.
    """
    if not own.saves.is_dir() and not anew:
        for file in sorted(own.folder.glob("checkpoints/*/about.json"), key=os.path.getmtime, reverse=True):
            other = read_json(file)
            differ = differences(other["decisive"], own.decisive)
            differ += differences(other["sources"], own.sources, "the fingerprint of ")
            same_ranks = own.world_size is not None and own.world_size == other["world_size"]
            if not own.frozen or (differ == ["system.global_batch"] and not same_ranks):
                raise CheckpointError(_refusal(file.parent, other, own, differ))
    write_json(own.saves / "about.json", own.about)


def _refusal(saves: Path, other: dict, own: Identity, differ: list[str]) -> str:
    same_batch, start_anew = own.remedies
    if differ != ["system.global_batch"]:
        return f"{saves}: these checkpoints belong to another training ({', '.join(differ)} differ); {start_anew}"
    remedy = same_batch.format(other["decisive"]["system"]["global_batch"])
    return (
        f"{saves}: these checkpoints were written with a global batch of {_batch(other)}, but this launch has "
        f"{_batch(own.about)}; {remedy}, or {start_anew}"
    )


def _batch(about: dict) -> str:
    ranks = f" (world size {about['world_size']})" if "world_size" in about else ""
    return f"{about['decisive']['system']['global_batch']} images{ranks}"


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

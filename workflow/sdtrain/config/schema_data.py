"""Schema of datasets and model components: every key with its type, default, bounds and meaning."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

from sdtrain.config.keys import key, section
from sdtrain.config.schema import DistributedConfig, LRConfig, LRParams, OptimizerConfig, OptimizerParams


# ---------------------------------------------------------------- data
@dataclass
class PackageConfig:
    name: str = key(MISSING, "Name of the npm package")
    version: str = key(MISSING, "Version")
    sha256: str = key(MISSING, "SHA-256 of the package file")


@dataclass
class TableConfig:
    kind: Literal["files", "hub", "emoji"] = key(
        "files", "`files`: tables by path or URL. `hub`: a dataset repository. `emoji`: the demo's two npm packages"
    )
    path: str | None = key(None, "files: a Parquet, CSV, TSV or JSONL file, a folder or a glob")
    sha256: str | None = key(None, "files: SHA-256 of a single file")
    repo: str | None = key(None, "hub: `owner/name`")
    revision: str | None = key(None, "hub: a commit")
    patterns: list[str] = key(["*.parquet"], "hub: files to download, as shell patterns")
    columns: dict[str, str] = key({}, "Name here → name in the table; `url` and `caption` are required")
    images: PackageConfig | None = key(None, "emoji: package of the images")
    captions: PackageConfig | None = key(None, "emoji: package of the names")


@dataclass
class HeldOutConfig:
    column: str = key("url", "Rows with the same value in this column are in the same split")
    fraction: float = key(0.0, "Share of the held-out split", ge=0, lt=1)
    seed: int = key(0, "Seed of the split")


@dataclass
class SizeConfig:
    """Columns from which the download size is estimated; columns that the table lacks are ignored."""

    bytes: str | None = key(None, "Column with the size of each file in bytes")
    width: str = key("original_width", "Column with the width in pixels")
    height: str = key("original_height", "Column with the height in pixels")
    bytes_per_pixel: float = key(0.25, "Assumed bytes per pixel of a JPEG on the web", ge=0)
    bytes_per_image: int = key(150_000, "Assumed size if no column gives it", ge=0)


@dataclass
class SelectConfig:
    """Which samples of a table or of existing shards to use: the filters, then the other keys in this order."""

    filters: dict[str, Any] = key({}, "Column → predicate, or a list of predicates")
    deduplicate: str | None = key(None, "Column: of rows with the same value, only the first is kept. Tables only")
    rows: int | None = key(None, "Number of rows to draw at random. Default: all. Tables only", ge=1)
    seed: int = key(0, "Seed of this draw")
    held_out: HeldOutConfig = section(HeldOutConfig)
    size: SizeConfig = section(SizeConfig)


@dataclass
class ShardsConfig:
    path: str | None = key(
        None, "Existing shards (braces, globs, `s3://…`, `pipe:`, a manifest); nothing is downloaded then"
    )
    held_out_path: str | None = key(None, "Existing held-out shards: the reference of the metrics")
    parts: int = key(1, "Partitions of the training split: one job each", ge=1)
    samples_per_shard: int = key(10000, "Samples per shard", ge=1)
    image_size: int = key(512, "img2dataset: size in pixels; see `resize_mode`", ge=1)
    resize_mode: str = key("keep_ratio", "img2dataset: how images are resized")
    encode_quality: int = key(95, "img2dataset: quality of the encoded images")
    encode_format: Literal["jpg", "png", "webp"] = key("jpg", "img2dataset: format of the encoded images")
    skip_reencode: bool = key(False, "Keep the original bytes of images that need no resizing")
    min_image_size: int = key(0, "Smallest shorter side in pixels", ge=0)
    max_aspect_ratio: float | None = key(None, "Largest ratio of the longer to the shorter side", ge=1)
    columns: list[str] = key([], "Columns of the table to store in the JSON of each sample")
    processes: int = key(2, "Download processes per job", ge=1)
    threads: int = key(32, "Download threads per process", ge=1)
    timeout: int = key(10, "Seconds to wait for a server", ge=1)
    retries: int = key(1, "Further attempts for a failed download", ge=0)
    user_agent_token: str | None = key(None, "Name to send to the servers in the user agent")
    disallowed_header_directives: list[str] = key(
        ["noai", "noimageai", "noindex", "noimageindex"], "X-Robots-Tag directives whose images are not downloaded"
    )
    options: dict[str, Any] = key({}, "Any other option of img2dataset")
    min_success_rate: float = key(0.5, "Share of successful downloads below which the job fails", ge=0, le=1)


@dataclass
class ExistingShardsConfig:
    """What the rules for existing shards read: the shards, and which of their samples to use."""

    path: str = key(MISSING, "See `shards.path`")
    held_out_path: str | None = key(None, "See `shards.held_out_path`")
    samples_per_shard: int = key(10000, "See `shards.samples_per_shard`", ge=1)
    select: SelectConfig = section(SelectConfig)


@dataclass
class LatentsConfig:
    crop: Literal["center", "random"] = key("center", "Crop of the images")
    posterior: Literal["mean", "sample", "moments"] = key(
        "mean", "What to store of the VAE's posterior: its mean, one sample, or mean and standard deviation"
    )
    seed: int = key(0, "Seed of random crops and samples")
    text_encoder: str | None = key(None, "Component whose token states of the captions to store as well")
    batch_size: int = key(16, "Images per batch", ge=1)
    workers: int = key(2, "Processes per rank that decode images", ge=0)


@dataclass
class DataConfig:
    """`configs/data/{dataset}.yaml`."""

    table: TableConfig = section(TableConfig)
    select: SelectConfig = section(SelectConfig)
    shards: ShardsConfig = section(ShardsConfig)
    latents: LatentsConfig = section(LatentsConfig)


# ---------------------------------------------------------------- components
@dataclass
class AutoencoderLoss:
    """Weights of the terms of the loss; a term of weight 0 is not computed."""

    l1: float = key(1.0, "Weight of the L1 error", ge=0)
    l2: float = key(2.0, "Weight of the squared error", ge=0)
    low_pass: float = key(1.0, "Weight of the L1 error of the image averaged over 4×4 blocks", ge=0)
    gradient: float = key(1.0, "Weight of the L1 error of horizontal and vertical differences", ge=0)
    chroma: float = key(1.0, "Weight of the L1 error of R-G and B-G", ge=0)
    kl: float = key(1.0e-4, "Weight of the KL divergence of the posterior", ge=0)
    perceptual: float = key(0.0, "Weight of 1 - cosine of the images' features", ge=0)
    perceptual_network: str | None = key(None, "Folder of the image network of these features, a component")


@dataclass
class AutoencoderConfig:
    """How `train_autoencoder` makes a component; sections and keys of a stage have the same meaning here."""

    data: str = key(MISSING, "Dataset: `configs/data/{data}.yaml`", decides=False)
    resolution: int = key(64, "Side of the images in pixels", ge=1)
    num_examples_to_see: int = key(MISSING, "Images of the whole training", ge=1)
    batch_size: int = key(16, "Images per rank and step", ge=1, decides=False)
    optimizer: OptimizerConfig = section(
        lambda: OptimizerConfig(params=OptimizerParams(learning_rate=2.0e-3, beta2=0.99))
    )
    lr_scheduler: LRConfig = section(
        lambda: LRConfig(
            scheduler="CosineWithWarmup",
            # relative, because this section is also part of a component's entry
            params=LRParams(learning_rate="${...optimizer.params.learning_rate}", warmup_length=100),  # type: ignore[arg-type]
        )
    )
    ema_decay: float = key(0.999, "EMA decay per step", ge=0, le=1)
    mixed_precision: Literal["bf16"] | None = key(None, "See `model.mixed_precision`")
    save_every: int = key(
        500, "Steps between checkpoints, each with an evaluation on the held-out split", ge=1, decides=False
    )
    log_every: int = key(50, "Steps between lines of the log", ge=1, decides=False)
    max_nonfinite: int = key(5, "See `experiment.max_nonfinite`", ge=1, decides=False)
    max_rollbacks: int = key(3, "See `experiment.max_rollbacks`", ge=0, decides=False)
    wait_minutes: float = key(0.0, "See `experiment.wait_minutes`", ge=0, decides=False)
    workers: int = key(0, "Loader processes per rank", ge=0, decides=False)
    prefetch: int = key(2, "See `dataset.params.prefetch`", ge=0, decides=False)
    threads: int | None = key(None, "See `system.threads`", ge=1, decides=False)
    seed: int = key(0, "See `experiment.seed`", ge=0)
    wandb_mode: Literal["online", "offline", "disabled"] | None = key(None, "See `wandb.mode`", decides=False)
    distributed: DistributedConfig = section(DistributedConfig, decides=False)
    loss: AutoencoderLoss = section(AutoencoderLoss)
    params: dict[str, Any] = key({}, "Arguments of diffusers' `AutoencoderKL`")


@dataclass
class ComponentConfig:
    """`configs/components.yaml`: one entry per component."""

    source: Literal["package", "folder", "url", "hub", "train"] = key(MISSING, "Where the component comes from")
    requirement: str | None = key(None, "package: `name==version`")
    path: str | None = key(None, "package: folder or file inside it; folder: the folder; hub: a subfolder")
    url: str | None = key(None, "url: address of a file")
    sha256: str | None = key(None, "url: SHA-256 of the file")
    repo: str | None = key(None, "hub: `owner/name`")
    revision: str | None = key(None, "hub: a commit, 40 hexadecimal digits")
    patterns: list[str] = key([], "Files to take, as shell patterns. Default: all")
    settings: dict[str, Any] = key({}, "JSON file → keys to set in the copy of this file")
    train: AutoencoderConfig | None = key(None, "train: the training; see below")

"""What the configuration files may hold: every key with its type, its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING


# ---------------------------------------------------------------- a training stage (the seed's sections)
@dataclass
class WandbConfig:
    api_key: str | None = None  # never written to a file; prefer WANDB_API_KEY or `wandb login`
    entity: str | None = None
    mode: str | None = None  # online, offline, disabled; by default online where a key is known


@dataclass
class SystemConfig:
    gradient_accumulation: int = 1  # micro-batches a rank adds up before each optimizer step
    batch_size: Any = 32  # images per process and micro-batch; auto: the most that fits the GPU (needs global_batch)
    global_batch: int | None = None  # images an optimizer step sees on all ranks; gradient_accumulation follows from it
    workers: int = 6  # loader processes per rank
    channels_last: bool = False  # memory format of the UNet and the VAE: faster convolutions on recent GPUs
    peak_tflops: float | None = None  # of one device at the training's precision, for MFU; known for common GPUs
    threads: int | None = None  # torch threads per process; by default torch's own choice
    dist_backend: str | None = "${distributed.dist_backend}"
    dist_url: str = "${distributed.dist_url}"


@dataclass
class DistributedConfig:
    dist_backend: str | None = None  # by default nccl where CUDA is, else gloo
    dist_url: str = "env://"
    strategy: str = "ddp"  # or fsdp: weights, gradients, optimizer and average sharded over the ranks
    timeout_minutes: float = 30.0  # for a rank that hangs
    world_size: int | None = None  # what was planned; any other number of ranks is refused


@dataclass
class ExperimentConfig:
    log_dir: str = MISSING
    project: str = MISSING
    name: str = MISSING
    num_examples_to_see: int = MISSING
    milestones: list[int] = field(default_factory=list)  # images seen at which the workflow exports and measures
    stop_at: int | None = None  # end this job at that milestone; the schedule still spans the whole stage
    save_every: int = 2000  # optimizer steps between rolling checkpoints
    save_only_most_recent: bool = True  # keep the last keep_checkpoints and those of milestones; otherwise all
    keep_checkpoints: int = 2
    max_nonfinite: int = 5  # steps in a row with a non-finite loss or gradient; then back to the last checkpoint
    max_rollbacks: int = 3  # times back to one checkpoint before the training gives up
    requeue: bool = True  # go on from the folder's checkpoint; without it, start anew
    wait_minutes: float = 0.0  # for another process that is training in the folder, before giving up
    eval_caption_file: str | None = None  # captions, one a line or in a CSV's caption column, drawn at every save
    num_eval_images: int = 8
    eval_steps: int = 25  # of that grid's sampler
    eval_guidance_scale: float = 5.0
    log_every: int = 10  # optimizer steps between log lines
    seed: int = 0


@dataclass
class OptimizerParams:
    learning_rate: float = 1.0e-4
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    epsilon: float = 1.0e-8


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    params: OptimizerParams = field(default_factory=OptimizerParams)
    max_grad_norm: float | None = 1.0
    fused: bool = True  # one kernel for each weight's whole update: several times faster, equal to float tolerance


@dataclass
class PartConfig:
    """One part of the model: the folder or hub address of a pretrained one, or a class and its arguments."""

    pretrained: str | None = None
    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class EmaConfig:
    path: str | None = None  # a pretrained moving average to start from (a UNet folder)
    decay: float = 0.9999
    half_life: int | None = None  # in images, in place of decay: the same average at any batch size
    warmup: bool = True  # the decay starts low, so that early averages forget the initial weights


@dataclass
class LoraConfig:
    rank: int | None = None  # train low-rank additions of that rank to the UNet's weights, and nothing else
    alpha: float | None = None  # their scale is alpha / rank; by default 1
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


@dataclass
class ModelConfig:
    pretrained: str | None = None  # a whole pipeline to fine-tune; parts named below replace its parts
    vae: PartConfig = field(default_factory=PartConfig)
    text_encoder: PartConfig = field(default_factory=PartConfig)
    tokenizer: PartConfig = field(default_factory=PartConfig)
    scheduler: PartConfig = field(default_factory=PartConfig)
    unet: PartConfig = field(default_factory=PartConfig)
    use_ema: bool = False
    ema: EmaConfig = field(default_factory=EmaConfig)
    mixed_precision: str | None = None  # bf16, or none
    gradient_checkpointing: bool = False
    xformers: bool = False
    attention: str | None = None  # torch's kernel: flash, efficient, cudnn or math; by default its own choice
    compile: str | None = None  # model: the UNet whole; blocks: each block, in a fraction of the compile time
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ObjectiveConfig:
    timesteps: str = "uniform"  # or stratified: one from each equal slice of the schedule; or logit_normal
    logit_mean: float = 0.0  # of logit_normal timesteps
    logit_std: float = 1.0
    offset_noise: float = 0.0  # standard deviation of a further noise that is one value a channel
    snr_gamma: float | None = None  # min-SNR-gamma loss weights
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance


@dataclass
class DatasetParams:
    path: str = MISSING  # a manifest.json; or shards, or tables, in brace notation: paths, s3://, pipe: commands
    batch_size: Any = "${system.batch_size}"
    workers: int = "${system.workers}"  # type: ignore[assignment]
    num_examples_to_see: int = "${experiment.num_examples_to_see}"  # type: ignore[assignment]
    columns: dict[str, str] = field(default_factory=dict)  # tables: our name (image, caption) -> theirs
    resolution: int = 512  # pixels a side
    crop: str = "center"  # or random
    flip: bool = False  # mirror half of the images
    filters: dict[str, Any] | None = None  # metadata predicates, the seed's notation
    idx_to_prompt: str | None = None  # JSON: class index -> prompt
    window: int = 64  # shards that are shuffled together
    max_lost: float = 0.1  # share of unreadable samples, and of incomplete ones, above which the training ends
    prefetch: int = 2  # batches that a thread keeps ready, pinned where CUDA is
    cache: str | None = None  # folder for copies and indices of remote shards and tables; by default a temporary one


@dataclass
class DatasetConfig:
    type: str = "WebDataset"  # WebDataset, ClassificationWebDataset, ParquetDataset, CSVDataset, LatentDataset
    params: DatasetParams = field(default_factory=DatasetParams)


@dataclass
class LRParams:
    learning_rate: float = "${optimizer.params.learning_rate}"  # type: ignore[assignment]
    warmup_length: int = 500  # optimizer steps
    decay_from: float = 0.0  # share of the stage after which the cosine falls
    final: float = 0.0  # share of the learning rate left at the end of the cosine


@dataclass
class LRConfig:
    scheduler: str = "ConstantWithWarmup"  # or CosineWithWarmup
    params: LRParams = field(default_factory=LRParams)


@dataclass
class StageConfig:
    """What one training needs and nothing else: the file that `train.py config=…` reads."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    lr_scheduler: LRConfig = field(default_factory=LRConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    init: str | None = None  # a stage of the same run, or the folder of a finished pipeline, to start from
    init_weights: str = "ema"  # which of its weights: ema, the moving average where there is one, or raw
    frozen: str | None = None  # the workflow's mark: the fingerprint of this file as it was planned


# ---------------------------------------------------------------- a run: stages and their evaluation
@dataclass
class EvaluationConfig:
    prompts: str | None = (
        None  # text file of prompts for the metrics, one a line; by default the dataset's own captions
    )
    num_images: int = 1000
    batch_size: int = 16
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    seed: int = 0
    grid: list[str] = field(
        default_factory=list
    )  # prompts of the report's grid; by default the first of the dataset's captions
    held_out_grid: int = 16  # held-out captions in the report's second grid
    features: str = "inception"  # image network of the Frechet distance: a component
    alignment: str | None = None  # clip-score model: a component; or "fitted", a linear map of the features


@dataclass
class RunConfig(StageConfig):
    """`configs/{run}.yaml`: the seed's sections for every stage, what differs in each, and the evaluation."""

    data: str | None = None  # configs/data/{data}.yaml
    stages: dict[str, Any] = MISSING
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


# ---------------------------------------------------------------- data
@dataclass
class PackageConfig:
    name: str = MISSING
    version: str = MISSING
    sha256: str = MISSING


@dataclass
class TableConfig:
    kind: str = "files"  # files: tables on disk or by URL; hub: a dataset repository; emoji: two npm packages
    path: str | None = None  # files: a parquet, CSV, TSV or JSONL file, a folder or a glob
    sha256: str | None = None  # files: of a single file
    repo: str | None = None  # hub: owner/name
    revision: str | None = None  # hub: a commit
    patterns: list[str] = field(default_factory=lambda: ["*.parquet"])
    columns: dict[str, str] = field(default_factory=dict)  # our name: theirs (url and caption are needed)
    images: PackageConfig | None = None  # emoji
    captions: PackageConfig | None = None  # emoji


@dataclass
class HeldOutConfig:
    column: str = "url"  # rows that share its value stay on one side
    fraction: float = 0.0
    seed: int = 0


@dataclass
class SizeConfig:
    """What the expected download size is estimated from; a column that the table lacks is passed over."""

    bytes: str | None = None  # a column with each file's bytes
    width: str = "original_width"  # columns of pixels
    height: str = "original_height"
    bytes_per_pixel: float = 0.25  # of a JPEG on the web
    bytes_per_image: int = 150_000  # where a row says nothing


@dataclass
class SelectConfig:
    """Which samples, whether they come from a table or from shards that exist: filters, then the rest in this order."""

    filters: dict[str, Any] = field(default_factory=dict)  # column -> predicate, or list of predicates
    deduplicate: str | None = None  # a column, such as url: of rows with one value the first is kept (tables only)
    rows: int | None = None  # this many at random (tables only)
    seed: int = 0  # of that choice
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    size: SizeConfig = field(default_factory=SizeConfig)


@dataclass
class ShardsConfig:
    path: str | None = (
        None  # shards that exist already (braces, globs, s3://, pipe:, a manifest): nothing is downloaded
    )
    held_out_path: str | None = None  # shards that exist already, never trained on: the metrics' reference
    parts: int = 1  # jobs that share the training side's work
    samples_per_shard: int = 10000
    image_size: int = 512  # this and the rest: of img2dataset
    resize_mode: str = "keep_ratio"
    encode_quality: int = 95
    encode_format: str = "jpg"  # or png, webp
    skip_reencode: bool = False  # keep the bytes of images that need no resizing
    min_image_size: int = 0  # pixels of the shorter side
    max_aspect_ratio: float | None = None
    columns: list[str] = field(default_factory=list)  # columns of the table kept in each sample's JSON
    processes: int = 2
    threads: int = 32
    timeout: int = 10  # seconds
    retries: int = 1
    user_agent_token: str | None = None  # how to name oneself to the servers
    disallowed_header_directives: list[str] = field(
        default_factory=lambda: ["noai", "noimageai", "noindex", "noimageindex"]
    )  # X-Robots-Tag: images so marked are left alone
    options: dict[str, Any] = field(default_factory=dict)  # any other option of img2dataset
    min_success_rate: float = 0.5


@dataclass
class ExistingShardsConfig:
    """What the rules for shards that exist read: which, and which of their samples."""

    path: str = MISSING
    held_out_path: str | None = None
    samples_per_shard: int = 10000
    select: SelectConfig = field(default_factory=SelectConfig)


@dataclass
class LatentsConfig:
    crop: str = "center"  # or random
    posterior: str = "mean"  # of the VAE's posterior keep its mean, one sample, or its moments: mean and deviation
    seed: int = 0  # of random crops and samples
    text_encoder: str | None = None  # a component: keep its states of the captions too
    batch_size: int = 16
    workers: int = 2  # processes that decode images, a rank


@dataclass
class DataConfig:
    """`configs/data/{dataset}.yaml`."""

    table: TableConfig = field(default_factory=TableConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)


# ---------------------------------------------------------------- components
@dataclass
class AutoencoderLoss:
    """Weights of the terms of the loss; a term of weight 0 is not computed."""

    l1: float = 1.0
    l2: float = 2.0
    low_pass: float = 1.0  # L1 of the image averaged over 4x4 blocks
    gradient: float = 1.0  # L1 of horizontal and vertical differences
    chroma: float = 1.0  # L1 of R-G and B-G
    kl: float = 1.0e-4
    perceptual: float = 0.0  # 1 - cosine of the images' features
    perceptual_network: str | None = None  # whose: the folder of an image network, a component


@dataclass
class AutoencoderConfig:
    """How `train_autoencoder` makes a component; sections and keys that a stage has too mean the same."""

    data: str = MISSING  # configs/data/{data}.yaml
    resolution: int = 64  # pixels a side
    num_examples_to_see: int = MISSING
    batch_size: int = 16  # images per process; those of all processes together are an optimizer step
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(params=OptimizerParams(learning_rate=2.0e-3, beta2=0.99))
    )
    lr_scheduler: LRConfig = field(
        default_factory=lambda: LRConfig(
            scheduler="CosineWithWarmup",
            # the nearest section of that name: this one lies inside a component's entry too
            params=LRParams(learning_rate="${...optimizer.params.learning_rate}", warmup_length=100),
        )
    )
    ema_decay: float = 0.999
    mixed_precision: Literal["bf16"] | None = None  # type: ignore[assignment]
    save_every: int = 500  # optimizer steps between checkpoints, each with a measurement of held-out images
    log_every: int = 50
    max_nonfinite: int = 5
    max_rollbacks: int = 3
    wait_minutes: float = 0.0
    workers: int = 0  # loader processes per rank
    prefetch: int = 2
    threads: int | None = None
    seed: int = 0
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # by default online where a key is known
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    params: dict[str, Any] = field(default_factory=dict)  # of diffusers' AutoencoderKL


@dataclass
class ComponentConfig:
    """`configs/components.yaml`, one entry a component."""

    source: str = MISSING  # package, folder, url, hub or train
    requirement: str | None = None  # package: name==version
    path: str | None = None  # package: folder or file inside it; folder: the folder; hub: a subfolder
    url: str | None = None
    sha256: str | None = None  # of a url's file
    repo: str | None = None  # hub: owner/name
    revision: str | None = None  # hub: a commit, 40 hex digits
    patterns: list[str] = field(default_factory=list)  # files to take; by default all
    settings: dict[str, Any] = field(default_factory=dict)  # file -> keys to set in that JSON file of the copy
    train: AutoencoderConfig | None = None

"""Schema of a run and its training stages: every key with its type, default, bounds and meaning."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

from sdtrain.config.keys import key, section


# ---------------------------------------------------------------- a training stage
@dataclass
class WandbConfig:
    api_key: str | None = key(None, "API key. No file or log holds it; prefer `WANDB_API_KEY` or `wandb login`")
    entity: str | None = key(None, "Team or user that owns the wandb run")
    mode: Literal["online", "offline", "disabled"] | None = key(
        None, "Default: `online` if an API key is known, else `offline`. `WANDB_MODE` takes precedence"
    )


@dataclass
class SystemConfig:
    gradient_accumulation: int = key(
        1, "Micro-batches that a rank accumulates for one step. Derived from `global_batch` if that is set", ge=1
    )
    batch_size: Any = key(
        32,
        "Images of a rank's micro-batch; or `auto`, the largest that leaves a tenth of the GPU memory free (needs CUDA,"
        " `global_batch` and `ddp`)",
    )
    global_batch: int | None = key(
        None, "Images of a step over all ranks. Default: ranks × batch size × gradient accumulation", ge=1
    )
    workers: int = key(6, "Loader processes per rank; 0 loads in a thread of the training process", ge=0)
    channels_last: bool = key(False, "Use the channels-last memory format: faster convolutions on recent GPUs")
    peak_tflops: float | None = key(
        None, "Peak TFLOP/s of one device at the training precision, for the MFU in the log. Default: of common GPUs"
    )
    threads: int | None = key(None, "CPU threads of torch per process. Default: torch's own choice", ge=1)
    dist_backend: str | None = key("${distributed.dist_backend}", "See `distributed.dist_backend`")
    dist_url: str = key("${distributed.dist_url}", "See `distributed.dist_url`")


@dataclass
class DistributedConfig:
    dist_backend: str | None = key(None, "`nccl` or `gloo`. Default: `nccl` with CUDA, else `gloo`")
    dist_url: str = key("env://", "Rendezvous of `init_process_group`: `env://`, `tcp://host:port` or `file:///path`")
    strategy: Literal["ddp", "fsdp"] = key(
        "ddp", "`ddp`: each rank holds all weights. `fsdp`: weights, gradients, optimizer state and EMA are sharded"
    )
    timeout_minutes: float = key(30.0, "Minutes to wait for a rank that hangs before the training ends", gt=0)
    world_size: int | None = key(None, "Planned number of ranks; any other number is an error. Set by the workflow")


@dataclass
class ExperimentConfig:
    log_dir: str = key(MISSING, "First part of the training folder")
    project: str = key(MISSING, "Second part of the training folder; also the wandb project")
    name: str = key(MISSING, "Third part of the training folder; also the name of the wandb run")
    num_examples_to_see: int = key(
        MISSING,
        "Images of the whole training, rounded up to a full step. The learning-rate schedule spans them",
        ge=0,
        decides=True,
    )
    milestones: list[int] = key(
        [], "Images seen at which the workflow exports and evaluates. Checkpoints at milestones are never deleted"
    )
    stop_at: int | None = key(
        None, "Images seen at which this job ends and exports. The schedule still spans the whole training"
    )
    save_every: int = key(2000, "Steps between checkpoints. The end of a job and a signal save as well", ge=1)
    save_only_most_recent: bool = key(
        True, "Keep the newest `keep_checkpoints` checkpoints and those at milestones; `false` keeps all"
    )
    keep_checkpoints: int = key(2, "Number of newest checkpoints to keep", ge=1)
    max_nonfinite: int = key(
        5,
        "Consecutive steps with a non-finite loss or gradient norm (each is skipped) before the training returns to its"
        " last checkpoint",
        ge=1,
    )
    max_rollbacks: int = key(3, "Returns to the same checkpoint before the training ends with an error", ge=0)
    requeue: bool = key(True, "Resume from the newest checkpoint in the training folder; `false` starts anew")
    wait_minutes: float = key(0.0, "Minutes to wait for another process that trains in the folder", ge=0)
    eval_caption_file: str | None = key(
        None, "Captions, one per line, or a CSV file with a column `caption`. Their images are drawn at each checkpoint"
    )
    num_eval_images: int = key(8, "Number of captions of that file to draw", ge=1)
    eval_steps: int = key(25, "Sampler steps of these images", ge=1)
    eval_guidance_scale: float = key(5.0, "Classifier-free guidance scale of these images")
    log_every: int = key(10, "Steps between lines of `log.jsonl`", ge=1)
    seed: int = key(0, "Seed of the initial weights, the data order and all random draws", ge=0, decides=True)


@dataclass
class OptimizerParams:
    learning_rate: float = key(1.0e-4, "Learning rate after the warm-up", ge=0)
    beta1: float = key(0.9, "Decay of the running mean of gradients", ge=0, lt=1)
    beta2: float = key(0.98, "Decay of the running mean of squared gradients", ge=0, lt=1)
    weight_decay: float = key(0.01, "Decoupled weight decay", ge=0)
    epsilon: float = key(1.0e-8, "Added to the root of the mean square", ge=0)


@dataclass
class OptimizerConfig:
    name: Literal["adamw"] = key("adamw", "Optimizer")
    params: OptimizerParams = section(OptimizerParams)
    max_grad_norm: float | None = key(
        1.0, "Largest norm of a step's gradient over all weights and ranks; a larger gradient is scaled down", gt=0
    )
    fused: bool = key(True, "Update in one fused kernel: faster, equal within float tolerance", decides=False)


@dataclass
class PartConfig:
    """A model component: a pretrained one, or a class and its arguments."""

    pretrained: str | None = key(None, "Folder or hub address of a pretrained component, or of a pipeline with it")
    target: str | None = key(None, "Class to build, such as `UNet2DConditionModel`")
    params: dict[str, Any] = key({}, "Arguments of the class")


@dataclass
class EmaConfig:
    path: str | None = key(None, "UNet or pipeline folder to start the average from. Default: the initial weights")
    decay: float = key(0.9999, "EMA decay per step", ge=0, le=1)
    half_life: int | None = key(None, "Half-life in images, instead of `decay`: independent of the batch size", ge=1)
    warmup: bool = key(True, "Limit the decay of step k to (1 + k) / (10 + k), to forget the initial weights sooner")


@dataclass
class LoraConfig:
    rank: int | None = key(None, "Train low-rank additions of this rank to the UNet, and nothing else", ge=1)
    alpha: float | None = key(None, "The additions are scaled by alpha / rank. Default: alpha = rank")
    dropout: float = key(0.0, "Share of the additions' inputs that is dropped in training", ge=0, lt=1)
    targets: list[str] = key(["to_q", "to_k", "to_v", "to_out.0"], "Layers with additions, by the end of their names")


@dataclass
class ModelConfig:
    pretrained: str | None = key(None, "A whole pipeline to fine-tune. Components set below replace its components")
    vae: PartConfig = section(PartConfig)
    text_encoder: PartConfig = section(PartConfig)
    tokenizer: PartConfig = section(PartConfig)
    scheduler: PartConfig = section(PartConfig)
    unet: PartConfig = section(PartConfig)
    use_ema: bool = key(
        False,
        "Keep an exponential moving average (EMA) of the weights: `unet` of the export; the weights are `unet_raw`",
    )
    ema: EmaConfig = section(EmaConfig)
    mixed_precision: Literal["bf16"] | None = key(
        None, "bfloat16 products; weights, optimizer state and EMA stay float32. Default: all in float32"
    )
    gradient_checkpointing: bool = key(
        False, "Recompute activations in the backward pass: less memory, more time", decides=False
    )
    xformers: bool = key(
        False, "Use xformers' attention (`requirements/gpu.txt`). Without CUDA: torch's, with a warning", decides=False
    )
    attention: Literal["flash", "efficient", "cudnn", "math"] | None = key(
        None, "Kernel of torch's attention, tried at the start. Default: torch's own choice", decides=False
    )
    compile: Literal["model", "blocks"] | None = key(
        None, "Compile the whole UNet, or each block, which compiles faster. Default: no compilation", decides=False
    )
    lora: LoraConfig = section(LoraConfig)


@dataclass
class ObjectiveConfig:
    timesteps: Literal["uniform", "stratified", "logit_normal"] = key(
        "uniform", "Distribution of timesteps; `stratified` draws one from each equal slice of the schedule per batch"
    )
    logit_mean: float = key(0.0, "Mean of the logits of `logit_normal` timesteps; above 0 means more noise")
    logit_std: float = key(1.0, "Standard deviation of these logits", ge=0)
    offset_noise: float = key(0.0, "Standard deviation of additional noise that is constant per channel", ge=0)
    snr_gamma: float | None = key(None, "Gamma of min-SNR loss weights. Default: equal weights", ge=0)
    caption_dropout: float = key(
        0.1, "Share of captions replaced by the empty caption, for classifier-free guidance", ge=0, le=1
    )


@dataclass
class DatasetParams:
    path: str = key(
        MISSING,
        "A `manifest.json`, or shards or tables: a path, braces, a glob, `s3://…`, `pipe:command`",
        decides=False,
    )
    batch_size: Any = key("${system.batch_size}", "Must equal `system.batch_size`", decides=False)
    workers: int = key("${system.workers}", "Loader processes per rank", ge=0, decides=False)
    num_examples_to_see: int = key(
        "${experiment.num_examples_to_see}", "Must equal `experiment.num_examples_to_see`", decides=False
    )
    columns: dict[str, str] = key({}, "Tables: columns of `image` and `caption`. Default: found by their usual names")
    resolution: int = key(512, "Side in pixels. Images are resized by their shorter side and cropped", ge=1)
    crop: Literal["center", "random"] = key("center", "Crop of images; latents are cropped when they are computed")
    flip: bool = key(False, "Mirror half of the images at random. Not for latents")
    filters: dict[str, Any] | None = key(
        None, 'Metadata field → predicate, such as `"<=0.5"`, or a list of them. Samples without the field are dropped'
    )
    idx_to_prompt: str | None = key(None, "JSON file from class to prompt: an object or a list")
    window: int = key(64, "Shards whose samples are shuffled together", ge=1)
    max_lost: float = key(
        0.1, "Share of unreadable, or of incomplete, samples above which the training ends", ge=0, le=1, decides=False
    )
    prefetch: int = key(
        2, "Batches that a thread keeps ready, in pinned memory with CUDA; 0: none", ge=0, decides=False
    )
    cache: str | None = key(
        None, "Folder for local copies and indices of remote shards and tables. Default: temporary", decides=False
    )


@dataclass
class DatasetConfig:
    type: Literal["WebDataset", "ClassificationWebDataset", "ParquetDataset", "CSVDataset", "LatentDataset"] = key(
        "WebDataset", "Tars of images with captions or with classes, tables of images, or precomputed latents"
    )
    params: DatasetParams = section(DatasetParams)


@dataclass
class LRParams:
    learning_rate: float = key("${optimizer.params.learning_rate}", "Learning rate after the warm-up", ge=0)
    warmup_length: int = key(500, "Steps of the linear warm-up", ge=0)
    decay_from: float = key(0.0, "Share of the training after which the cosine decay begins", ge=0, le=1)
    final: float = key(0.0, "Share of the learning rate at the end of the cosine decay", ge=0, le=1)


@dataclass
class LRConfig:
    scheduler: Literal["ConstantWithWarmup", "CosineWithWarmup"] = key("ConstantWithWarmup", "Schedule")
    params: LRParams = section(LRParams)


@dataclass
class StageConfig:
    """The configuration of one training: the file that `train.py config=…` reads."""

    wandb: WandbConfig = section(WandbConfig, decides=False)
    system: SystemConfig = section(SystemConfig, decides=False)
    distributed: DistributedConfig = section(DistributedConfig, decides=False)
    experiment: ExperimentConfig = section(ExperimentConfig, decides=False)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    lr_scheduler: LRConfig = section(LRConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    init: str | None = key(
        None, "Pipeline folder of the initial UNet weights; in the workflow also an earlier stage", decides=False
    )
    init_weights: Literal["ema", "raw"] = key("ema", "Weights of that folder to read; its pipeline samples with `ema`")
    frozen: str | None = key(None, "Fingerprint of the planned stage. Set by the workflow; leave it out", decides=False)


# ---------------------------------------------------------------- a run
@dataclass
class EvaluationConfig:
    prompts: str | None = key(None, "Text file of prompts, one per line. Default: captions of the dataset")
    num_images: int = key(1000, "Number of images to generate for the metrics", ge=1)
    batch_size: int = key(16, "Images per batch", ge=1)
    guidance_scale: float = key(7.5, "Classifier-free guidance scale")
    num_inference_steps: int = key(50, "Sampler steps", ge=1)
    seed: int = key(0, "Seed of the generated images")
    grid: list[str] = key([], "Prompts of the report's image grid. Default: the first captions of the dataset")
    held_out_grid: int = key(16, "Number of held-out captions in the report's second grid", ge=0)
    features: str = key("inception", "Component: the image network of the Frechet distance")
    alignment: str | None = key(None, 'Component: the CLIPScore model; or "fitted", a linear map of the features')


@dataclass
class RunConfig(StageConfig):
    """`configs/{run}.yaml`: sections of all stages, the keys that differ in each stage, and the evaluation."""

    data: str | None = key(None, "Dataset: `configs/data/{data}.yaml`")
    stages: dict[str, Any] = key(MISSING, "Stage name → the keys of this page that differ from the run's, in order")
    evaluation: EvaluationConfig = section(EvaluationConfig)

"""Train the UNet of a latent diffusion model up to a milestone of images seen.

By hand:  torchrun --nproc_per_node N workflow/scripts/train.py config=path/to/yaml dataset.params.path=path/to/shards
The same command resumes from the last checkpoint. Results are in log_dir/project/name: log.jsonl, samples/,
{images}/train.json, {images}/pipeline, and pipeline, a link to the newest. SIGTERM, SIGUSR1 and Ctrl-C save a
checkpoint at the next step and end with exit code 75; the file `requeue` in the folder then asks for a new start.
"""

import contextlib
import sys

from omegaconf import OmegaConf

from sdtrain import distributed
from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.training import checkpoint
from sdtrain.training.diffusion_task import DiffusionTask
from sdtrain.training.loop import train


def main(argv: list[str]) -> None:
    cfg, _ = command_line(argv, schema.StageConfig, __doc__)
    # open-diffusion has these two keys in `system` as well
    backend = {"dist_backend": cfg.system.dist_backend, "dist_url": cfg.system.dist_url}
    with distributed.joined(OmegaConf.merge(cfg.distributed, backend)) as (here, device, stop):
        task = DiffusionTask(cfg)
        with checkpoint.lock(task.folder, cfg.experiment.wait_minutes) if here.is_main else contextlib.nullcontext():
            finished = train(task, here, device, stop)
    if not finished:
        sys.exit(distributed.STOPPED)


if __name__ == "__main__":
    main(sys.argv)

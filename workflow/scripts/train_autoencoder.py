"""Train a KL autoencoder and export it as a component: the folder beside `output`, and `output`, its record, last.

On several processes:  torchrun --nproc_per_node N workflow/scripts/train_autoencoder.py config=… train=… …
The same command resumes from the last checkpoint. Beside the component, training/{name} holds checkpoints/, log.jsonl
and samples/, pairs of a held-out image and its reconstruction. SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint at the
next step and end with exit code 75; the file `requeue` there then asks for a new start.
"""

import contextlib
import sys
from pathlib import Path

from sdtrain import distributed
from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.training import checkpoint
from sdtrain.training.autoencoder_task import AutoencoderTask
from sdtrain.training.loop import train


def main(argv: list[str]) -> None:
    settings, own = command_line(argv, schema_data.AutoencoderConfig, __doc__, train=None, held_out=None, output=None)
    with distributed.joined(settings.distributed) as (here, device, stop):
        task = AutoencoderTask(settings, own["train"], own["held_out"], Path(own["output"]))
        with checkpoint.lock(task.folder, settings.wait_minutes) if here.is_main else contextlib.nullcontext():
            finished = train(task, here, device, stop)
    if not finished:
        sys.exit(distributed.STOPPED)


if __name__ == "__main__":
    main(sys.argv)

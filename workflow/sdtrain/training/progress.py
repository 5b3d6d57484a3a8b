"""Training counters that are saved in checkpoints, and the losses since the last log line."""

from __future__ import annotations

import torch

from sdtrain.training.checkpoint import CheckpointError, Checkpoints

COUNTS = (
    "updates",  # optimizer steps taken
    "skipped",  # steps whose loss or gradient norm was not finite, in all
    "in_a_row",  # of those, the ones since the last update
    "moved",  # images of the stream that rollbacks skipped
    "rollbacks",  # in all
    "tries",  # rollbacks since the last update
    "lost",  # unreadable samples that other samples replaced
)


class Progress:
    """Counters of a training, the same on all ranks, and float64 sums of `kinds` losses and of their images."""

    def __init__(self, kinds: int = 1):
        self.counts = {name: torch.zeros((), dtype=torch.int64) for name in COUNTS}
        self.window = {name: torch.zeros(kinds, dtype=torch.float64) for name in ("losses", "images")}

    @property
    def state(self) -> dict:
        """Return the tensors that a checkpoint holds."""
        return {"progress": self.counts, "window": self.window}

    def __getitem__(self, name: str) -> int:
        return int(self.counts[name])

    def learn(self, losses: list[float], images: list[float]) -> None:
        """Count an optimizer step, with the sums of its losses and the images of each sum, over all ranks."""
        self.window["losses"] += torch.tensor(losses, dtype=torch.float64)
        self.window["images"] += torch.tensor(images, dtype=torch.float64)
        self.counts["in_a_row"].zero_()
        self.counts["tries"].zero_()
        self.counts["updates"] += 1

    def skip(self) -> None:
        """Count a skipped step: its loss or gradient norm is not finite."""
        self.counts["skipped"] += 1
        self.counts["in_a_row"] += 1

    def take_losses(self) -> tuple[float, list[float]]:
        """Return the mean loss since the last call, and that of each kind; NaN without images."""
        losses, images = self.window["losses"].clone(), self.window["images"].clone()
        for tensor in self.window.values():
            tensor.zero_()
        return (losses.sum() / images.sum()).item(), (losses / images).tolist()

    def roll_back(self, checkpoints: Checkpoints, images: int, limit: int) -> int:
        """Load the newest checkpoint at `images` images seen; training continues with the data that follow.

        Return the images seen at the checkpoint. Raise CheckpointError after `limit` rollbacks without an update.
        """
        checkpoints.finish()
        back = checkpoints.newest
        assert back is not None, "a checkpoint was written or loaded before the first step"
        kept = {name: self[name] for name in ("skipped", "moved", "rollbacks", "tries", "lost")}
        if kept["tries"] >= limit:
            raise CheckpointError(
                f"non-finite losses after {limit} rollbacks to the checkpoint at {back:,} images; lower "
                "optimizer.params.learning_rate, or look for damaged samples"
            )
        checkpoints.load(back)
        kept |= {"moved": kept["moved"] + images - back, "tries": kept["tries"] + 1, "in_a_row": 0}
        kept["rollbacks"] += 1
        for name, value in kept.items():
            self.counts[name].fill_(value)
        return back

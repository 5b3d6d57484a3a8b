"""What a training has behind it: counts, and the losses since its last log line, as live tensors of its checkpoints."""

from __future__ import annotations

import torch

from sdtrain.training.checkpoint import CheckpointError, Checkpoints

COUNTS = (
    "updates",  # optimizer steps taken
    "skipped",  # steps whose loss or gradient norm was not finite, in all
    "in_a_row",  # of those, the ones since the last update
    "moved",  # images of the stream that rollbacks left behind
    "rollbacks",  # in all
    "tries",  # rollbacks since the last update
    "lost",  # unreadable samples that others stood in for
)


class Progress:
    """Counts of a training, the same on all ranks, and sums of `kinds` losses with their numbers of images, float64."""

    def __init__(self, kinds: int = 1):
        self.counts = {name: torch.zeros((), dtype=torch.int64) for name in COUNTS}
        self.window = {name: torch.zeros(kinds, dtype=torch.float64) for name in ("losses", "images")}

    @property
    def state(self) -> dict:
        """The part of a checkpoint's state."""
        return {"progress": self.counts, "window": self.window}

    def __getitem__(self, name: str) -> int:
        return int(self.counts[name])

    def learn(self, losses: list[float], images: list[float]) -> None:
        """A step has been taken: sums of its losses, and how many images each sum is over, over all ranks."""
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
        """The mean loss since the last call, and that of each kind; NaN without images."""
        losses, images = self.window["losses"].clone(), self.window["images"].clone()
        for tensor in self.window.values():
            tensor.zero_()
        return (losses.sum() / images.sum()).item(), (losses / images).tolist()

    def roll_back(self, checkpoints: Checkpoints, images: int, limit: int) -> int:
        """At `images` images seen, load the newest checkpoint again, and move its data on to what follows now.

        Returns the images seen there. Raises CheckpointError after `limit` returns without an update since.
        """
        checkpoints.finish()
        back = checkpoints.newest
        kept = {name: self[name] for name in ("skipped", "moved", "rollbacks", "tries", "lost")}
        if kept["tries"] >= limit:
            raise CheckpointError(
                f"non-finite losses after {limit} returns to the checkpoint at {back:,} images; lower "
                "optimizer.params.learning_rate, or look for damaged samples"
            )
        checkpoints.load(back)
        kept |= {"moved": kept["moved"] + images - back, "tries": kept["tries"] + 1, "in_a_row": 0}
        kept["rollbacks"] += 1
        for name, value in kept.items():
            self.counts[name].fill_(value)
        return back

"""Fit a linear map from image features to caption embeddings on the training images; test it on the held-out ones.

It replaces a CLIP model if there is none. Its score is called an alignment score, never CLIPScore.
"""

import json
import sys

from sdtrain.config.cli import command_line, positive
from sdtrain.config.fingerprint import code_digest
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.alignment import fit_alignment


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = ("features", "text", "manifest", "held_out", "output")
    _, own = command_line(argv, None, __doc__, **dict.fromkeys(keys), resolution="128")
    with one_line_errors():
        resolution = positive(own["resolution"], "resolution")
        folders, manifests = (own["features"], own["text"]), (own["manifest"], own["held_out"])
        alignment, count, record = fit_alignment(*folders, *manifests, resolution)
        alignment.save(own["output"], {"held_out": json.dumps(record), "code": code_digest()})
    print(
        f"{own['output']}: {alignment.name}, fitted on {count:,} images; on {record['images']:,} held-out "
        f"ones R@1 {record['retrieval']:.2f}, score {record['value']:.1f} matched, {record['shuffled']:.1f} shuffled"
    )


if __name__ == "__main__":
    main(sys.argv)

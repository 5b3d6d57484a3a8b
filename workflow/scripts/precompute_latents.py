"""Encode the images of a manifest into latent shards, with captions and metadata beside them.

images= is the manifest of the images, vae= the folder of a component, resolution= pixels a side. With text_encoder=,
the folder of another component, the text encoder's states of the captions are kept too. Any number of ranks share the
shards: start it by torchrun, by srun --kill-on-bad-exit, or directly. After a kill, only missing shards are encoded.
"""

import sys
from pathlib import Path

from sdtrain import distributed
from sdtrain.config import schema_data
from sdtrain.config.cli import command_line, positive
from sdtrain.data.latents import precompute
from sdtrain.errors import one_line_errors


def main(argv: list[str]) -> None:
    """Run the command."""
    keys = {"vae": None, "text_encoder": "", "resolution": None, "images": None, "output": None}
    settings, own = command_line(argv, schema_data.LatentsConfig, __doc__, **keys)
    here, output = distributed.world(), Path(own["output"])
    component = f"resources/components/{settings.text_encoder}" if settings.text_encoder else None
    with one_line_errors("" if here.is_main else f"rank {here.rank}: "):
        resolution, text = positive(own["resolution"], "resolution"), own["text_encoder"] or component
        manifest = precompute(settings, own["vae"], text, resolution, own["images"], output)
    if manifest:
        checks = manifest["checks"]
        for warning in checks["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        found = f"mean {checks['mean']:.3f}, standard deviation {checks['std']:.3f}, PSNR {checks['psnr']:.1f} dB"
        print(f"{output}: {checks['samples']:,} latents, {checks['dropped']:,} dropped, {found} (check.png)")


if __name__ == "__main__":
    main(sys.argv)

"""Fetch a table of image URLs and captions into one parquet file: from files, a dataset repository, or the demo."""

import sys
from pathlib import Path

from demo.emoji import fetch_emoji

from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.data.fetch import FORMS
from sdtrain.errors import one_line_errors


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = command_line(argv, schema_data.TableConfig, __doc__, output=None)
    forms = FORMS | {"emoji": fetch_emoji}
    with one_line_errors():
        rows = forms[config.kind](config, Path(own["output"]))
    print(f"{own['output']}: {rows:,} rows")


if __name__ == "__main__":
    main(sys.argv)

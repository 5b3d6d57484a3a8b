"""Select the rows of a table: those that pass the filters, each value once, a random subset, and a held-out split."""

import sys

from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.data.selection import select
from sdtrain.data.yields import show_selection
from sdtrain.errors import one_line_errors
from sdtrain.io.files import write_json


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = command_line(
        argv, schema_data.SelectConfig, __doc__, table=None, train=None, held_out=None, yields=None
    )
    with one_line_errors():
        result = select(config, own["table"], own["train"], own["held_out"])
        write_json(own["yields"], result)
        print(show_selection(result))


if __name__ == "__main__":
    main(sys.argv)

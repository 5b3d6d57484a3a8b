"""Show the status of a run: data, components, progress and metrics of each stage, SLURM jobs.

The command reads files and calls squeue; it changes nothing. run= names a configuration: configs/{run}.yaml.
"""

import signal
import sys

from sdtrain.config.cli import command_line
from sdtrain.errors import one_line_errors
from sdtrain.orchestration import status

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader, such as `| head`, closes the pipe
    with one_line_errors():
        _, own = command_line(sys.argv, None, __doc__, run=None)
        print("\n".join(status.show(own["run"])))

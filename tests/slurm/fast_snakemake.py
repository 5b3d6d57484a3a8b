"""Snakemake's command line that queries job states every second; the plugin would wait up to three minutes."""

import snakemake_interface_executor_plugins.executors.remote as remote

remote.RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 1, lambda self, value: None)

from snakemake.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

"""The command's entry point: groups the commands and shows our errors without a traceback."""

from __future__ import annotations

import logging
import os
import sys

import click

from eagle_target.cli.bench import bench
from eagle_target.cli.plugins import plugins
from eagle_target.cli.serve import serve
from eagle_target.cli.supervise import supervise
from eagle_target.cli.verify import verify
from eagle_target.cli.vocab import vocab
from eagle_target.errors import EagleTargetError, EngineStuck


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="eagle-target")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def cli(debug: bool) -> None:
    """Serve EAGLE-3 training supervision from a frozen target model."""


cli.add_command(serve)
cli.add_command(supervise)
cli.add_command(bench)
cli.add_command(verify)
cli.add_command(plugins)
cli.add_command(vocab)


def main() -> None:
    """Run the command; an error of ours ends it with its status and one line."""
    try:
        cli()
    except EagleTargetError as error:
        if "--debug" in sys.argv[1:]:
            raise
        click.echo(f"error: {error}", err=True)
        if isinstance(error, EngineStuck):
            # An interpreter that ends in order may wait for what the stuck thread holds, a device for one.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_status)
        sys.exit(error.exit_status)

"""The command `sl-queue`: its subcommands, and how it ends."""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sl_queue.cli import after, begin, operate, prepare, run, tables
from sl_queue.config.environment import DEBUG
from sl_queue.launch.process import leaving, showing, spare_stderr


class _Commands(TyperGroup):
    """A group of commands whose errors leave as one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with leaving(on_interrupt="interrupted; the same command resumes from the last checkpoint"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # [pipeline] is a table of the job, not a colour
    help="Split learning over RabbitMQ: train one model with layers at several parties, without moving a column.",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks, as {DEBUG.name}=1 does.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG.name] = "1"


# In the order of `sl-queue --help`.
app.command()(run.demo)
app.command()(begin.init)
app.command()(prepare.check)
app.command()(tables.features)
app.command()(tables.align)
app.command()(prepare.plan)
app.command()(prepare.cuts)
app.command()(prepare.privacy)
app.command()(run.local)
app.command()(run.compare)
app.command()(after.predict)
app.command()(after.evaluate)
app.command()(after.explain)
app.command()(after.versions)
app.command()(after.promote)
app.command()(after.export)
app.command()(operate.status)
app.command()(operate.watch)
app.command()(operate.report)
app.command()(operate.stop)
app.command()(operate.dead)
app.command()(operate.cleanup)
app.command()(prepare.key)
app.command()(prepare.provision)
app.command()(run.chaos)


def main() -> None:
    """Run the command of this process's arguments."""
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word != "--debug")  # wherever it stands, it is meant for all
    spare_stderr()
    with showing():
        app()

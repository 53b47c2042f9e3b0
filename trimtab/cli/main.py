"""The `trimtab` command: its groups, and how errors leave it."""

import sys

import typer

from trimtab.cli import doctor, jobs, local, models, processes
from trimtab.errors import TrimtabError

app = typer.Typer(
    name="trimtab",
    help="Fine-tune language models with PPO on your own machines, and see every clipped token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
local.register(app)
doctor.register(app)
jobs.register(app)
processes.register(app)
app.add_typer(models.app, name="models")


def main() -> None:
    """Run the command; a known fault is one message on stderr and its exit code."""
    try:
        app()
    except TrimtabError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text(f"trimtab: {error}"), soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

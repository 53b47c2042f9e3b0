"""`trimtab demo` and `trimtab up`: the whole service on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.errors import WrongUsage
from trimtab.home import DEMO_MODEL, SHIPPED, Home, command, models_folder

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.model_cache import Tell
    from trimtab.stack import Stack

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(demo)
    app.command()(up)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")] = Path("trimtab-demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps instead of the shipped number.")
    ] = None,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with job.json, prompts.jsonl and heldout.jsonl.",
            show_default="the shipped one",
        ),
    ] = SHIPPED,
) -> None:
    """Train the demo model with PPO, from nothing to a verified adapter.

    Starts everything, posts a real job over HTTP, shows it learn, downloads the adapter and
    compares its answers to held-out prompts with those of the base model.  Ends with 1 if the
    reward did not rise beyond the noise of that comparison.
    """
    for name in ("job.json", "prompts.jsonl", "heldout.jsonl"):
        if not (data / name).is_file():
            raise WrongUsage(f"{data} holds no {name}")
    from rich.console import Console

    from trimtab.demo import Demo
    from trimtab.stack import ending_signals

    home, models = Home.from_environment(), models_folder()
    console = Console()
    run = Demo(home=home, models=models, out=out, data=data, steps=steps, console=console)
    with ending_signals():
        try:
            is_improved = run.run()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    if not is_improved:
        raise typer.Exit(1)


def up(
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar="TRIMTAB_PORT", help="0 takes any free one.")
    ] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Jobs that may train at once.")] = 1,
) -> None:
    """Run the whole service here until Ctrl-C.

    Postgres and Valkey come along unless DATABASE_URL and REDIS_URL name others.  The first
    Ctrl-C lets running trainers save their state; a second one does not wait.
    """
    from rich.console import Console
    from rich.text import Text

    from trimtab.stack import Stack, ending_signals

    errors = Console(stderr=True)
    home = Home.from_environment()
    stack = Stack(home, port=port, num_workers=workers, tell=_teller(errors))
    with ending_signals():
        try:
            with stack:
                for line in _welcome(stack, home):
                    Console().print(Text(line), soft_wrap=True)
                stack.watch()
        except KeyboardInterrupt:
            errors.print(Text("stopped"))


def _teller(console: "Console") -> "Tell":
    from rich.text import Text

    return lambda sentence: console.print(Text(f"> {sentence}", style="dim"), soft_wrap=True)


def _welcome(stack: "Stack", home: Home) -> list[str]:
    """URL, key file and the next command."""
    from trimtab.model_cache import entries

    fetch = f"  {command('models fetch ' + DEMO_MODEL)}   (no model is here yet)"
    return [
        f"Trimtab is up at {stack.url}",
        f"API key file: {home.key_file}",
        "",
        "Next, in another terminal:",
        *([] if entries(models_folder()) else [fetch]),
        f'  export TRIMTAB_API_KEY="$(cat {home.key_file})"',
        f'  curl -H "Authorization: Bearer $TRIMTAB_API_KEY" {stack.url}/v1/models',
        "",
        "Ctrl-C stops it; jobs go on at the next start.",
    ]

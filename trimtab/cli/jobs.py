"""`trimtab submit | list | show | watch | cancel | pause | resume | download`: jobs of a server."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import Cancelled, Failed, WrongUsage
from trimtab.home import Home

if TYPE_CHECKING:
    from trimtab.client import Client

BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="Default: $TRIMTAB_BASE_URL, else the local stack."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="Default: $TRIMTAB_API_KEY, else the local stack's key."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's objects.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
Wait = Annotated[bool, typer.Option("--wait", help="Return when it is so, or the job has ended.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(submit)
    app.command("list")(show_all)
    app.command()(show)
    app.command()(watch)
    app.command()(cancel)
    app.command()(pause)
    app.command()(resume)
    app.command()(download)


def submit(
    spec: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The job as JSON.")],
    data: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Prompt file to upload.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Held-out prompts to upload.")
    ] = None,
    base_url: BaseUrl = None,
    api_key_file: KeyFile = None,
    *,
    follow: Annotated[bool, typer.Option("--watch", help="Stay and watch it.")] = False,
) -> None:
    """Post a job; its id alone goes to stdout."""
    body = _read_spec(spec)
    with _client(base_url, api_key_file) as client:
        for field, path in (("training_file", data), ("validation_file", validation)):
            if path is not None:
                body[field] = client.upload(path)["id"]
        job = client.create_job(body)
        typer.echo(job["id"])
        if follow:
            _watch(client, job)


def show_all(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    base_url: BaseUrl = None,
    api_key_file: KeyFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs."""
    with _client(base_url, api_key_file) as client:
        found = client.jobs(limit)
    if as_json:
        _print_json(found)
    else:
        from rich.console import Console

        from trimtab.views import jobs_table

        Console().print(jobs_table(found))


def show(
    job: JobId,
    base_url: BaseUrl = None,
    api_key_file: KeyFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show one job."""
    with _client(base_url, api_key_file) as client:
        found = client.job(job)
    if as_json:
        _print_json([found])
    else:
        from trimtab.views import job_lines

        _print_lines(job_lines(found))


def watch(job: JobId, base_url: BaseUrl = None, api_key_file: KeyFile = None) -> None:
    """Watch a job until it ends; Ctrl-C leaves it running."""
    with _client(base_url, api_key_file) as client:
        _watch(client, client.job(job))


def cancel(
    job: JobId, base_url: BaseUrl = None, api_key_file: KeyFile = None, *, wait: Wait = False
) -> None:
    """Cancel a job; its checkpoints stay."""
    with _client(base_url, api_key_file) as client:
        shown = client.cancel(job)
        typer.echo((client.wait_for(job) if wait else shown)["status"])


def pause(
    job: JobId, base_url: BaseUrl = None, api_key_file: KeyFile = None, *, wait: Wait = False
) -> None:
    """Let a job rest; a running one saves a checkpoint first."""
    with _client(base_url, api_key_file) as client:
        shown = client.pause(job)
        typer.echo((client.wait_for(job, "paused") if wait else shown)["status"])


def resume(
    job: JobId, base_url: BaseUrl = None, api_key_file: KeyFile = None, *, wait: Wait = False
) -> None:
    """Let a paused job go on, or withdraw a pause that has not come yet."""
    with _client(base_url, api_key_file) as client:
        shown = client.resume(job)
        typer.echo((client.wait_for(job, "running", "paused") if wait else shown)["status"])


def download(
    job: JobId,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: the id.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Default: the result, or the last checkpoint before it.")
    ] = None,
    base_url: BaseUrl = None,
    api_key_file: KeyFile = None,
) -> None:
    """Download what a job left and verify every digest; prints the folder."""
    folder = Path(job) if out is None else out
    with _client(base_url, api_key_file) as client:
        client.download(job, folder, checkpoint=checkpoint)
    typer.echo(folder)


def _watch(client: "Client", job: Mapping[str, Any]) -> None:
    """Show the job until it ends, on stderr; a job that failed is an error."""
    from rich.console import Console

    from trimtab.views import History, Point, job_lines, progress_for

    history = History(job["progress"]["total_steps"])
    with progress_for(Console(stderr=True)) as progress:
        for item in client.stream(job["id"]):
            if item["type"] == "metrics":
                history.add(Point.of(item))
                progress.show(history)
            elif item["type"] == "event":
                progress.say(item["message"])
    ended = client.job(job["id"])
    if ended["status"] == "cancelled":
        raise Cancelled(f"{ended['id']} was cancelled")
    if ended["status"] == "failed":
        raise Failed("\n".join(job_lines(ended)))


def _client(base_url: str | None, api_key_file: Path | None) -> "Client":
    """A client for the server that flags, environment or the local stack name."""
    home = Home.from_environment()
    url = base_url or os.environ.get("TRIMTAB_BASE_URL") or _first_line(home.address_file)
    key = (
        _first_line(api_key_file)
        if api_key_file
        else os.environ.get("TRIMTAB_API_KEY") or _first_line(home.key_file)
    )
    if key is None:
        raise WrongUsage("no API key: set TRIMTAB_API_KEY, or give --api-key-file")
    from trimtab.client import Client

    return Client(url or "http://127.0.0.1:8000", key)


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0].strip() or None
    except FileNotFoundError:
        return None


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WrongUsage(f"{path} is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise WrongUsage(f"{path} holds no JSON object")
    return body


def _print_json(found: Iterable[Mapping[str, Any]]) -> None:
    for item in found:
        typer.echo(json.dumps(item))


def _print_lines(lines: Iterable[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    for line in lines:
        Console().print(Text(line), soft_wrap=True)

"""`trimtab doctor`: what is missing or wrong here, each with what to do about it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

from trimtab.errors import TrimtabError
from trimtab.home import DEMO_MODEL, Home, command, models_folder

MARKS = {"good": ("✓", "green"), "doubtful": ("!", "yellow"), "bad": ("✗", "red")}
TIGHT_BYTES = 5 * 2**30
FULL_BYTES = 2**29
SERVER_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One check as it is shown."""

    check: str
    verdict: str
    found: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(doctor)


def doctor() -> None:
    """Check servers, store, models and disk; each fault with what to do.  Ends with 1 on a ✗.

    Asks the servers of DATABASE_URL and REDIS_URL, else those of the running local stack.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    is_ill = False
    for line in _lines(Home.from_environment()):
        mark, colour = MARKS[line.verdict]
        text = Text(mark, style=colour) + Text(f" {line.check}: {line.found}", style="default")
        if line.remedy:
            text += Text(f"\n    {line.remedy}")
        console.print(text, soft_wrap=True)
        is_ill = is_ill or line.verdict == "bad"
    if is_ill:
        raise typer.Exit(1)


def _lines(home: Home) -> Iterator[Line]:
    yield from _servers(home)
    yield from _store(_folder("TRIMTAB_ARTIFACTS", home.artifacts))
    yield from _disk(_folder("TRIMTAB_SCRATCH", home.scratch))
    yield from _models(models_folder())


def _folder(name: str, default: Path) -> Path:
    return Path(os.environ.get(name) or default)


def _servers(home: Home) -> Iterator[Line]:
    """What `python -m api.doctor` finds: the base install speaks to no server itself."""
    environment = _addresses(home)
    if environment is None:
        remedy = f"start them with `{command('up')}`, or set DATABASE_URL and REDIS_URL"
        yield Line(
            check="servers", verdict="doubtful", found="none are running here", remedy=remedy
        )
        return
    if importlib.util.find_spec("sqlalchemy") is None:
        remedy = "install trimtab[server] to have them checked"
        yield Line(check="servers", verdict="doubtful", found="not checked", remedy=remedy)
        return
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "api.doctor"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SERVER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        found = f"no answer within {SERVER_SECONDS} s"
        remedy = "see whether their hosts can be reached from here"
        yield Line(check="servers", verdict="bad", found=found, remedy=remedy)
        return
    if not done.stdout:
        reason = done.stderr.strip().rpartition("\n")[2] or f"code {done.returncode}"
        yield Line(check="servers", verdict="bad", found=reason, remedy="reinstall trimtab[server]")
    for line in done.stdout.splitlines():
        yield Line(**json.loads(line))


def _addresses(home: Home) -> Mapping[str, str] | None:
    """What the environment does not name of the servers: from the local stack, or None."""
    unnamed = {
        name
        for name in ("DATABASE_URL", "REDIS_URL")
        if name not in os.environ and f"{name}_FILE" not in os.environ
    }
    if not unnamed:
        return {}
    from trimtab.embedded import EmbeddedServers

    servers = EmbeddedServers(home.path)
    if not servers.home.secrets_file.exists() or not servers.is_guarded():
        return None
    points = servers.endpoints
    local = {"DATABASE_URL": points.api_url, "REDIS_URL": points.redis_url}
    return {name: local[name] for name in unnamed}


def _store(folder: Path) -> Iterator[Line]:
    """Whether results can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        remedy = f"let this user write to {folder}, or set TRIMTAB_ARTIFACTS"
        yield Line(check="store", verdict="bad", found=error.strerror or "", remedy=remedy)
        return
    yield Line(check="store", verdict="good", found=f"{folder} can be written")
    yield from _disk(folder)


def _disk(folder: Path) -> Iterator[Line]:
    """How much room there is, at the folder or the nearest one above it that exists."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free for {folder}"
    if free < FULL_BYTES:
        yield Line(check="disk", verdict="bad", found=found, remedy="make room: jobs will fail")
    elif free < TIGHT_BYTES:
        remedy = "make room soon: a checkpoint that does not fit ends its job"
        yield Line(check="disk", verdict="doubtful", found=found, remedy=remedy)
    else:
        yield Line(check="disk", verdict="good", found=found)


def _models(folder: Path) -> Iterator[Line]:
    """Whether there are models, each with the weights that its card names."""
    from trimtab.model_cache import entries

    try:
        found = entries(folder)
    except TrimtabError as error:
        yield Line(check="models", verdict="bad", found=str(error), remedy="remove that folder")
        return
    if not found:
        remedy = f"`{command('models fetch ' + DEMO_MODEL)}`"
        yield Line(check="models", verdict="doubtful", found=f"none in {folder}", remedy=remedy)
    for entry in found:
        yield _model(entry["id"], Path(entry["path"]), entry["sha256"])


def _model(name: str, folder: Path, expected: str) -> Line:
    from trimtab.model_cache import weights_sha256

    try:
        digest = weights_sha256(folder)
    except (TrimtabError, OSError) as error:
        digest = str(error)
    if digest == expected:
        return Line(check="model", verdict="good", found=f"{name} has the weights of its card")
    remedy = f"remove {folder} and fetch or add the model again; its jobs cannot be repeated"
    return Line(
        check="model",
        verdict="bad",
        found=f"{name}: its weights are not those of its card",
        remedy=remedy,
    )

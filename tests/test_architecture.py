import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "core", "ppo_engine", "trimtab", "worker")
HEAVY = ("torch", "transformers", "peft")
CORE_USERS = ("api", "worker", "migrations")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, "migrations", include_external_packages=True)


def test_every_import_contract_holds() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "modules",
    [
        "api.app, api.__main__",
        "worker.tasks, worker.supervisor, worker.dispatcher, worker.celery_app",
        "trimtab.cli.main",
        "core.jobs, core.attempts, migrations.commands",
    ],
)
def test_a_fresh_process_loads_no_torch(modules: str) -> None:
    heavy = ", ".join(repr(name) for name in HEAVY)
    script = f"import sys, {modules}; print([m for m in ({heavy}) if m in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_core_holds_only_what_both_sides_need_or_what_writes_tables(
    graph: grimp.ImportGraph,
) -> None:
    def reach(package: str) -> set[str]:
        return graph.find_upstream_modules(package, as_package=True)

    shared = reach("api") & reach("worker")
    modules = {name for name in graph.modules if name.startswith("core.")}
    writes_tables = graph.find_modules_that_directly_import("core.models")

    assert modules - shared - writes_tables - {"core.models"} == set()


def test_no_module_of_core_is_unused(graph: grimp.ImportGraph) -> None:
    used: set[str] = set()
    for package in CORE_USERS:
        used |= graph.find_upstream_modules(package, as_package=True)

    assert {name for name in graph.modules if name.startswith("core.")} - used == set()


def test_packages_say_nothing_at_import() -> None:
    said = [
        path.relative_to(ROOT)
        for package in (*PACKAGES, "migrations")
        for path in (ROOT / package).rglob("__init__.py")
        if path.read_text(encoding="utf-8").strip()
    ]

    assert said == []


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "manager", "data", "info", "misc"}
    found = [
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.stem in drawers
    ]

    assert found == []

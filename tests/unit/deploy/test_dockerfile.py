"""The Dockerfile, read line by line: no image is built here."""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.deploy import deployment
from tests.unit.deploy.deployment import MODULES, SETTINGS

TARGETS = {"api": "api", "worker": "worker"}
HEAVY = {"torch", "transformers", "peft", "safetensors", "gguf", "numpy"}
PROJECT = tomllib.loads((deployment.ROOT / "pyproject.toml").read_text(encoding="utf-8"))

each_target = pytest.mark.parametrize("target", sorted(TARGETS))


def origin_of(target: str) -> str:
    """The stage that a target takes its packages from."""
    (copied,) = [rest for rest in deployment.values(target, "COPY") if rest.startswith("--from=")]
    return copied.split()[0].removeprefix("--from=")


def installs(target: str) -> list[str]:
    """The pip commands behind a target's packages."""
    commands = deployment.values(origin_of(target), "RUN")
    return [command for command in commands if "pip install" in command]


def extras(target: str) -> set[str]:
    """The extras of ours that a target has."""
    named = re.findall(r"'\.\[([\w,]+)\]'", " ".join(installs(target)))
    return {extra for names in named for extra in names.split(",")}


def packages(chosen: set[str]) -> set[str]:
    """All packages that our distribution with these extras brings here, ours included."""
    found: set[str] = set()
    waiting = [Requirement(f"trimtab[{','.join(sorted(chosen))}]")]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        found.add(name)
        waiting += _needed_by(name, requirement.extras)
    return found


def _needed_by(name: str, chosen: set[str]) -> list[Requirement]:
    """What an installed package with these extras requires on this machine."""
    lines = map(Requirement, importlib.metadata.requires(name) or ())
    contexts = [{"extra": extra} for extra in ("", *chosen)]
    return [
        line
        for line in lines
        if line.marker is None or any(line.marker.evaluate(context) for context in contexts)
    ]


def sources() -> list[str]:
    """What the build takes from the tree."""
    copies = deployment.values("build-worker", "COPY")
    return [source for rest in copies for source in rest.split()[:-1]]


@each_target
def test_each_target_runs_its_process(target):
    assert deployment.command_of(target) == ["python", "-m", MODULES[target]]


@each_target
def test_each_target_runs_as_an_ordinary_user(target):
    assert deployment.values(target, "USER") == ["10001:10001"]
    assert deployment.stages()[target].instructions[-1].word == "CMD"
    assert any("useradd --uid 10001" in rest for rest in deployment.values(target, "RUN"))


@each_target
def test_each_target_starts_from_the_python_that_the_tests_run_with(target):
    oldest = deployment.lineage(target)[0]

    assert oldest.parent in {"python:3.11-slim", "python:3.12-slim"}


def test_the_api_has_no_engine():
    assert extras("api") == {"server"}
    assert extras("worker") == {"server", "engine"}


def test_the_servers_packages_bring_no_torch():
    server = packages({"server"})

    assert not HEAVY & server
    assert not any(name.startswith(("nvidia-", "triton")) for name in server)
    assert {"fastapi", "psycopg", "celery"} <= server
    assert packages({"server", "engine"}) >= HEAVY


@each_target
def test_each_package_has_the_version_that_the_tests_run_with(target):
    for command in installs(target):
        assert "--constraint constraints.txt" in command
        assert "--only-binary=:all:" in command


def test_another_package_index_can_be_named_and_none_is_by_default():
    arguments = deployment.values("build-worker", "ARG")

    assert arguments == ["PIP_INDEX_URL"]
    assert "://" not in (deployment.ROOT / "Dockerfile").read_text(encoding="utf-8")


@each_target
def test_packages_are_installed_with_known_options_only(target):
    """None of which names a place to take them from."""
    options = {
        word
        for command in installs(target)
        for word in command.partition("pip install")[2].split()
        if word.startswith("-")
    }

    assert options == {"--disable-pip-version-check", "--only-binary=:all:", "--constraint"}


@each_target
def test_images_hold_no_secret(target):
    assert deployment.values(target, "ARG") == []
    for name in deployment.image_environment(target):
        assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY|CREDENTIAL|_URL", name), name


@each_target
def test_images_write_no_bytecode_when_they_run(target):
    assert deployment.image_environment(target)["PYTHONDONTWRITEBYTECODE"] == "1"


@each_target
def test_each_variable_of_an_image_is_a_setting_of_its_process(target):
    known = {str(field.validation_alias) for field in SETTINGS[target].model_fields.values()}

    ours = {name for name in deployment.image_environment(target) if name.startswith("TRIMTAB_")}

    assert ours <= known


@each_target
def test_the_folders_of_volumes_belong_to_the_user(target):
    (made,) = [rest for rest in deployment.values(target, "RUN") if "install --directory" in rest]
    folders = made.partition("install --directory")[2].split()
    home = deployment.image_environment(target)["TRIMTAB_HOME"]

    assert {"--owner=10001", "--group=10001", "--mode=0700"} <= set(folders)
    assert {home, *(f"{home}/{name}" for name in ("artifacts", "models", "scratch"))} <= set(
        folders
    )


def test_the_build_has_all_that_the_wheel_is_made_of():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    described = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    hook = wheel["hooks"]["custom"].get("path", "hatch_build.py")

    assert {*wheel["packages"], *described, hook, "pyproject.toml", "constraints.txt"} == set(
        sources()
    )


def test_the_build_sees_what_it_copies_and_nothing_else():
    for source in sources():
        assert (deployment.ROOT / source).exists(), source
        assert not deployment.is_ignored(source), source
    secret = [".env", ".env.example", ".git/config", ".venv/bin/python", "tests/factories.py"]
    caches = ["api/__pycache__/app.cpython-311.pyc", "core/jobs.pyc", "core/__pycache__/left"]
    compiled_here = ["ppo_engine/_native_avx2.so"]
    for path in [*secret, *caches, *compiled_here]:
        assert deployment.is_ignored(path), path


def test_root_writes_nothing_after_the_change_of_user():
    for target in TARGETS:
        words = [one.word for one in deployment.stages()[target].instructions]
        assert "RUN" not in words[words.index("USER") :]

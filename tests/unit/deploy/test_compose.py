"""The compose file, read as Compose would: no Docker is started here."""

import importlib.util
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from api.routes import health
from core.settings import ProcessSettings
from tests.unit.deploy import deployment
from tests.unit.deploy.deployment import MODULES, SETTINGS
from trimtab import servers

PASSWORDS = {
    "TRIMTAB_OWNER_PASSWORD": "owner" * 8,
    "TRIMTAB_API_PASSWORD": "api" * 8,
    "TRIMTAB_WORKER_PASSWORD": "worker" * 8,
    "VALKEY_PASSWORD": "valkey" * 8,
}
SERVICES = deployment.interpolated(deployment.compose(), PASSWORDS)["services"]
OWN = {name: service for name, service in SERVICES.items() if "build" in service}
PROCESSES = {"api": "api", "worker": "worker", "dispatcher": "dispatcher", "migrate": "migrations"}
"""Services that are processes of ours, by the process that each runs."""

each_own = pytest.mark.parametrize("name", sorted(OWN))
each_process = pytest.mark.parametrize("name", sorted(PROCESSES))


@pytest.fixture
def alone(monkeypatch):
    """An environment without any variable that a process of ours reads."""
    for settings in SETTINGS.values():
        for field in settings.model_fields.values():
            monkeypatch.delenv(str(field.validation_alias), raising=False)
            monkeypatch.delenv(f"{field.validation_alias}_FILE", raising=False)
    return monkeypatch


def settings_of(name: str, environment: pytest.MonkeyPatch) -> ProcessSettings:
    """The settings that the process of a service has inside its container."""
    service = SERVICES[name]
    image = deployment.image_environment(service["build"]["target"])
    for variable, value in {**image, **service["environment"]}.items():
        if variable != "PATH" and not variable.startswith("PYTHON"):
            environment.setenv(variable, value)
    return SETTINGS[PROCESSES[name]].from_environment()


def folders(name: str) -> dict[str, str]:
    """Where a service finds which volume, with its mode."""
    mounts = (volume.split(":") for volume in SERVICES[name].get("volumes", ()))
    return {target: ":".join([source, *mode]) for source, target, *mode in mounts}


@each_process
def test_each_service_runs_an_entry_point_of_ours(name):
    module = MODULES[PROCESSES[name]]

    command = SERVICES[name]["command"]

    assert "entrypoint" not in SERVICES[name]
    assert command == ["python", "-m", module]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None
    assert spec.origin is not None
    assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


def test_the_tool_for_models_is_our_command_and_starts_only_when_asked_for():
    project = tomllib.loads((deployment.ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    tool = SERVICES["models"]

    assert set(OWN) - set(PROCESSES) == {"models"}
    assert tool["entrypoint"] == ["trimtab", "models"]
    assert "trimtab" in project["project"]["scripts"]
    assert tool["profiles"] == ["tools"]
    assert tool["build"]["target"] == "worker"


@each_process
def test_each_process_is_told_all_that_it_requires(name, alone):
    settings = settings_of(name, alone)

    assert settings.home == Path("/var/lib/trimtab")


@each_process
@pytest.mark.usefixtures("alone")
def test_no_process_starts_without_what_the_file_tells_it(name):
    with pytest.raises(ValidationError, match="DATABASE_URL"):
        SETTINGS[PROCESSES[name]].from_environment()


@each_process
def test_each_variable_of_a_service_is_a_setting_of_its_process(name):
    known = {
        str(field.validation_alias) for field in SETTINGS[PROCESSES[name]].model_fields.values()
    }

    assert set(SERVICES[name]["environment"]) <= known


def test_each_process_has_its_own_database_role():
    urls = {name: urlsplit(SERVICES[name]["environment"]["DATABASE_URL"]) for name in PROCESSES}

    assert {name: url.username for name, url in urls.items()} == {
        "migrate": servers.OWNER_ROLE,
        "api": servers.API_ROLE,
        "dispatcher": servers.WORKER_ROLE,
        "worker": servers.WORKER_ROLE,
    }
    assert {url.hostname for url in urls.values()} == {"postgres"}
    assert {url.path for url in urls.values()} == {f"/{servers.DATABASE}"}


def test_the_migrations_give_the_roles_the_passwords_that_the_processes_use():
    migrate = SERVICES["migrate"]["environment"]
    passwords = {
        name: urlsplit(SERVICES[name]["environment"]["DATABASE_URL"]).password for name in PROCESSES
    }

    assert passwords["api"] == migrate["TRIMTAB_API_PASSWORD"]
    assert passwords["worker"] == migrate["TRIMTAB_WORKER_PASSWORD"]
    assert passwords["dispatcher"] == migrate["TRIMTAB_WORKER_PASSWORD"]
    assert passwords["migrate"] == SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"]


@pytest.mark.parametrize("name", ["api", "dispatcher", "worker"])
def test_each_process_logs_in_to_valkey(name):
    url = urlsplit(SERVICES[name]["environment"]["REDIS_URL"])

    assert (url.username, url.password) == (servers.VALKEY_USER, PASSWORDS["VALKEY_PASSWORD"])
    assert (url.hostname, url.port) == ("valkey", 6379)


@pytest.mark.parametrize("missing", sorted(PASSWORDS))
def test_nothing_starts_without_each_password(missing):
    rest = {name: value for name, value in PASSWORDS.items() if name != missing}

    with pytest.raises(deployment.Missing, match=missing):
        deployment.interpolated(deployment.compose(), rest)


def test_no_secret_has_a_default():
    defaults = {
        one.name: one.default
        for one in deployment.references(deployment.compose_text())
        if not one.is_required
    }

    assert defaults == {"TRIMTAB_PUBLISH": "127.0.0.1:8000", "TRIMTAB_WORKERS": "1"}


def test_no_secret_is_written_into_the_file():
    for service in deployment.compose()["services"].values():
        for name, value in service.get("environment", {}).items():
            if name.endswith(("_PASSWORD", "_URL")):
                assert any(one.is_required for one in deployment.references(value)), name


def test_the_example_names_every_variable_and_holds_no_secret():
    lines = (deployment.ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    offered = {line[1:].split("=", 1)[0] for line in lines if line.startswith("#") and "=" in line}

    assert given == dict.fromkeys(PASSWORDS, "")
    assert offered == {"TRIMTAB_PUBLISH", "TRIMTAB_WORKERS", "PIP_INDEX_URL"}
    used = {one.name for one in deployment.references(deployment.compose_text())}
    assert used == {*given, *offered} - {"PIP_INDEX_URL"}


def test_the_dispatcher_knows_how_many_workers_there_are(alone):
    many = {**PASSWORDS, "TRIMTAB_WORKERS": "3"}
    services = deployment.interpolated(deployment.compose(), many)["services"]

    assert services["worker"]["deploy"] == {"replicas": "3"}
    assert services["dispatcher"]["environment"]["TRIMTAB_SLOTS"] == "3"
    assert settings_of("dispatcher", alone).slots == 1


@each_own
def test_our_containers_have_no_rights_to_give_up(name):
    service = OWN[name]

    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"user", "privileged", "cap_add", "pid", "network_mode", "devices"} & set(service)


@each_own
def test_our_containers_stop_in_order(name, alone):
    service = OWN[name]

    assert service["init"] is True
    assert service["stop_grace_period"] == "120s"
    assert settings_of("worker", alone).pause_seconds < 120


def test_long_running_services_come_back_and_others_do_not():
    policies = {name: service["restart"] for name, service in SERVICES.items()}

    one_shot = {"migrate": "no", "models": "no"}
    assert policies == {**dict.fromkeys(SERVICES, "unless-stopped"), **one_shot}


def test_only_the_api_is_published_and_only_on_the_loopback_address():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert published == {"api": ["127.0.0.1:8000:8000"]}


def test_the_published_port_is_the_one_that_the_api_listens_on(alone):
    settings = settings_of("api", alone)

    assert (settings.host, settings.port) == ("0.0.0.0", 8000)  # noqa: S104 - in a container


def test_servers_are_of_the_versions_that_are_needed():
    assert SERVICES["postgres"]["image"] == "postgres:18"
    assert SERVICES["valkey"]["image"] == "valkey/valkey:9"


@pytest.mark.parametrize("name", ["postgres", "valkey", "api"])
def test_what_answers_requests_is_asked_for_its_health(name):
    check = SERVICES[name]["healthcheck"]

    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


def test_the_api_is_asked_under_a_path_that_it_has():
    paths = {route.path for route in health.router.routes}

    asked = SERVICES["api"]["healthcheck"]["test"][-1]

    assert any(f'"http://127.0.0.1:8000{path}"' in asked for path in paths if "ready" in path)
    compile(asked, "healthcheck", "exec")


def test_checks_hold_no_password():
    for name, password in PASSWORDS.items():
        for service in SERVICES.values():
            assert password not in str(service.get("healthcheck")), name
            assert password not in str(service.get("command")), name


@pytest.mark.parametrize("name", ["api", "dispatcher", "worker"])
def test_processes_wait_for_the_servers_and_for_the_migrations(name):
    assert SERVICES[name]["depends_on"] == {
        "postgres": {"condition": "service_healthy"},
        "valkey": {"condition": "service_healthy"},
        "migrate": {"condition": "service_completed_successfully"},
    }


def test_the_migrations_wait_for_the_database_alone():
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_each_volume_is_declared_and_used():
    used = {volume.split(":")[0] for one in SERVICES.values() for volume in one.get("volumes", ())}

    assert used == set(deployment.compose()["volumes"])


def test_the_processes_find_their_volumes_where_they_look(alone):
    settings = settings_of("worker", alone)
    artifacts, models, scratch = map(str, (settings.artifacts, settings.models, settings.scratch))

    assert folders("worker") == {
        artifacts: "artifacts",
        models: "models:ro",
        scratch: "scratch",
    }
    assert folders("api") == {artifacts: "artifacts", models: "models:ro"}
    assert folders("dispatcher") == {artifacts: "artifacts"}
    assert folders("models") == {models: "models"}


def test_the_data_of_the_servers_outlive_their_containers():
    # Since version 18 the image keeps its data in a folder per version below this one.
    assert folders("postgres") == {"/var/lib/postgresql": "postgres"}
    assert folders("valkey") == {"/data": "valkey"}


def test_the_database_is_set_up_as_the_local_one():
    environment = SERVICES["postgres"]["environment"]

    assert environment["POSTGRES_USER"] == servers.OWNER_ROLE
    assert environment["POSTGRES_DB"] == servers.DATABASE
    assert "--builtin-locale=C.UTF-8" in environment["POSTGRES_INITDB_ARGS"]


def test_valkey_keeps_what_it_is_told_and_gives_no_more_rights_than_locally():
    content = deployment.interpolated(deployment.compose()["configs"], PASSWORDS)["valkey"][
        "content"
    ]
    lines = content.splitlines()
    password = PASSWORDS["VALKEY_PASSWORD"]

    assert SERVICES["valkey"]["configs"] == [
        {"source": "valkey", "target": SERVICES["valkey"]["command"][-1]}
    ]
    assert {"appendonly yes", "maxmemory-policy noeviction"} <= set(lines)
    assert [line for line in lines if line.startswith("user ")] == [
        "user default off resetpass resetkeys resetchannels -@all",
        f"user {servers.VALKEY_USER} on >{password} ~* &* {servers.APPLICATION_RIGHTS}",
    ]

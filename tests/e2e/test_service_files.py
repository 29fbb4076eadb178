"""The units and manifests under examples/ are valid, hardened as they say, and start commands that exist."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from shell import PASSPHRASE, Shell

from outlast import config
from outlast.cli.main import app
from servers import skip_or_fail

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNITS = sorted((EXAMPLES / "systemd").iterdir())
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
MANIFESTS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
PODS = [EXAMPLES / "kubernetes" / name for name in ("deployment.yaml", "cronjob.yaml")]
PROGRAM = "/opt/outlast/bin/outlast"
USER = 10001
OLDEST_KUBERNETES = "1.25"
EXPOSURE_MAX = 25
"""tenths, as `systemd-analyze security` counts"""

by_name = pytest.mark.parametrize


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of these arguments; raises `click.UsageError` for what it doesn't know."""
    command = app.commands[arguments[0]]
    context = command.make_context(arguments[0], arguments[1:], parent=click.Context(app))
    assert isinstance(command, click.Command)
    return {**context.params, **context.obj._asdict()}


# -- systemd -----------------------------------------------------------------------------------------


def directives(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(name, []).append(value)
    return found


def started(unit: Path) -> list[str]:
    [line] = directives(unit)["ExecStart"]
    program, *arguments = shlex.split(line)
    assert program == PROGRAM
    return arguments


@by_name("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_is_hardened_and_ends_on_sigterm(unit: Path) -> None:
    found = directives(unit)
    expected = {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ReadWritePaths": "/srv/outlast",
        "KillSignal": "SIGTERM",
        "LoadCredential": "passphrase:/etc/outlast/passphrase",
        "User": "outlast",
        "UMask": "0077",
    }
    assert {name: found[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert float(found["TimeoutStopSec"][0].removesuffix("s")) > 60
    is_once = "once" in unit.name
    assert found["Type"] == ["oneshot" if is_once else "exec"]
    assert found.get("Restart") == (None if is_once else ["on-failure"])


@by_name("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_starts_a_command_that_exists(unit: Path) -> None:
    found = parsed(started(unit))
    assert found["config"] == "/etc/outlast/outlast.yaml"
    assert found["passphrase_file"] == "%d/passphrase"
    assert found["once"] is ("once" in unit.name)


def test_the_timer_starts_the_service_and_makes_up_for_what_was_missed() -> None:
    timer = directives(EXAMPLES / "systemd" / "outlast-agent-once.timer")
    assert timer["Unit"] == ["outlast-agent-once.service"]
    assert timer["Persistent"] == ["true"]
    assert timer["OnCalendar"]


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        skip_or_fail("systemd-analyze is not installed: make setup-servers")
    program = tmp_path / "outlast"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copies = []
    for unit in UNITS:
        copies.append(tmp_path / unit.name)
        copies[-1].write_text(unit.read_text().replace(PROGRAM, str(program)))
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", *copies], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    judged = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}"]
    for unit in SERVICES:
        ran = subprocess.run([*judged, unit], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout


@pytest.fixture
def team(shell: Shell) -> Shell:
    """What the units expect, in one folder: a configuration, a passphrase, and tiers that were made."""
    (shell.folder / "outlast.yaml").write_text(
        "storage_tiers: {hot: {url: hot}, cold: {url: cold, sync: {mode: sync}}}\n"
        "sources: {models: {paths: model, drill: off}}\n"
    )
    (shell.folder / "passphrase").write_text(PASSPHRASE + "\n")
    (shell.folder / "model").mkdir()
    (shell.folder / "model" / "weights").write_bytes(bytes(range(256)) * 100)
    for tier in ("hot", "cold"):
        shell("init", "--encrypt", "--repo", tier, "--passphrase-file", "passphrase")
    return shell


def as_on_this_machine(unit: Path, shell: Shell) -> list[str]:
    parsed(started(unit))
    folder = str(shell.folder)
    return [each.replace("/etc/outlast", folder).replace("%d", folder) for each in started(unit)]


def test_the_service_that_runs_once_does_what_is_due(team: Shell) -> None:
    line = as_on_this_machine(EXAMPLES / "systemd" / "outlast-agent-once.service", team)
    team(*line, without="OUTLAST_REPO")
    for tier in ("hot", "cold"):
        [backup] = team("snapshots", "--repo", tier, "--passphrase-file", "passphrase", "--json").json
        assert backup["name"] == "models"
    team(*line, without="OUTLAST_REPO")
    assert len(team("snapshots", "--repo", "hot", "--passphrase-file", "passphrase", "--json").json) == 1


def test_the_service_runs_until_sigterm_and_ends_well(team: Shell) -> None:
    line = as_on_this_machine(EXAMPLES / "systemd" / "outlast-agent.service", team)
    environment = team.environment | {"PYTHONUNBUFFERED": "1"}
    with (team.folder / "told").open("wb") as told:
        agent = subprocess.Popen(team.argv(*line), cwd=team.folder, env=environment, stdout=told, stderr=told)
    try:
        for _ in range(600):
            if "backed up" in (team.folder / "told").read_text():
                break
            with suppress(subprocess.TimeoutExpired):
                agent.wait(0.1)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 0
    finally:
        agent.kill()
        agent.wait()
    assert "stopping" in (team.folder / "told").read_text()
    [backup] = team("snapshots", "--repo", "hot", "--passphrase-file", "passphrase", "--json").json
    assert backup["name"] == "models"


# -- Kubernetes --------------------------------------------------------------------------------------


def documents() -> Iterator[Any]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.name}-{document['kind']}")


def of_kind(kind: str) -> Any:
    [found] = [parameter.values[0] for parameter in documents() if parameter.values[0]["kind"] == kind]
    return found


def pod(path: Path) -> Any:
    spec = yaml.safe_load(path.read_text())["spec"]
    return spec.get("jobTemplate", {"spec": spec})["spec"]["template"]["spec"]


@by_name("version", [OLDEST_KUBERNETES, "newest"])
@by_name("document", [*documents()])
def test_manifests_fit_the_schemas_of_kubernetes(document: Any, version: str) -> None:
    wanted = kubernetes_validate.latest_version() if version == "newest" else version
    kubernetes_validate.validate(document, wanted, strict=True)


def test_the_schemas_bite() -> None:
    wrong = {**of_kind("Deployment"), "spec": {**of_kind("Deployment")["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@by_name("path", PODS, ids=lambda path: path.name)
def test_a_pod_runs_without_rights_that_it_does_not_need(path: Path) -> None:
    spec = pod(path)
    [container] = spec["containers"]
    security = spec["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, USER, USER)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]


@by_name("path", PODS, ids=lambda path: path.name)
def test_a_pod_starts_a_command_that_exists(path: Path) -> None:
    [container] = pod(path)["containers"]
    found = parsed(container["args"])
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts[str(Path(found["config"]).parent)] == "config"
    assert mounts[str(Path(found["passphrase_file"]).parent)] == "passphrase"
    assert found["once"] is (path.name == "cronjob.yaml")


@by_name("path", PODS, ids=lambda path: path.name)
def test_what_a_pod_names_is_there(path: Path) -> None:
    """Volumes, keys of the secret and of the config map, claims."""
    spec = pod(path)
    [container] = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    secret, configured = of_kind("Secret"), of_kind("ConfigMap")
    named = {each["valueFrom"]["secretKeyRef"]["key"] for each in container["env"] if "valueFrom" in each}
    named |= {item["key"] for item in volumes["passphrase"]["secret"]["items"]}
    assert named == secret["stringData"].keys()
    assert volumes["passphrase"]["secret"]["secretName"] == secret["metadata"]["name"]
    assert volumes["config"]["configMap"]["name"] == configured["metadata"]["name"]
    claim = of_kind("PersistentVolumeClaim")["metadata"]["name"]
    assert volumes["hot"]["persistentVolumeClaim"]["claimName"] == claim


@by_name("path", PODS, ids=lambda path: path.name)
def test_the_configuration_holds_in_the_pod(path: Path, tmp_path: Path) -> None:
    """`outlast config check` finds nothing, and each path lies in a volume, which is writable where it has to be."""
    [container] = pod(path)["containers"]
    environment = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    found = config.read(of_kind("ConfigMap")["data"]["outlast.yaml"].encode(), "/etc/outlast/outlast.yaml", environment)
    missing = "/sources/models is not there; is it spelled right?"
    assert [warning.text("") for warning in found.warnings if missing not in warning.text("")] == []

    def mount(place: str) -> Any:
        return next(each for each in container["volumeMounts"] if place.startswith(each["mountPath"] + "/"))

    local = [tier.url for tier in found.policy.tiers if tier.url.startswith("/")]
    assert local
    assert not any(mount(place).get("readOnly") for place in local)
    assert all(mount(place + "/")["readOnly"] for source in found.policy.sources for place in source.paths)
    assert not mount(environment["TMPDIR"] + "/").get("readOnly")


def test_the_secret_is_a_template() -> None:
    assert set(of_kind("Secret")["stringData"].values()) == {"CHANGE-ME"}


def test_jobs_never_overlap() -> None:
    assert of_kind("CronJob")["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_image_runs_as_the_user_of_the_pod() -> None:
    lines = (EXAMPLES / "kubernetes" / "Dockerfile").read_text().splitlines()
    assert f"USER {USER}:{USER}" in lines
    assert f'ENTRYPOINT ["{PROGRAM}"]' in lines
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert copied
    for name in copied:
        assert (EXAMPLES.parent / name).exists(), name


def test_the_readme_names_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for path in [*UNITS, *MANIFESTS, *EXAMPLES.glob("*.py")]:
        assert f"`{path.name}`" in text, path.name

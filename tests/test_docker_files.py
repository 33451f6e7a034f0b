"""Do the files in docker/ say what the package says: versions, ports, paths, and no more rights than are needed?

There is no docker where the tests run: what the files hold is read and compared.
"""

import inspect
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("fastapi")

from gmask.checkpoints.load import load
from gmask.cli import serving
from gmask.serving.settings import ServerSettings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
USER = "10001"
PORT = inspect.signature(serving.serve).parameters["port"].default


def read_instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with its arguments, on one line."""
    text = (DOCKER / "Dockerfile").read_text("utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]  # type: ignore[misc]


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, with those of the stage that it begins from before its own."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for keyword, rest in read_instructions():
        if keyword == "FROM":
            base, _, name = rest.split()
            stages[name] = list(stages.get(base, []))
        elif stages:
            stages[name].append((keyword, rest))
    return stages


def argument(name: str) -> str:
    (value,) = (rest.partition("=")[2] for keyword, rest in read_instructions() if rest.startswith(f"{name}="))
    return value


def read_yaml(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DOCKER / name).read_text("utf-8")))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (one for one in read_yaml("kubernetes.yaml") if one["kind"] == kind)
    return dict(found)


def pod() -> dict[str, Any]:
    return dict(manifest("Deployment")["spec"]["template"]["spec"])


def paths_of_the_app(build_glm: Any) -> set[str]:
    from gmask.serving.app import create_app

    _, tokenizer = load("bundled", device="cpu")
    app = create_app(build_glm(vocab_size=len(tokenizer)), tokenizer)
    app.state.backend.close()
    return set(app.openapi()["paths"])


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_runs_as_an_ordinary_user(stage: str) -> None:
    users = [rest for keyword, rest in read_stages()[stage] if keyword == "USER"]
    assert users[-1] == f"{USER}:{USER}"
    assert any(f"useradd --uid {USER} " in rest for _, rest in read_stages()[stage])


def test_the_pinned_versions_are_those_of_the_tests() -> None:
    assert argument("TORCH") in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'requires-python = ">={argument("PYTHON")}"' in project
    extras = argument("EXTRAS").split(",")
    assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras)
    installs = [rest for keyword, rest in read_stages()["build"] if keyword == "RUN" and "pip install" in rest]
    assert [("$TORCH" in rest, "-c constraints.txt" in rest) for rest in installs] == [(True, False), (False, True)]


def test_the_builder_gets_what_it_copies_and_nothing_else() -> None:
    rules = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").split("\n")
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    (files, folder) = (rest.split()[:-1] for keyword, rest in read_stages()["build"] if keyword == "COPY")
    assert {*files, *folder} == allowed
    assert all((ROOT / name).exists() for name in allowed)
    refused = [rule for rule in rules if rule and rule[0] not in "#!"]
    assert refused[0] == "*"
    assert any(fnmatch("src/gmask/native/_native.so", rule) for rule in refused[1:]), "built on another machine"


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_listens_where_the_server_does(stage: str, build_glm: Any) -> None:
    instructions = dict(read_stages()[stage])
    assert instructions["EXPOSE"] == str(PORT)
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", instructions["HEALTHCHECK"])
    assert url and url[1] == str(PORT) and url[2] in paths_of_the_app(build_glm)
    assert yaml.safe_load(instructions["ENTRYPOINT"])[:2] == ["gmask", "serve"]
    options = {word for word in yaml.safe_load(instructions["ENTRYPOINT"]) if word.startswith("--")}
    assert {option[2:] for option in options} <= set(inspect.signature(serving.serve).parameters)


def test_compose_opens_the_server_to_this_machine_only() -> None:
    (compose,) = read_yaml("compose.yaml")
    targets = read_stages()
    for service in compose["services"].values():
        assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
        assert service["build"]["target"] in targets
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert {volume.split(":")[0] for volume in service["volumes"]} <= compose["volumes"].keys()
        assert int(service["stop_grace_period"].rstrip("s")) > ServerSettings().drain_seconds + 5


def test_kubernetes_asks_paths_that_the_app_has(build_glm: Any) -> None:
    (container,) = pod()["containers"]
    paths = paths_of_the_app(build_glm)
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
        assert container[probe]["httpGet"]["port"] == "http"
    assert container["readinessProbe"]["httpGet"]["path"] != container["livenessProbe"]["httpGet"]["path"]
    assert pod()["terminationGracePeriodSeconds"] > ServerSettings().drain_seconds + 5


def test_kubernetes_gives_a_pod_no_rights() -> None:
    (container,) = pod()["containers"]
    assert pod()["securityContext"]["runAsNonRoot"]
    assert str(pod()["securityContext"]["runAsUser"]) == USER
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_the_manifests_speak_of_the_same_pods() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("Deployment")["metadata"]["name"])
    assert "replicas" not in manifest("Deployment")["spec"], "an update would undo what the autoscaler did"


def test_no_file_holds_a_secret() -> None:
    for path in DOCKER.iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"(?i)(api[-_]?key|token|password)\s*[=:]\s*['\"]?[A-Za-z0-9]{12,}", text), path.name
    (key,) = (one for one in pod()["containers"][0]["env"] if one["name"] == "GMASK_API_KEY")
    assert key["valueFrom"]["secretKeyRef"]["optional"]


def test_the_page_shows_the_shipped_file_for_ray() -> None:
    page = (ROOT / "docs/how-to/deploy.md").read_text("utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    assert [yaml.safe_load(shown)] == read_yaml("ray-serve.yaml")

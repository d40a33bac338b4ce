"""The formats' own validators accept the deployment files and refuse a mistake in them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from inplace.alive import TIMEOUT
from support.manifest_patches import server_with_snapshots

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSIONS = ("1.34", "1.37")
"""Of Kubernetes; 1.34 has ``preStop.sleep`` for good."""
VALIDATORS = {
    "hadolint": ["hadolint", "--failure-threshold", "info"],
    "compose": ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"],
    "envoy": ["envoy", "--mode", "validate", "-c"],
    **{
        f"kubernetes {version}": ["kubernetes-validate", "--strict", "-k", version]
        for version in VERSIONS
    },
}
FILES = {
    "hadolint": [DEPLOY / "docker/Dockerfile"],
    "compose": [
        DEPLOY / f"{name}.yaml" for name in ("compose", "compose.gpu", "compose.snapshots")
    ],
    "envoy": [KUBERNETES / "envoy.yaml"],
    **{
        f"kubernetes {version}": [
            KUBERNETES / f"{name}.yaml" for name in ("server", "openai", "router", "network")
        ]
        for version in VERSIONS
    },
}
PODS = [
    ("server.yaml", "StatefulSet", "inplace-server"),
    ("openai.yaml", "Deployment", "inplace-openai"),
    ("router.yaml", "Deployment", "inplace-router"),
]
MISTAKES = {
    "hadolint": ("--no-cache-dir", "--no-cache"),  # DL3042
    "compose": ("shm_size: 1gb", "shm_sise: 1gb"),
    "envoy": ("hash_policy", "hash_polices"),
    **{
        f"kubernetes {version}": ("terminationGracePeriodSeconds", "terminationGraceSeconds")
        for version in VERSIONS
    },
}


def validate(kind: str, files: list[Path]) -> subprocess.CompletedProcess[str]:
    command, *options = VALIDATORS[kind]
    tool = Path(sys.executable).with_name(command)
    return subprocess.run([tool, *options, *files], capture_output=True, text=True, check=False)


def documents(file: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((KUBERNETES / file).read_text())


def resource(file: str, kind: str, name: str) -> dict[str, Any]:
    [result] = [
        each for each in documents(file) if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return result


def pod_labels(file: str, kind: str, name: str) -> dict[str, str]:
    result: dict[str, str] = resource(file, kind, name)["spec"]["template"]["metadata"]["labels"]
    return result


def pod(file: str, kind: str, name: str) -> dict[str, Any]:
    result: dict[str, Any] = resource(file, kind, name)["spec"]["template"]["spec"]
    return result


def envoy() -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((KUBERNETES / "envoy.yaml").read_text())
    resources: dict[str, Any] = result["static_resources"]
    return resources


@pytest.mark.parametrize("kind", VALIDATORS)
def test_a_validator_accepts_the_files(kind: str) -> None:
    result = validate(kind, FILES[kind])
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kind", VALIDATORS)
def test_a_validator_refuses_a_mistake(kind: str, tmp_path: Path) -> None:
    right, wrong = MISTAKES[kind]
    text = FILES[kind][0].read_text()
    assert right in text
    (tmp_path / FILES[kind][0].name).write_text(text.replace(right, wrong))
    assert validate(kind, [tmp_path / FILES[kind][0].name]).returncode != 0


def test_the_image_has_a_python_that_this_package_takes_and_the_locked_versions() -> None:
    text = (DEPLOY / "docker/Dockerfile").read_text()
    assert "FROM nvcr.io/nvidia/tritonserver:26.06-py3\n" in text  # Python 3.12
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
        == ">=3.11"
    )
    assert "--require-hashes -r requirements-server.lock" in text
    assert "index-url" not in text  # no second index that could shadow the first
    ignored = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().split()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored


def test_what_compose_and_kustomize_mount_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounts = [
        mount
        for service in compose.values()
        for mount in service.get("volumes", ())
        if isinstance(mount, str)
    ]
    assert {mount.partition(":")[0] for mount in mounts if mount.startswith(".")} == {
        "./prometheus",
        "./grafana/provisioning",
        "./grafana/dashboards",
    }
    assert all(
        (DEPLOY / mount.partition(":")[0]).is_dir() for mount in mounts if mount.startswith(".")
    )
    assert (
        DEPLOY / compose["server"]["build"]["context"] / compose["server"]["build"]["dockerfile"]
    ).is_file()
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert [
        target
        for job in scraped["scrape_configs"]
        for each in job["static_configs"]
        for target in each["targets"]
    ] == ["server:8002", "openai:9000"]
    assert all((DEPLOY / "prometheus" / file).is_file() for file in scraped["rule_files"])
    [source] = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/inplace.yaml").read_text()
    )["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
    customized = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    files = [
        *customized["resources"],
        *(file for each in customized["configMapGenerator"] for file in each["files"]),
    ]
    assert sorted(files) == sorted(
        path.name
        for path in KUBERNETES.iterdir()
        if path.is_file() and path.name != "kustomization.yaml"
    )
    component = yaml.safe_load((KUBERNETES / "snapshots/kustomization.yaml").read_text())
    files = [*component["resources"], *(patch["path"] for patch in component["patches"])]
    assert sorted(["kustomization.yaml", *files]) == sorted(
        path.name for path in (KUBERNETES / "snapshots").iterdir()
    )


def test_every_request_that_passes_goes_to_the_replica_of_its_hash() -> None:
    """tests/server/test_routing.py sends real requests through this configuration."""
    clusters = {cluster["name"]: cluster for cluster in envoy()["clusters"]}
    service = resource("server.yaml", "Service", "inplace-server")
    assert service["spec"]["clusterIP"] == "None"  # so that the name is the replicas' addresses
    ports = {port["port"]: port["name"] for port in service["spec"]["ports"]}
    outside = {
        port["name"]: port["port"]
        for port in resource("router.yaml", "Service", "inplace")["spec"]["ports"]
    }
    for listener in envoy()["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        [host] = manager["route_config"]["virtual_hosts"]
        *passing, last = host["routes"]
        assert last["match"] == {"prefix": "/"}
        assert last["direct_response"]["status"] == 403
        for route in (route["route"] for route in passing if "route" in route):
            assert route["hash_policy"] == [{"header": {"header_name": "inplace-sequence"}}]
            assert route["timeout"] == "0s"  # none
            cluster = clusters[route["cluster"]]
            assert (cluster["type"], cluster["lb_policy"]) == ("STRICT_DNS", "RING_HASH")
        [group] = cluster["load_assignment"]["endpoints"]
        [endpoint] = [each["endpoint"] for each in group["lb_endpoints"]]
        address = endpoint["address"]["socket_address"]
        assert address["address"] == service["metadata"]["name"]
        assert ports[address["port_value"]] == listener["name"]
        bound = listener["address"]["socket_address"]["port_value"]
        assert bound == outside[listener["name"]]
        grpc = listener["name"] == "grpc"
        assert ("typed_extension_protocol_options" in cluster) == grpc
        [check] = cluster["health_checks"]
        if grpc:  # a replica that shuts down stays for its live sequences, until its port is closed
            assert "tcp_health_check" in check
            assert not cluster.get("ignore_health_on_host_removal", False)
        else:
            assert check["http_health_check"]["path"] == "/v2/health/ready"
            assert cluster["ignore_health_on_host_removal"]


def names_of(peers: list[dict[str, Any]]) -> list[str]:
    """The pods of a rule of a policy, of its own namespace."""
    assert all(peer.keys() == {"podSelector"} for peer in peers)
    return [peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for peer in peers]


def ports_of(rule: dict[str, Any]) -> list[int]:
    return [port["port"] for port in rule["ports"]]


def test_clients_reach_the_front_end_and_not_tritons_ports() -> None:
    """Only with a label of their own do they reach the router, which has Triton's protocol."""
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in documents("network.yaml")}
    for file, kind, name in PODS:
        selected = policies[name]["podSelector"]["matchLabels"]
        assert selected.items() <= pod_labels(file, kind, name).items()
        assert policies[name]["policyTypes"] == ["Ingress", "Egress"]
    routed, front, scraped = policies["inplace-server"]["ingress"]
    assert (names_of(routed["from"]), ports_of(routed)) == (["inplace-router"], [8000, 8001])
    assert (names_of(front["from"]), ports_of(front)) == (["inplace-openai"], [8001])
    assert ports_of(scraped) == [8002]
    assert policies["inplace-server"]["egress"] == []
    [clients] = policies["inplace-router"]["ingress"]
    [peer] = clients["from"]
    assert peer["podSelector"]["matchLabels"] == {"inplace-client": "true"}
    [everyone] = policies["inplace-openai"]["ingress"]
    assert everyone == {"ports": [{"port": 9000}]}
    for name, reached in (("inplace-router", [8000, 8001]), ("inplace-openai", [8001])):
        servers, names = policies[name]["egress"]
        assert (names_of(servers["to"]), ports_of(servers)) == (["inplace-server"], reached)
        assert set(ports_of(names)) == {53}


def test_the_front_end_knows_every_replica_of_the_server() -> None:
    """tests/server/test_deployment.py runs this command line."""
    [container] = pod("openai.yaml", "Deployment", "inplace-openai")["containers"]
    arguments = dict(each.partition("=")[::2] for each in container["args"])
    servers = resource("server.yaml", "StatefulSet", "inplace-server")["spec"]
    assert arguments["--server"].split(",") == [
        f"inplace-server-{number}.{servers['serviceName']}:8001"
        for number in range(servers["replicas"])
    ]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["openai"]
    same = {"--server": "server:8001", "--keys": "/run/secrets/openai_keys"}
    assert dict(each.partition("=")[::2] for each in compose["command"]) == arguments | same
    assert [port.rpartition(":")[2] for port in compose["ports"]] == [arguments["--port"]]
    [server] = pod("server.yaml", "StatefulSet", "inplace-server")["containers"]
    assert container["image"] == server["image"] == compose["image"]
    for which in (arguments["--model-repository"], arguments["--keys"].rpartition("/")[0]):
        assert which in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_image_has_what_the_front_end_imports() -> None:
    locked = (ROOT / "requirements-server.lock").read_text()
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["openai"]
    for requirement in extra[1:]:
        assert f"\n{re.split('[>=]', requirement)[0]}==" in f"\n{locked}"


def test_containers_cannot_write_their_own_files() -> None:
    for file, kind, name in PODS:
        for container in pod(file, kind, name)["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["resources"]["limits"]["memory"]
            assert all(
                mount.get("readOnly") or mount["mountPath"] in ("/tmp", "/dev/shm")
                for mount in container["volumeMounts"]
            )
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"]["server"]["read_only"]
    assert compose["services"]["openai"]["read_only"]
    password = compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    assert password == "/run/secrets/grafana_password"
    assert compose["secrets"]["grafana_password"] == {"environment": "GRAFANA_PASSWORD"}


def test_keys_are_secrets() -> None:
    spec = pod("openai.yaml", "Deployment", "inplace-openai")
    [keys] = [volume for volume in spec["volumes"] if volume["name"] == "keys"]
    assert keys["secret"]["defaultMode"] == 0o440
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"]["openai"]["secrets"] == ["openai_keys"]
    assert set(compose["secrets"]["openai_keys"]) == {"file"}
    [scraped] = [
        job
        for job in yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())[
            "scrape_configs"
        ]
        if job["job_name"] == "openai"
    ]
    assert scraped["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}
    assert compose["services"]["prometheus"]["secrets"] == ["metrics_key"]


SNAPSHOTS, SECRET = "file:///snapshots", "/run/secrets/snapshot_secret"
"""What models name in their configuration, in Compose and in Kubernetes."""


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_the_servers_with_a_store(version: str, tmp_path: Path) -> None:
    claim = (KUBERNETES / "snapshots/claim.yaml").read_text()
    path = tmp_path / "server.yaml"
    path.write_text(f"{yaml.safe_dump(server_with_snapshots())}---\n{claim}")
    result = validate(f"kubernetes {version}", [path])
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_store_and_its_secret_are_where_models_name_them() -> None:
    spec = server_with_snapshots()["spec"]["template"]["spec"]
    [container] = spec["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    store = mounts[SNAPSHOTS.removeprefix("file://")]
    assert not store.get("readOnly")
    [claim] = yaml.safe_load_all((KUBERNETES / "snapshots/claim.yaml").read_text())
    named = volumes[store["name"]]["persistentVolumeClaim"]
    assert named == {"claimName": claim["metadata"]["name"]}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    secret = mounts[str(Path(SECRET).parent)]
    assert secret["readOnly"]
    assert volumes[secret["name"]]["secret"]["defaultMode"] == 0o440
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    compose = yaml.safe_load((DEPLOY / "compose.snapshots.yaml").read_text())
    server = compose["services"]["server"]
    assert server["secrets"] == [Path(SECRET).name]
    assert server["volumes"] == ["snapshots:/snapshots"]
    assert set(compose["secrets"][Path(SECRET).name]) == {"file"}
    assert (
        "install -d -m 0700 -o 1000 -g 1000 /snapshots"
        in (DEPLOY / "docker/Dockerfile").read_text()
    )  # the owner of a new volume
    for file in ("compose.snapshots.yaml", "kubernetes/snapshots/kustomization.yaml"):
        text = (DEPLOY / file).read_text()
        assert f"--snapshot-store {SNAPSHOTS}" in text
        assert f"--snapshot-secret-file {SECRET}" in text


DIGEST = "sha256:" + "0" * 64


def test_images_are_pinned_to_the_digest_that_the_registry_names(tmp_path: Path) -> None:
    """With a `docker` that answers a digest of zeros: no registry is reached here."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(f"#!/bin/sh\necho {DIGEST}\n")
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = tmp_path / "deploy" / "pin-images.sh"
    assert subprocess.run([script, "--check"], check=False, capture_output=True).returncode == 1
    subprocess.run([script], check=True, env=environment, capture_output=True)
    assert subprocess.run([script, "--check"], check=False, capture_output=True).returncode == 0
    assert (
        f"FROM nvcr.io/nvidia/tritonserver:26.06-py3@{DIGEST}\n"
        in (tmp_path / "deploy/docker/Dockerfile").read_text()
    )
    assert f"@{DIGEST}" in (tmp_path / "deploy/kubernetes/router.yaml").read_text()
    assert (tmp_path / "deploy/compose.yaml").read_text().count(DIGEST) == 2
    docker.write_text("#!/bin/sh\necho nothing\n")
    shutil.copytree(DEPLOY, tmp_path / "again")
    failed = subprocess.run(
        [tmp_path / "again" / "pin-images.sh"], check=False, env=environment, capture_output=True
    )
    assert failed.returncode == 1
    assert b"gave no digest" in failed.stderr


def test_a_replica_is_ready_when_its_models_are_and_drains_before_it_is_killed() -> None:
    spec = pod("server.yaml", "StatefulSet", "inplace-server")
    [server] = spec["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert server[probe]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert server["livenessProbe"]["exec"]["command"][:3] == ["python3", "-m", "inplace.alive"]
    assert (
        server["livenessProbe"]["timeoutSeconds"]
        > float(server["livenessProbe"]["exec"]["command"][-1])
        >= TIMEOUT
    )
    [grace] = [
        int(argument.partition("=")[2])
        for argument in server["args"]
        if argument.startswith("--exit-timeout-secs=")
    ]
    assert (
        spec["terminationGracePeriodSeconds"]
        > server["lifecycle"]["preStop"]["sleep"]["seconds"] + grace
    )
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]
    assert f'"--exit-timeout-secs={grace}"' in (DEPLOY / "docker/Dockerfile").read_text()
    assert int(compose["stop_grace_period"].removesuffix("s")) > grace
    router = pod("router.yaml", "Deployment", "inplace-router")
    assert (
        router["terminationGracePeriodSeconds"]
        > router["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    )
    front = pod("openai.yaml", "Deployment", "inplace-openai")
    [container] = front["containers"]
    [drain] = [
        int(argument.partition("=")[2])
        for argument in container["args"]
        if argument.startswith("--drain-timeout=")
    ]
    left = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
    assert front["terminationGracePeriodSeconds"] > left
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert int(services["openai"]["stop_grace_period"].removesuffix("s")) > drain
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"  # 503 without a server
    for probe in ("startupProbe", "livenessProbe"):  # a server that is gone restarts no front end
        assert container[probe]["httpGet"] == {"path": "/", "port": "openai"}


@pytest.mark.parametrize(
    ("name", "variables"),
    [("inplace", {"datasource", "model", "instance"}), ("openai", {"datasource", "instance"})],
)
def test_a_dashboards_panels_are_laid_out(name: str, variables: set[str]) -> None:
    board = json.loads((DEPLOY / f"grafana/dashboards/{name}.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken
        taken |= cells
    assert {variable["name"] for variable in board["templating"]["list"]} == variables

"""The Helm chart, rendered by helm itself: the manifests of `deploy/kubernetes`, and other values.

`make chart` builds helm and runs this.
"""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.manifest_patches import server_with_snapshots

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
BUILT = ROOT / "build/bin/helm"
HELM = str(BUILT) if BUILT.exists() else shutil.which("helm")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(HELM is None, reason="there is no helm; `make chart` builds it with Go"),
]

CLUSTER = ("--kube-version", "1.34.0")
"""What a helm that `go install` built takes for its cluster is older than the chart allows."""

Objects = dict[tuple[str, str], dict[str, Any]]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(HELM), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def objects(text: str) -> Objects:
    """The objects of a file, by kind and name."""
    return {
        (each["kind"], each["metadata"]["name"]): each
        for each in yaml.safe_load_all(text)
        if each is not None
    }


def rendered(*arguments: str, release: str = "inplace") -> str:
    result = helm("template", release, "deploy/helm", *CLUSTER, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def manifests() -> Objects:
    """What kustomize makes of the manifests, without the router."""
    customized = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    [image] = customized["images"]
    result: Objects = {}
    for name in ("server", "openai", "network"):
        text = (KUBERNETES / f"{name}.yaml").read_text()
        named = f"image: {image['newName']}:{image['newTag']}"
        result |= objects(text.replace(f"image: {image['name']}", named))
    del result["NetworkPolicy", "inplace-router"]
    routed, *others = result["NetworkPolicy", "inplace-server"]["spec"]["ingress"]
    assert "inplace-router" in json.dumps(routed)
    result["NetworkPolicy", "inplace-server"]["spec"]["ingress"] = others
    return result


def test_it_renders_the_manifests() -> None:
    assert objects(rendered()) == manifests()


def test_with_a_store_it_renders_the_component_of_the_manifests() -> None:
    arguments = ["--set=snapshots.claim=inplace-snapshots", "--set=snapshots.size=100Gi"]
    made = objects(rendered(*arguments))
    [claim] = objects((KUBERNETES / "snapshots/claim.yaml").read_text()).values()
    assert made["PersistentVolumeClaim", "inplace-snapshots"] == claim
    expected = server_with_snapshots()
    [container] = expected["spec"]["template"]["spec"]["containers"]
    [image] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["images"]
    container["image"] = f"{image['newName']}:{image['newTag']}"
    assert made["StatefulSet", "inplace-server"] == expected


@pytest.mark.parametrize("version", ["1.34", "1.37"])
def test_kubernetes_accepts_what_other_values_render(version: str, tmp_path: Path) -> None:
    keys = '{"keys": [{"name": "é", "sha256": "…"}]}'
    (tmp_path / "keys.json").write_text(keys)
    values = ["server.replicas=3", "server.gpus=0", "storage.size=50Gi", "storage.class=fast"]
    values += ["image.repository=example.org/own", "image.tag=7", "keys.secret=own-keys"]
    arguments = [f"--set-string={values.pop(-2)}", *(f"--set={value}" for value in values)]
    arguments.append("--set=openai.toolCallParsers={json,my-model=hermes}")
    arguments.append(f"--set-file=keys.file={tmp_path / 'keys.json'}")
    text = rendered(*arguments, release="other")
    made = objects(text)
    [server] = made["StatefulSet", "other-server"]["spec"]["template"]["spec"]["containers"]
    assert server["image"] == "example.org/own:7"
    assert server["resources"]["limits"] == {"memory": "16Gi"}
    front = made["Deployment", "other-openai"]["spec"]["template"]["spec"]
    replicas = ",".join(f"other-server-{number}.other-server:8001" for number in range(3))
    assert f"--server={replicas}" in front["containers"][0]["args"]
    parsers = ["--tool-call-parser=json", "--tool-call-parser=my-model=hermes"]
    assert front["containers"][0]["args"][-2:] == parsers
    assert base64.b64decode(made["Secret", "own-keys"]["data"]["keys.json"]).decode() == keys
    assert "own-keys" in [each["secret"]["secretName"] for each in front["volumes"][1:2]]
    claim = made["PersistentVolumeClaim", "inplace-models"]["spec"]
    assert claim["resources"]["requests"]["storage"] == "50Gi"
    (tmp_path / "chart.yaml").write_text(text)
    tool = Path(sys.executable).with_name("kubernetes-validate")
    for content, accepted in ((text, True), (text.replace("replicas:", "replica:"), False)):
        (tmp_path / "chart.yaml").write_text(content)
        command = [str(tool), "--strict", "-k", version, str(tmp_path / "chart.yaml")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode == 0) is accepted, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("server.replicas=0", "server.replicas"),
        ("server.gpu=1", "gpu"),
        ("openai.memory=lots", "openai.memory"),
        ("openai.workers=0", "openai.workers"),
        ("openai.toolCallParsers=hermes", "openai.toolCallParsers"),
        ("keys.secret=", "keys.secret"),
    ],
)
def test_wrong_values_are_refused(value: str, text: str) -> None:
    result = helm("template", "inplace", "deploy/helm", *CLUSTER, f"--set={value}")
    assert result.returncode != 0
    assert text in result.stderr.replace("/", ".")


def test_helm_finds_nothing_to_complain_about() -> None:
    result = helm("lint", "--strict", "deploy/helm")
    assert result.returncode == 0, result.stdout + result.stderr

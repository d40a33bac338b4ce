"""The component `deploy/kubernetes/snapshots`, merged into the manifests as kustomize does it."""

from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"


def merged(base: Any, patch: Any) -> Any:
    """A strategic merge of Kubernetes: of lists with names, by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {
            key: merged(base[key], each) if key in base else each for key, each in patch.items()
        }
    if isinstance(base, list) and isinstance(patch, list):
        names = {each["name"]: each for each in base}
        for each in patch:
            names[each["name"]] = merged(names.get(each["name"], {}), each)
        return list(names.values())
    return patch


def server_with_snapshots() -> dict[str, Any]:
    """The StatefulSet of the servers with a store."""
    [patch] = yaml.safe_load_all((KUBERNETES / "snapshots/server.yaml").read_text())
    [base] = [
        each
        for each in yaml.safe_load_all((KUBERNETES / "server.yaml").read_text())
        if (each["kind"], each["metadata"]["name"]) == (patch["kind"], patch["metadata"]["name"])
    ]
    result: dict[str, Any] = merged(base, patch)
    return result

"""The dashboards and alerts of `deploy/`, read as PromQL."""

import json
from pathlib import Path

import promql_parser
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def shown_metrics(name: str) -> set[str]:
    """The names of the metrics that a dashboard shows."""
    board = json.loads((DEPLOY / f"grafana/dashboards/{name}.json").read_text())
    shown: set[str] = set()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            shown |= selected_metrics(target["expr"].replace("$__rate_interval", "1m"))
    return shown


def alerts(group: str) -> list[str]:
    """The expressions of the alerts of a group."""
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    (rules,) = (each["rules"] for each in groups if each["name"] == group)
    return [rule["expr"] for rule in rules]


def selected_metrics(expression: str) -> set[str]:
    """The names of the metrics in an expression."""
    names: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name is not None
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names

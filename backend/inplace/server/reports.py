"""The backend's metrics in tritonserver's ``/metrics``.

A metric costs 20 µs (measured on 2 cores), so a thread of its own sends them.
"""

import os
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from inplace.runtime.observer import Metric, MetricsExporter, MetricValues
from inplace.server.logs import instance_gpu


class TritonMetrics:
    """A model instance's metrics in the server's ``/metrics``.

    The process id is a label, so that no two processes share a series. While a model is reloaded,
    the processes of both live. If both used a series, the server would free it when the older
    process releases it, and crash (seen with tritonserver 2.51).

    Args:
        values: the metrics to export.
        args: what Triton passes to ``initialize``.
    """

    def __init__(self, values: MetricValues, args: Mapping[str, str]) -> None:
        self._families: dict[str, Any] = {}
        labels = {
            "model": args["model_name"],
            "version": args["model_version"],
            "instance": args["model_instance_name"],
            "gpu": "" if (gpu := instance_gpu(args)) is None else str(gpu),
            "process": str(os.getpid()),
        }
        self._exporter = MetricsExporter(values, labels, self._series)

    def close(self) -> None:
        """Export the last values and remove the series from the server."""
        self._exporter.close()
        self._families.clear()  # after their series, as Triton requires

    def _series(self, metric: Metric, labels: Mapping[str, str]) -> Any:
        family = self._families.get(metric.name)
        if family is None:
            kind = (
                pb_utils.MetricFamily.COUNTER
                if metric.kind == "counter"
                else pb_utils.MetricFamily.GAUGE
            )
            family = self._families[metric.name] = pb_utils.MetricFamily(
                name=metric.name, description=metric.help, kind=kind
            )
        return family.Metric(labels=dict(labels))

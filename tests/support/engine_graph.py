"""The graph in the file of a PyTorch engine, to look at or to change."""

import json
from pathlib import Path
from typing import Any

from inplace.engines.graph_reader import LoadedGraph, read_graph
from inplace.schema.graph import METADATA
from inplace.schema.tensor_file import as_bytes, read_safetensors, write_safetensors


def load_graph(path: Path) -> LoadedGraph:
    """Read an engine file."""
    return read_graph(path.read_bytes(), str(path))


def graph_json(path: Path) -> Any:
    """The graph of an engine file as JSON."""
    return json.loads(read_safetensors(as_bytes(path.read_bytes()), str(path))[1][METADATA])


def replace_graph(path: Path, graph: Any) -> None:
    """Write an engine file anew with another graph, or text in its place."""
    tensors, _ = read_safetensors(as_bytes(path.read_bytes()), str(path))
    text = graph if isinstance(graph, str) else json.dumps(graph)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with path.open("wb") as file:
        write_safetensors(file, tensors, {METADATA: text})

"""Loading a model folder runs no code from it, whatever its files hold."""

import builtins
import collections
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.errors import LoadError
from inplace.schema.standalone import FILE_NAME as STANDALONE_FILE
from inplace.schema.standalone import load_tree
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from inplace_builder.tools.chat import Conversation
from support.engine_graph import graph_json, replace_graph
from support.manifests import edit, exchange
from support.models import Repository, open_instance
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedTokenizerFast

ENGINE, STATES = "engine.safetensors", "states.safetensors"


class Planted:
    """An object whose pickle makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.marker), "w")


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Planted(marker))


def torch_pickle(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"state": Planted(marker)}, file)
    return file.getvalue()


def export_archive(marker: Path) -> bytes:
    """An archive of torch.export that is valid but for what it pickles and evaluates."""
    program, file = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), io.BytesIO()
    torch.export.save(program, file)
    out = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if "sample_inputs" in name or name.endswith(".pt"):
                content = torch_pickle(marker)
            target.writestr(name, content)
        target.writestr("../../outside", marker.name)
    return out.getvalue()


PAYLOADS = [pickled, torch_pickle, export_archive]


@pytest.fixture
def model(repository: Repository, tmp_path: Path) -> Path:
    return shutil.copytree(repository.path / "accumulator", tmp_path / "model")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.get_buffer("count").add_(x)
            return {"count": self.get_buffer("count") * 2}

    path = tmp_path_factory.mktemp("engines") / "count"
    build(Count(), (torch.ones(3),), path=path)
    return path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "engine")


def refuse(load: Callable[[Path], object], folder: Path, root: Path) -> None:
    """Loading raises our error; the marker that planted code would make is not there."""
    with pytest.raises(LoadError):
        load(folder)
    assert not (root / "marker").exists()
    assert not [path for path in root.rglob("*") if path.name == "outside"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_pickle_in_place_of_the_engine_of_a_served_model_is_refused(
    payload: Callable[[Path], bytes], model: Path, tmp_path: Path
) -> None:
    content = payload(tmp_path / "marker")
    (model / "1" / "engine.pt2").write_bytes(content)  # the older name: nothing reads it
    assert open_instance(model)
    exchange(model / "1", ENGINE, content)
    refuse(open_instance, model, tmp_path)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("file", [ENGINE, STATES])
def test_a_pickle_in_a_standalone_engine_is_refused(
    payload: Callable[[Path], bytes], file: str, engine: Path, tmp_path: Path
) -> None:
    content = payload(tmp_path / "marker")
    for older in ("engine.pt2", "states.pt"):
        (engine / older).write_bytes(content)
    assert inplace.load(engine)(torch.ones(3))["count"].tolist() == [2, 2, 2]
    exchange(engine, file, content, STANDALONE_FILE)
    refuse(inplace.load, engine, tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "aten::from_file.default",
        "aten::save.default",
        "aten::_reshape_alias.default",
        "aten::set_.source_Storage",
        "aten::_sparse_coo_tensor_unsafe.default",
        "inplace::execute.default",
        "os.system",
    ],
)
def test_a_graph_that_calls_what_reaches_outside_is_refused(
    target: str, model: Path, tmp_path: Path
) -> None:
    path = model / "1" / ENGINE
    graph = graph_json(path)
    call = {"name": "planted", "target": target, "args": [str(tmp_path / "marker"), True, 4]}
    graph["graph"]["nodes"].insert(0, call)
    replace_graph(path, graph)
    exchange(model / "1", ENGINE, path.read_bytes())
    refuse(open_instance, model, tmp_path)


@pytest.mark.parametrize("text", ["open({marker!r}, 'w')", "Function('f')(open({marker!r}, 'w'))"])
def test_code_in_place_of_an_extent_is_refused(text: str, engine: Path, tmp_path: Path) -> None:
    text = text.format(marker=str(tmp_path / "marker"))
    edit(
        engine,
        lambda record: record["call"]["arguments"][0].update(shape=[text]),
        STANDALONE_FILE,
    )
    refuse(inplace.load, engine, tmp_path)


def tree_text(kind: str, context: Any) -> str:
    leaf: Any = {"type": None, "context": None, "children_spec": []}
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])


def replace_tree(record: dict[str, Any], text: str) -> None:
    assert "out_spec" in record["call"]
    record["call"]["out_spec"] = text


def test_trees_import_no_module(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    enum = json.dumps([{"__enum__": True, "fqn": "planted:Enum", "name": "A"}])
    texts = [
        tree_text(
            "collections.defaultdict",
            {
                "default_factory_module": module,
                "default_factory_name": name,
                "dict_context": ["count"],
            },
        )
        for module, name in (("planted", "x"), ("builtins", "breakpoint"), ("os", "getcwd"))
    ]
    texts += [tree_text("builtins.dict", enum), "[" * 100_000, "[1, 2]", "x"]
    for text in texts:
        edit(engine, partial(replace_tree, text=text), STANDALONE_FILE)
        refuse(inplace.load, engine, tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        (1, {"a": [2, None], "b": ()}),
        collections.defaultdict(int, {"q": 1}),
        collections.OrderedDict(x=1),
        {torch.optim.lr_scheduler.LRScheduler.__name__: 1, 7: 2},
        collections.deque([1]),
    ],
)
def test_trees_of_pythons_own_containers_can_be_read(tree: Any) -> None:
    spec = pytree.tree_structure(tree)
    assert load_tree(pytree.treespec_dumps(spec)) == spec


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{% for m in messages %}{{ m.__init__.__globals__ }}{% endfor %}",
    "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_is_not_read_at_load_and_is_rendered_in_a_sandbox(
    template: str, model: Path, tmp_path: Path
) -> None:
    template = template.replace("MARKER", str(tmp_path / "marker"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model / "1" / "tokenizer")
    assert open_instance(model)
    sequence: Any = None  # it is not used before the first message
    with pytest.raises(BuildError, match="chat template cannot be rendered"):
        Conversation(sequence, tokenizer)
    assert not (tmp_path / "marker").exists()

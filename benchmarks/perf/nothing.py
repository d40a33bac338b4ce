"""A model of Triton's own Python backend that computes nothing: the cost of a request alone.

It takes the same requests with the same configuration, reads what must be read of each, and answers
with a constant.
"""

from pathlib import Path

SOURCE = """
import numpy as np
import triton_python_backend_utils as pb_utils


def answer(request):
    request.flags(), request.correlation_id(), request.request_id(), request.parameters()
    for tensor in request.inputs():
        tensor.name(), tensor.to_dlpack()
    request.requested_output_names()
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", np.array([[5]]))])


class TritonPythonModel:
    def execute(self, requests):
        if DECOUPLED:
            for request in requests:
                sender = request.get_response_sender()
                sender.send(answer(request), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return None
        return [answer(request) for request in requests]
"""


def write_nothing(folder: Path, config: str, output: str, *, decoupled: bool) -> None:
    """Write the model.

    Args:
        folder: where, in a model repository.
        config: the ``config.pbtxt`` of the model that it stands for.
        output: the name of its token output, INT64 ``[1]``.
        decoupled: whether it must send its responses.
    """
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config.replace('backend: "inplace"', 'backend: "python"'))
    (folder / "1" / "model.py").write_text(
        SOURCE.replace("OUTPUT", output).replace("DECOUPLED", str(decoupled))
    )

"""``proxy.json``: the file of a generate proxy (`inplace.server.generate_proxy`)."""

from typing import ClassVar, Literal

from pydantic import Field

from inplace.schema.files import RecordFile

FILE_NAME = "proxy.json"


SUFFIX = "_generate"
"""The generate proxy of the model ``name`` is the model ``name_generate``."""


class ProxyFile(RecordFile):
    """The contents of ``proxy.json``.

    Attributes:
        model: the stream model that requests are passed on to.
        has_tokenizer: whether that model has a tokenizer, so that requests may be texts.
        has_logprobs: whether that model returns log-probabilities.
        max_requests: requests that run or wait at the same time; more are refused.
    """

    file_name: ClassVar[str] = FILE_NAME
    rebuild: ClassVar[str] = "build its stream model again with `inplace build … --serve stream`"
    manifest_version: Literal[2] = 2
    model: str
    has_tokenizer: bool
    has_logprobs: bool = False
    max_requests: int = Field(ge=1)

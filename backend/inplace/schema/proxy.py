"""``front.json``: the file of a generate proxy (`inplace.server.generate_proxy`)."""

from typing import ClassVar, Literal

from pydantic import Field

from inplace.schema.records import RecordFile

FILE_NAME = "front.json"


SUFFIX = "_generate"
"""The generate proxy of the model ``name`` is the model ``name_generate``."""


class ProxyFile(RecordFile):
    """The contents of ``front.json``.

    Attributes:
        model: the stream model that requests are passed on to.
        max_requests: requests that run or wait at the same time; more are refused. ``most`` in
            the file.
    """

    file_name: ClassVar[str] = FILE_NAME
    manifest_version: Literal[1] = 1
    model: str
    max_requests: int = Field(ge=1, validation_alias="most", serialization_alias="most")

"""The served models that the front end offers, from their folders in the model repository."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from inplace.client.recordings import AudioFormat
from inplace.drivers.detokenizer import TOKENIZER_FOLDER, load_tokenizer
from inplace.errors import LoadError
from inplace.openai.calls import FORMATS, CallFormat, format_of_template
from inplace.openai.templates import ChatTemplate, TemplateError
from inplace.openai.tokenizer import TextTokenizer
from inplace.protocol import PREFIX_REUSE, PREFIX_WITHOUT_KEY
from inplace.schema.files import EngineFolder
from inplace.schema.served import FILE_NAME, Manifest

log = logging.getLogger("inplace.openai")

VERSION = "1"
"""The folder of an engine in a model's folder."""

CHAT_TEMPLATE = f"{TOKENIZER_FOLDER}/chat_template.jinja"

TOKENIZER_CONFIG = f"{TOKENIZER_FOLDER}/tokenizer_config.json"

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
"""The tokens of a tokenizer's configuration that chat templates know."""

REPLY_PLACEHOLDER = "\u241e"
"""A reply in the chat that is rendered to see what the template puts after one."""


@dataclass(frozen=True)
class ServedModel:
    """A language model that is served as a stream.

    Attributes:
        name: of the model in tritonserver.
        tokenizer: its own.
        template: its chat template; None if it has none.
        turn_end: the token that the template puts after a reply; None if that is not a token.
        capacity: positions of a sequence; None without a limit.
        created: when it was built, in seconds since 1970.
        call_format: how it calls tools; None if that is not known.
        reuses_prefixes: prompts of one API key use what earlier ones have computed.
        reuses_without_key: so do prompts of clients without an API key, all with each other.
        forks: a prompt may be computed in two parts, so that the choices of a request can share it.
    """

    name: str
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    turn_end: int | None
    capacity: int | None
    created: int
    call_format: CallFormat | None = None
    reuses_prefixes: bool = False
    reuses_without_key: bool = False
    forks: bool = False


@dataclass(frozen=True)
class SpeechModel:
    """A speech model that is served as a stream and answers with text.

    Attributes:
        name: of the model in tritonserver.
        format: what it takes.
        created: when it was built, in seconds since 1970.
        capacity: None; its sequences do not consist of tokens.
    """

    name: str
    format: AudioFormat
    created: int
    capacity: None = None


def load_models(
    repository: Path | str, call_formats: Sequence[str] = ()
) -> dict[str, ServedModel | SpeechModel]:
    """The language and speech models of a repository that are served as streams, by name.

    One that cannot be read is left out, with a warning.

    Args:
        repository: the folder of the models.
        call_formats: names of formats of calls of tools, ``hermes`` for all language models, or
            ``model=hermes`` for one; the others have that of their chat template.

    Raises:
        LoadError: there is none, or one of the formats or its model is not known.
    """
    repository = Path(repository)
    models: dict[str, ServedModel | SpeechModel] = {}
    for file in sorted(repository.glob(f"*/{VERSION}/{FILE_NAME}")):
        try:
            if (model := _load(file.parent.parent)) is not None:
                models[model.name] = model
        except LoadError as error:  # Triton does not serve it either, and serves the others
            log.warning("%s is not offered: %s", file.parent.parent.name, error)
    if not models:
        raise LoadError(
            f"{repository} has no language or speech model that can be read, is served as a stream "
            f"and has a tokenizer; build one: `inplace build … --serve stream "
            f"--output {repository}/<name>`"
        )
    _set_call_formats(models, call_formats)
    return models


def _set_call_formats(models: dict[str, ServedModel | SpeechModel], given: Sequence[str]) -> None:
    """Set the formats of calls that the operator has named."""
    parts = [text.rpartition("=") for text in given]
    for name, _, parser in sorted(parts, key=lambda part: bool(part[0])):  # one model's come last
        if parser not in FORMATS:
            raise LoadError(f"there is no format {parser!r} of calls, only {', '.join(FORMATS)}")
        language = [each for each in models.values() if isinstance(each, ServedModel)]
        chosen = [each for each in language if name in ("", each.name)]
        if not chosen:
            raise LoadError(
                f"the format {parser!r} of calls is for {name or 'language models'!r}; there are "
                f"{', '.join(each.name for each in language) or 'none'}"
            )
        models |= {each.name: replace(each, call_format=FORMATS[parser]) for each in chosen}


def _load(path: Path) -> ServedModel | SpeechModel | None:
    config = _triton_config(path)
    parameters = {name: each.string_value for name, each in config.parameters.items()}
    folder = EngineFolder(path / VERSION)
    manifest = Manifest.load(folder.path)
    if parameters.get("serve") != "stream":
        return None
    loaded = load_tokenizer(folder, manifest)
    if loaded is None:
        return None
    name, created = config.name or path.name, int((folder.path / FILE_NAME).stat().st_mtime)
    if (audio := AudioFormat.of_config(config)) is not None:
        return SpeechModel(name, audio, created)
    if manifest.is_scheduled:
        return None
    tokenizer = TextTokenizer(loaded)
    template = _template(folder, manifest)
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        template=template,
        turn_end=None if template is None else _turn_end(template, tokenizer),
        capacity=int(parameters.get("capacity", manifest.capacity or 0)) or None,
        created=created,
        call_format=None if template is None else format_of_template(template.source),
        reuses_prefixes=parameters.get(PREFIX_REUSE) == "on",
        reuses_without_key=parameters.get(PREFIX_WITHOUT_KEY) == "on",
        forks=not any(program.lookahead for program in manifest.programs),
    )


def _triton_config(path: Path) -> Any:
    file = path / "config.pbtxt"
    try:
        return text_format.Parse(file.read_text(), pb.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error


def _template(folder: EngineFolder, manifest: Manifest) -> ChatTemplate | None:
    """The chat template, from the file that transformers writes."""
    if not manifest.has_file(CHAT_TEMPLATE):
        return None
    source = bytes(folder.read(manifest.file(CHAT_TEMPLATE))).decode()
    fields = {}
    if manifest.has_file(TOKENIZER_CONFIG):
        fields = json.loads(bytes(folder.read(manifest.file(TOKENIZER_CONFIG))))
    tokens = {}
    for name in TOKEN_NAMES:
        token = fields.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return ChatTemplate(source, tokens)


def _turn_end(template: ChatTemplate, tokenizer: TextTokenizer) -> int | None:
    """The token behind a reply: a tokenizer's end token is not always the one that ends a turn."""
    chat = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": REPLY_PLACEHOLDER},
    ]
    try:
        rendered = template.render(chat, add_generation_prompt=False)
    except TemplateError:  # it takes other chats only
        return None
    return tokenizer.first_added_token(rendered.partition(REPLY_PLACEHOLDER)[2])

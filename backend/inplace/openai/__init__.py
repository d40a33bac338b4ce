"""A front end that speaks OpenAI's HTTP protocol, over `inplace.client`.

A process of its own beside tritonserver: an ASGI application (`create_app`) and the command
`inplace openai` that runs it. Nothing of the backend imports it.
"""

from inplace.openai.app import create_app
from inplace.openai.limits import Limits
from inplace.openai.models import load_models
from inplace.openai.run import Frontend, run

__all__ = ["Frontend", "Limits", "create_app", "load_models", "run"]

"""The chat page: one file, whose only script is the one in it."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

FILE = "chat.html"


def _digest(tag: str, page: str) -> str:
    """How a policy names the content of the page's only element of this kind."""
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


class ChatPage:
    """The page at ``/``, which talks to this server alone.

    Its Content-Security-Policy lets nothing else run, load or frame it.
    """

    def __init__(self) -> None:
        self._page = files(__package__).joinpath(FILE).read_text(encoding="utf-8")
        policy = (
            "default-src 'none'",
            f"script-src {_digest('script', self._page)}",
            f"style-src {_digest('style', self._page)}",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        )
        self._headers = {
            "content-security-policy": "; ".join(policy),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

    async def get(self, request: Request) -> Response:
        """The page."""
        return Response(self._page, media_type="text/html", headers=self._headers)

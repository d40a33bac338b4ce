"""A visit of the chat page with Chromium (Qt WebEngine), by the environment of `make clients`.

    python visit.py URL KEY

Does what a user does, and prints what the page showed as JSON. It waits for what it needs, up to
`PATIENCE` seconds each time.
"""

import json
import os
import sys
import time
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"

from PyQt6.QtCore import QEventLoop, QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWidgets import QApplication

PATIENCE = 120.0

MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
"""What would run if the page took texts for HTML."""


class Page(QWebEnginePage):
    """The page, and what its console says."""

    def __init__(self) -> None:
        super().__init__()
        self.console: list[str] = []

    def javaScriptConsoleMessage(  # noqa: N802 (Qt's name)
        self, level: Any, text: str, line: int, source: str
    ) -> None:
        self.console.append(text)

    def run(self, script: str) -> Any:
        """The value of an expression."""
        loop, values = QEventLoop(), []

        def done(value: Any) -> None:
            values.append(value)
            loop.quit()

        self.runJavaScript(f"JSON.stringify({script})", done)
        QTimer.singleShot(int(PATIENCE * 1000), loop.quit)
        if not values:
            loop.exec()
        return json.loads(values[0])

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition}; the console says {self.console}")
            pause = QEventLoop()
            QTimer.singleShot(50, pause.quit)
            pause.exec()

    def open(self, url: str) -> None:
        loop = QEventLoop()
        self.loadFinished.connect(loop.quit)
        self.load(QUrl(url))
        loop.exec()


def turn(page: Page, text: str, **settings: object) -> dict[str, Any]:
    """Send a message, wait for the end of the answer; returns what the page shows then."""
    send(page, text, **settings)
    page.wait("!$('send').disabled")
    return shown(page)


def send(page: Page, text: str, **settings: object) -> None:
    for name, value in {"text": text, **settings}.items():
        page.run(f"$({json.dumps(name)}).value = {json.dumps(str(value))}")
    page.run("$('send').click() ?? null")


def shown(page: Page) -> dict[str, Any]:
    return {
        "messages": page.run("[...$('messages').children].map(e => [e.className, e.textContent])"),
        "status": page.run("$('status').textContent"),
        "error": page.run("$('error').textContent"),
        "elements": page.run("document.querySelectorAll('#messages > div > *, img').length"),
        "title": page.run("document.title"),
    }


def main(url: str, key: str) -> dict[str, Any]:
    """The visit."""
    page = Page()
    page.open(url)
    page.wait("$('error').textContent !== ''")
    result: dict[str, Any] = {"without a key": shown(page)}
    page.run(f"$('key').value = {json.dumps(key)}")
    page.run("$('key').dispatchEvent(new Event('change'))")
    page.wait("$('model').options.length > 0")
    result["models"] = page.run("[...$('model').options].map(e => e.value)")
    result["first"] = turn(page, "What is a Derivative Work?", temperature=0, max_tokens=12)
    result["second"] = turn(page, "And a Source?")
    result["refused"] = turn(page, "x", max_tokens=0)
    result["markup"] = turn(page, MARKUP, max_tokens=4)
    page.run("$('clear').click() ?? null")
    send(page, "Go on.", max_tokens=100000)
    page.wait("$('messages').children.length === 2 && $('messages').lastChild.textContent !== ''")
    page.run("$('stop').click() ?? null")
    page.wait("!$('send').disabled")
    result["stopped"] = shown(page)
    result["console"] = page.console
    return result


if __name__ == "__main__":
    application = QApplication(sys.argv[:1])
    print(json.dumps(main(*sys.argv[1:])), flush=True)
    os._exit(0)  # Qt's own end waits for the processes of pages

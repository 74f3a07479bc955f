"""A notebook in JupyterLab, in a headless Chromium, driven over the WebDriver protocol with urllib alone.

`open_notebook(path)` is a context: it starts a server and a browser of their own, runs all cells, yields the `Page`,
and ends both, whatever happens. What they write (settings, history, caches) goes into the notebook's folder, so let
that be a temporary one.
"""
from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of a found element in every answer of the protocol
TIMEOUT = 180  # seconds, for anything one waits for: seconds on a machine that is idle, a minute on a busy one
KEYS = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "Tab": "\ue004"}
# No proxy of the environment stands between this machine and itself.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def missing() -> str | None:
    """What this machine lacks for a test in a browser; None: nothing."""
    for name in ("chromium", "chromedriver"):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    return None


def wait_for(what: str, ready: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
    """The first value of `ready()` that is true, asked for again and again. AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (found := ready()):
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.1)
    return found


def request(url: str, body: dict | None = None, method: str | None = None) -> Any:
    """JSON of an address; RuntimeError with what the server says of an error."""
    data = None if body is None else json.dumps(body).encode()
    sent = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with DIRECT.open(sent, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.read().decode(errors='replace')[:2000]}") from error


class Page:
    """A page of the browser. Elements are named by CSS selectors; scripts are bodies of functions."""

    def __init__(self, session: str) -> None:
        self.session = session

    def script(self, code: str, *arguments: Any) -> Any:
        """What the script returns; a promise is waited for. `arguments` are its arguments."""
        return request(f"{self.session}/execute/sync", {"script": code, "args": arguments})["value"]

    def press(self, key: str) -> None:
        """Press and release a key, as from the keyboard: whatever has the focus gets it."""
        actions = [{"type": kind, "value": KEYS[key]} for kind in ("keyDown", "keyUp")]
        request(f"{self.session}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def accessible(self, selector: str) -> list[tuple[str, str]]:
        """Role and name, as a screen reader gets them, of the elements of a selector."""
        found = request(f"{self.session}/elements", {"using": "css selector", "value": selector})["value"]
        urls = [f"{self.session}/element/{element[ELEMENT]}" for element in found]
        return [tuple(request(f"{url}/computed{kind}")["value"] for kind in ("role", "label")) for url in urls]


@contextmanager
def open_notebook(path: Path) -> Iterator[Page]:
    """The notebook in the browser, all of its cells run. AssertionError where one fails, or takes too long."""
    with ExitStack() as stack:
        server = stack.enter_context(jupyter_lab(path.parent))
        page = stack.enter_context(chromium(path.parent))
        url, _, query = server.partition("?")
        request(f"{page.session}/url", {"url": f"{url}lab/tree/{path.name}?{query}"})
        # The page has not the focus yet, so JupyterLab has no current notebook: it is told which.
        find = "[...(window.jupyterapp?.shell.widgets('main') ?? [])].find(widget => widget.sessionContext)"
        open_one = f"const lab = window.jupyterapp, book = {find};"
        kernel = f"{open_one} return book?.sessionContext.session?.kernel?.status === 'idle';"
        cells = f"{open_one} return book.model.toJSON().cells.filter(cell => cell.cell_type === 'code');"
        wait_for("the kernel", lambda: page.script(kernel))
        page.script(f"{open_one} lab.shell.activateById(book.id); lab.commands.execute('notebook:run-all-cells');")
        wait_for("all cells to be run", lambda: all(cell["execution_count"] for cell in page.script(cells)))
        wait_for("the kernel", lambda: page.script(kernel))
        outputs = [output for cell in page.script(cells) for output in cell["outputs"]]
        errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
        assert not errors, errors
        yield page


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """A JupyterLab server of a folder: its address with the token, "http://127.0.0.1:8890/?token=...\""""
    port, token, runtime = free_port(), secrets.token_hex(16), folder / "runtime"
    options = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.root_dir": folder,
               "ServerApp.allow_root": True, "ServerApp.open_browser": False, "LabApp.expose_app_in_browser": True,
               "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    folders = {"HOME": folder, "JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_CONFIG_DIR": folder / "config",
               "JUPYTER_DATA_DIR": folder / "data", "IPYTHONDIR": folder / "ipython"}
    environment = {**{k: str(v) for k, v in folders.items()}, "JUPYTER_TOKEN": token,
                   "MPLCONFIGDIR": matplotlib.get_cachedir(), "PYTHONDONTWRITEBYTECODE": "1"}
    with process(command, folder / "jupyter.log", environment):
        def found() -> str | None:  # it may have taken another port
            files = list(runtime.glob("jpserver-*.json"))
            return json.loads(files[0].read_text())["url"] if files and files[0].read_text().endswith("}") else None

        url = wait_for("JupyterLab", found)
        wait_for("JupyterLab", lambda: answers(f"{url}api/status?token={token}"))
        yield f"{url}?token={token}"


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A page of a new headless browser that keeps its profile in the folder."""
    port = free_port()
    # A tall window: what lies outside of it JupyterLab may leave out of the page.
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--window-size=1400,3000", f"--user-data-dir={folder / 'chromium'}"]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []  # which root must do without
    wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
              "timeouts": {"script": 1000 * TIMEOUT, "pageLoad": 1000 * TIMEOUT}}
    with process([shutil.which("chromedriver"), f"--port={port}"], folder / "chromedriver.log", {"HOME": str(folder)}):
        url = f"http://127.0.0.1:{port}"
        wait_for("chromedriver", lambda: answers(f"{url}/status"))
        made = request(f"{url}/session", {"capabilities": {"alwaysMatch": wanted}})["value"]
        session = f"{url}/session/{made['sessionId']}"
        try:
            yield Page(session)
        finally:
            request(session, method="DELETE")


@contextmanager
def process(command: list, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, which is ended with all that it started: first asked to, then made to."""
    with log.open("wb") as file:
        started = subprocess.Popen([str(part) for part in command], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                   cwd=log.parent, env={**os.environ, **environment}, start_new_session=True)
    try:
        yield started
    except BaseException:
        print(f"{log.name}: {log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        raise
    finally:
        started.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            started.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def answers(url: str) -> bool:
    """Does a server answer there yet?"""
    try:
        return bool(request(url))
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Run the clients that people already have against a server, and print a table client × call.

    python -m tests.clients
    python -m tests.clients --only curl,java --url http://127.0.0.1:8000

Every client has an environment of its own in .clients (network; minutes at the first run). A client
that cannot be installed is skipped with the reason. Each also runs its snippet of docs/clients.md,
or docs/automatic1111.md,
with the server's address in place of 127.0.0.1:8000. Without --url, the server is this code with a
worker that draws single colours. Exits with 1 if a call failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from tests.clients import openai_tests
from tests.clients.registry import CALLS, CLIENTS, Client

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
DOCUMENTS = tuple(ROOT / "docs" / name for name in ("clients.md", "automatic1111.md"))
ADDRESS = "127.0.0.1:8000"
OPENAI_TESTS = "openai's own tests"
INSTALL_S, RUN_S = 900, 300
SERVED = "a server with the embedded weights"
FAKE = "a server whose worker draws single colours"
# Applications name models and sizes that no weights here have, and speak AUTOMATIC1111.
SETTINGS = "MODEL_ALIASES=*=tiny SIZES=nearest SDAPI=true"
SNIPPET = re.compile(
    r"<!-- client: (?P<name>\S+) -->\n```(?P<kind>\w+)\n(?P<code>.*?)```", re.DOTALL
)
FILES = {
    "python": "py",
    "javascript": "mjs",
    "java": "java",
    "go": "go",
    "ruby": "rb",
    "php": "php",
    "sh": "sh",
    "yaml": "yaml",
}
STARTERS = {
    "mjs": ["node"],
    "java": ["java"],
    "go": ["go", "run"],
    "rb": ["ruby"],
    "php": ["php"],
    "sh": ["bash"],
}
# Between them stand the results in docs/clients.md.
MARKS = ("<!-- client-test -->", "<!-- /client-test -->")
SIGNATURES = {".png": b"\x89PNG", ".webp": b"RIFF"}
# The tests' worker ends at once, unless the prompt begins so: it then draws previews and waits.
DRAWN_SLOWLY, HELD = "a yellow star", "show-hold"


@dataclass(slots=True)
class Result:
    """What became of one client: by call, whether it succeeded and a note.

    versions: of the packages or programs.
    """

    client: str
    calls: dict[str, tuple[bool, str]] = field(default_factory=dict)
    skipped: str = ""
    versions: str = ""

    @property
    def failed(self) -> bool:
        """Return whether any call failed."""
        return any(not ok for ok, _ in self.calls.values())


class NotInstalledError(Exception):
    """A client cannot be installed; the message is the reason."""


# ── server ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def server(settings: str) -> Iterator[str]:
    """Start a server with a fake worker; give its address once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    given = dict(pair.split("=", 1) for pair in settings.split())
    environment = {f"PAELLERA_{name}": value for name, value in given.items()}
    command = [sys.executable, "-m", "tests.fake_server", "main", "--port", str(port)]
    log = ROOT / ".clients" / "server.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=os.environ | environment | {"PAELLERA_LOG_LEVEL": "warning"},
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_ready(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raise RuntimeError if the server ends, or is not ready after two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/readyz", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


# ── environments ──────────────────────────────────────────────────────────────────────────────────


def install(client: Client, directory: Path) -> None:
    """Install the client's packages. Raises NotInstalledError with the reason."""
    missing = [each for each in client.commands if shutil.which(each) is None]
    if missing:
        raise NotInstalledError(f"no {', '.join(missing)}")
    done = directory / "installed.json"
    if done.exists() and json.loads(done.read_text()) == list(client.packages):
        return
    directory.mkdir(parents=True, exist_ok=True)
    if client.language == "node":
        packages = [
            "npm",
            "install",
            "--prefix",
            ".",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ]
        checked([*packages, *client.packages], directory)
    elif client.packages:
        uv = [sys.executable, "-m", "uv", "--quiet"]
        checked([*uv, "venv", "--clear", "--python", sys.executable, "venv"], directory)
        checked([*uv, "pip", "install", "--python", "venv/bin/python", *client.packages], directory)
    done.write_text(json.dumps(client.packages))


def installed(client: Client) -> str:
    """Install the client; return ok, or why not."""
    try:
        install(client, ROOT / ".clients" / client.name)
    except NotInstalledError as reason:
        return f"skipped: {reason}"
    return "ok"


def checked(command: Sequence[str], directory: Path) -> None:
    """Run an installer. Raises NotInstalledError with the end of what it said."""
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(str(error)) from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise NotInstalledError(" ".join(said[-3:])[:300])


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────


def snippets() -> dict[str, tuple[str, str]]:
    """Return kind and code of the documents' snippets by client."""
    found = (match for each in DOCUMENTS for match in SNIPPET.finditer(each.read_text()))
    return {match["name"]: (match["kind"], match["code"]) for match in found}


def addressed(code: str, address: str) -> str:
    """Return a snippet with the server's address in place of the document's."""
    place = urlsplit(address)
    return code.replace(ADDRESS, place.netloc).replace("port=8000", f"port={place.port}")


def run(client: Client, address: str, model: str, directory: Path, held: bool = False) -> Result:
    """Install the client; run its program and its snippet. held: by the tests' worker."""
    result = Result(client.name)
    try:
        install(client, directory)
    except NotInstalledError as reason:
        result.skipped = str(reason)
        return result
    result.versions = versions(client, directory)
    work = directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(PROGRAMS, work)
    environment = os.environ | {"CLIENT_TEST_URL": address, "CLIENT_TEST_MODEL": model}
    environment |= {"PATH": f"{directory / 'venv' / 'bin'}:{os.environ['PATH']}", "NO_COLOR": "1"}
    kind, code = snippets().get(client.name, ("", ""))
    snippet = work / f"snippet.{FILES.get(kind, 'txt')}"
    code = code.replace(DRAWN_SLOWLY, HELD) if held else code
    snippet.write_text(addressed(code, address))
    if kind not in ("", "yaml"):
        returned, output = executed(client, snippet, environment)
        wrong = misnamed(work)
        note = (
            output.strip().splitlines()[-1:]
            if returned
            else [f"no image: {each}" for each in wrong]
        )
        result.calls["snippet"] = not returned and not wrong, " ".join(note)[:300]
    returned, output = executed(client, work / client.program, environment)
    for line in output.splitlines():
        if line.startswith('{"call"'):
            call = json.loads(line)
            result.calls[call["call"]] = call["ok"], call["note"]
    if returned:
        result.calls["end"] = False, " ".join(output.strip().splitlines()[-2:])[:300]
    return result


def misnamed(directory: Path) -> list[str]:
    """Return the names of a snippet's files that are not of the type that they are named after."""
    files = [file for file in directory.iterdir() if file.suffix in SIGNATURES]
    return [file.name for file in files if file.read_bytes()[:4] != SIGNATURES[file.suffix]]


def executed(client: Client, file: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a program in its folder; return its exit status and output, errors included."""
    python = file.parents[1] / "venv" / "bin" / "python"
    starter = STARTERS.get(file.suffix[1:], [str(python)])
    command = [*starter, file.name]
    try:
        done = subprocess.run(
            command,
            cwd=file.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_S,
        )
    except subprocess.TimeoutExpired as error:
        return 124, f"{client.name}: no end after {error.timeout:.0f} s"
    return done.returncode, done.stdout


def versions(client: Client, directory: Path) -> str:
    """Return the versions of a client's packages, or else of its programs."""
    names = [re.split(r"[\[<>=]|(?<=.)@", package)[0] for package in client.packages]
    if client.language == "node":
        files = (directory / "node_modules" / name / "package.json" for name in names)
        found = [json.loads(file.read_text())["version"] for file in files]
    elif client.packages:
        code = (
            "import importlib.metadata, sys; print(*map(importlib.metadata.version, sys.argv[1:]))"
        )
        python = str(directory / "venv/bin/python")
        found = subprocess.check_output([python, "-c", code, *names], text=True).split()
    else:
        names = list(client.commands)
        found = [program_version(name) for name in names]
    return ", ".join(f"{name} {version}" for name, version in zip(names, found, strict=True))


def program_version(name: str) -> str:
    """Return the first number with dots that a program says about itself."""
    command = [name, "version" if name == "go" else "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    match = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return match[0] if match else "?"


def run_openai_tests(address: str, directory: Path) -> Result:
    """Run the OpenAI package's tests of images, fetched with the version that is installed here."""
    import openai

    result = Result(OPENAI_TESTS)
    packages = (f"openai[aiohttp]=={openai.__version__}", "pytest", "pytest-asyncio", "respx")
    client = Client(OPENAI_TESTS, "python", "", (*packages, "pillow", "rich", "pip", "hatchling"))
    try:
        install(client, directory)
        if not (archives := list(directory.glob("openai-*.tar.gz"))):
            download = ["venv/bin/python", "-m", "pip", "download", "--quiet", "--no-deps"]
            checked(
                [*download, "--no-binary=:all:", packages[0].replace("[aiohttp]", "")], directory
            )
            archives = list(directory.glob("openai-*.tar.gz"))
        file = openai_tests.unpack(archives[0], directory)
    except (NotInstalledError, FileNotFoundError, IndexError) as reason:
        result.skipped = str(reason)
        return result
    command = [
        str(directory / "venv/bin/python"),
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(file)],
        cwd=file.parents[2],
        env=os.environ | {"TEST_API_BASE_URL": f"{address}/v1"},
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    (directory / "output.txt").write_text(done.stdout + done.stderr)
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    result.calls["own tests"] = done.returncode == 0, last[0]
    result.versions = f"openai {openai.__version__}"
    return result


# ── report ────────────────────────────────────────────────────────────────────────────────────────


def columns(results: Sequence[Result]) -> list[str]:
    """Return the calls that any client made, the common ones first."""
    made = list(dict.fromkeys(call for result in results for call in result.calls))
    return [
        *(call for call in CALLS if call in made),
        *(call for call in made if call not in CALLS),
    ]


def table(results: Sequence[Result]) -> Table:
    """Return the table client × call: ok, FAILED, or nothing."""
    shown = Table("client", *columns(results))
    for result in results:
        if result.skipped:
            shown.add_row(result.client, "skipped")
            continue
        cells = (result.calls.get(call) for call in columns(results))
        shown.add_row(
            result.client,
            *("" if cell is None else "ok" if cell[0] else "FAILED" for cell in cells),
        )
    return shown


def as_markdown(results: Sequence[Result], server: str) -> str:
    """Return the results as a section of the document. server: what was run against, in words."""
    shown = [call for call in columns(results) if call in CALLS]
    lines = [
        f"{date.today().isoformat()}, {hardware()}, {', '.join(languages())}; {server}:",
        "",
        f"| client | {' | '.join(shown)} | others |",
        f"|{'---|' * (len(shown) + 2)}",
    ]
    for result in results:
        name = f"{result.client} ({result.versions})" if result.versions else result.client
        if result.skipped:
            lines.append(f"| {name} | skipped: {result.skipped} |{' |' * len(shown)}")
            continue
        states = {call: "ok" if ok else "**failed**" for call, (ok, _) in result.calls.items()}
        others = [
            f"{call}: {result.calls[call][1] if call == 'own tests' else state}"
            for call, state in states.items()
            if call not in CALLS
        ]
        cells = (states.get(call, "") for call in shown)
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(others)} |")
    return "\n".join(lines)


def languages() -> list[str]:
    """Return the versions of Python and Node.js."""
    found = [f"Python {platform.python_version()}"]
    return [*found, f"Node.js {program_version('node')}"] if shutil.which("node") else found


def hardware() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    cores = f"{len(os.sched_getaffinity(0))} cores"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return f"{cores} of {name.partition(':')[2].strip()}"
    return f"{cores} of {platform.machine()}"


def write(results: Sequence[Result], server: str) -> None:
    """Put the results into docs/clients.md."""
    before, _, rest = DOCUMENTS[0].read_text().partition(MARKS[0])
    section = f"{MARKS[0]}\n{as_markdown(results, server)}\n{MARKS[1]}"
    DOCUMENTS[0].write_text(before + section + rest.partition(MARKS[1])[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the clients; raise SystemExit with 1 if a call failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--only", help="comma-separated names of clients")
    parser.add_argument("--settings", default=SETTINGS, help=f"of the server; default: {SETTINGS}")
    parser.add_argument("--model", default="tiny", help="name of the served weights")
    parser.add_argument("--write", action="store_true", help="put the table into docs/clients.md")
    parser.add_argument("--install", action="store_true", help="install the clients, run nothing")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else [each.name for each in CLIENTS]
    unknown = set(names) - {client.name for client in CLIENTS} - {"openai-tests"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if options.install:
        for client in CLIENTS:
            if client.name in names:
                print(client.name, installed(client), flush=True)
        return
    console = Console(width=200)
    results = list[Result]()
    with contextlib.ExitStack() as stack:
        address = options.url or stack.enter_context(server(options.settings))
        for client in CLIENTS:
            if client.name in names:
                directory = ROOT / ".clients" / client.name
                held = options.url is None
                results.append(run(client, address, options.model, directory, held))
                report(console, results[-1])
        if "openai-tests" in names or not options.only:
            results.append(run_openai_tests(address, ROOT / ".clients" / "openai-tests"))
            report(console, results[-1])
    console.print(table(results))
    if options.write:
        write(results, SERVED if options.url else FAKE)
    failed = sum(result.failed for result in results)
    skipped = sum(bool(result.skipped) for result in results)
    print(f"{len(results) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)


def report(console: Console, result: Result) -> None:
    """Print what became of one client, for those who wait."""
    if result.skipped:
        console.print(f"{result.client}: skipped: {result.skipped}", markup=False)
    for call, (ok, note) in result.calls.items():
        mark = "ok" if ok else "FAILED"
        console.print(f"{result.client}: {call}: {mark} {note}", markup=False, highlight=False)


if __name__ == "__main__":
    main()

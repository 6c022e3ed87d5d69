"""The clients: what is installed for each, and what is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Client:
    """A client.

    Attributes:
        name: also the mark of its snippet in docs/clients.md.
        language: says how programs and the snippet are run.
        program: file in `programs` that makes all calls.
        packages: from PyPI or npm, by language.
        commands: programs of the system that must be there.
        needs: settings of the server without which the client cannot work.
    """

    name: str
    language: Literal["python", "node", "java", "go", "ruby", "php", "shell"]
    program: str
    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    needs: str = ""


CLIENTS = (
    Client("openai-python", "python", "openai_sync.py", ("openai>=2",)),
    Client("openai-python-async", "python", "openai_async.py", ("openai>=2",)),
    Client("openai-node-6", "node", "openai_node.mjs", ("openai@6",), ("node", "npm")),
    Client("openai-node-7", "node", "openai_node.mjs", ("openai@7",), ("node", "npm")),
    Client(
        "vercel-ai",
        "node",
        "vercel_ai.mjs",
        ("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"),
        ("node", "npm"),
    ),
    Client("litellm", "python", "litellm_library.py", ("litellm",)),
    Client("litellm-proxy", "python", "litellm_proxy.py", ("litellm[proxy]", "openai>=2")),
    Client("langchain", "python", "langchain_dalle.py", ("langchain-community", "openai>=2")),
    Client("webuiapi", "python", "webuiapi_client.py", ("webuiapi",)),
    Client("aiohttp", "python", "aiohttp_client.py", ("aiohttp",)),
    Client("axios", "node", "axios.mjs", ("axios", "form-data", "node-fetch"), ("node", "npm")),
    Client("java", "java", "Client.java", commands=("java",)),
    Client("go", "go", "client.go", commands=("go",)),
    Client("ruby", "ruby", "client.rb", commands=("ruby",)),
    Client("php", "php", "client.php", commands=("php",)),
    Client("curl", "shell", "curl.sh", commands=("curl",)),
    Client("wget", "shell", "wget.sh", commands=("wget",)),
    Client("httpie", "shell", "httpie.sh", ("httpie",)),
)
# Columns of the table, in this order; others follow.
CALLS = (
    "snippet",
    "models",
    "generate",
    "several",
    "size",
    "url",
    "edit",
    "mask",
    "variation",
    "stream",
    "error",
)

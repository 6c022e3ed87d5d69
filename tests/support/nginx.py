"""An nginx of a test's own."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

MAIN = """
{user}
daemon off;
pid {directory}/pid;
error_log {directory}/error.log notice;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/paellera.conf;
}}
"""


def start_nginx(directory: Path, configuration: str) -> subprocess.Popen[bytes]:
    """Start nginx with this configuration of its servers. Raises CalledProcessError."""
    (directory / "paellera.conf").write_text(configuration)
    # Otherwise its workers could not enter the test's folder.
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(MAIN.format(user=user, directory=directory))
    command = ["nginx", "-p", str(directory), "-c", str(directory / "nginx.conf")]
    command += ["-e", str(directory / "error.log")]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}
    subprocess.run([*command, "-t"], env=environment, check=True, capture_output=True)
    return subprocess.Popen(command, env=environment)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

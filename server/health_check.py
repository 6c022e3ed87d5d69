"""Ask the server of this environment whether it is ready; for the image's health check.

python -m server.health_check

Exit code 0 if /readyz answers 200, else 1 with the reason. Reads `PAELLERA_HOST`, `PAELLERA_PORT`
and `PAELLERA_OPERATIONS_PORT` like `paellera serve`, but imports only the standard library, so that
it takes little of a busy machine's time.
"""

from __future__ import annotations

import ipaddress
import os
import sys
import urllib.request
from collections.abc import Mapping

from server.environment import given_settings

TIMEOUT_S = 4.0


def address(environment: Mapping[str, str]) -> str:
    """Return the URL of /readyz. Raises ValueError for a port that is no number."""
    given = given_settings(environment, ("host", "port", "operations_port"))
    values = {field: environment[name] for field, name in given.items()}
    host = values.get("host", "127.0.0.1")
    port = int(values.get("operations_port") or values.get("port", "8000"))
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}/readyz"
    if parsed.is_unspecified:
        # Listening on all addresses includes the loopback's of the same kind.
        parsed = ipaddress.ip_address("127.0.0.1" if parsed.version == 4 else "::1")
    return f"http://{f'[{parsed}]' if parsed.version == 6 else parsed}:{port}/readyz"


def main() -> None:
    """Run the check. Raises SystemExit."""
    # Never through a proxy of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        url = address(os.environ)
    except ValueError as error:
        sys.exit(str(error))
    try:
        opener.open(url, timeout=TIMEOUT_S).close()
    except OSError as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main()

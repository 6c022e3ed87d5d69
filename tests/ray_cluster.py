"""A Ray of its own with this application, told by lines of JSON what to deploy: python -m
tests.ray_cluster --port 8000.

`{"scale": {…}, "settings": {"PAELLERA_WEIGHTS": "tiny"}, "fake": true}`; says so in a line once
that runs. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

import ray
from ray import serve

from server.engine.worker_process import run_worker
from server.ray_serve import app as ray_app
from tests import fake_worker


def main(port: int) -> None:
    _start_ray()
    serve.start(http_options={"port": port})
    try:
        for line in sys.stdin:
            _deploy(**json.loads(line))
            print("deployed", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def _start_ray() -> None:
    """Tries again: Ray gives its processes half a minute to start, which may be too little while
    the machine has much else to do.
    """
    for last in (False,) * 7 + (True,):
        try:
            # CPUs here only say how many replicas may be placed.
            ray.init(
                num_cpus=64,
                object_store_memory=100 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
            )
            return
        except Exception:
            ray.shutdown()
            if last:
                raise


def _deploy(scale: dict[str, object], settings: dict[str, str], fake: bool) -> None:
    os.environ.update(settings)
    worker = fake_worker.main if fake else run_worker
    serve.run(ray_app.app(ray_app.Scale(**scale, worker=worker)), name="paellera")


if __name__ == "__main__":
    main(int(sys.argv[-1]))

"""How messages cross the pipe between the API process and a worker: a small pickle, then the pixels as they lie in memory.

Not in shared memory: a segment outlives a worker that is killed between making it and telling of it, and a new one's page faults cost
more than the pipe's copies. What lies in a pipe goes with it: whoever dies in the midst of a message has not sent it.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any


def send(connection: Connection, message: object) -> None:
    """Raises OSError if nobody reads any more."""
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send((header, len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    """The next message, once all of it is there. Raises EOFError or OSError if the other end is gone."""
    header, count = connection.recv()
    return pickle.loads(header, buffers=[connection.recv_bytes() for _ in range(count)])

"""Errors of the native operations, in the words of AUTOMATIC1111's clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from server.api.errors import ApiError, from_engine
from server.engine.errors import EngineError

# The setting in place of the native field `timeout_s`.
DEADLINE = "PAELLERA_TIMEOUT_S"


@contextmanager
def as_sent(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors of the server's own endpoints as those of the fields that the client sent.

    names: the client's, by native name.
    """
    try:
        yield
    except EngineError as error:
        raise _renamed(from_engine(error), names) from None
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    where, colon, problem = error.message.partition(":")
    message = names.get(where, where) + colon + problem
    for native, sent in {**names, "timeout_s": DEADLINE}.items():
        # Other names are words too.
        if "_" in native or "." in native:
            message = message.replace(native, sent)
    # These clients send no deadline.
    param = None if error.param == "timeout_s" else error.param
    if param is not None:
        param = names.get(param, param).partition(".")[0]
    return ApiError(error.status, error.code, message, param, error.headers)

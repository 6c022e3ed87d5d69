"""The inference server."""

import os

# FastAPI imports OpenTelemetry's propagators, and the import fails if one that this variable names
# is not installed. Only W3C Trace Context is used (`tracing.py`), whatever the variable says.
os.environ.pop("OTEL_PROPAGATORS", None)

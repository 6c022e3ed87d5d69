"""Words that no error message may have."""

from __future__ import annotations

import re

# Words of pydantic's, and names of types, that tell a client nothing.
JARGON = re.compile(r"Input should|Value error|valid (string|integer|number)|literal\[|function-")

"""OpenAI's own tests of its Python client, against this server instead of its mock.

The package's source archive is fetched, its tests are run and never kept. They send `Example data`
as images, which no server that decodes images accepts, and fields of models that draw SVG,
animations and transparency; these values are replaced before the tests run, nothing else is.
"""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

# What the tests send, as patterns, and what replaces it. Everything else stays as OpenAI wrote it.
REPLACED = (
    (r'b"Example data"', "PICTURE"),
    (r"(image|mask)=open\([^)]*\)", r"\1=PICTURE"),
    (r'background="transparent"', 'background="opaque"'),
    (r'output_format="(gif|svg)"', 'output_format="png"'),
    (r"^ +(complexity|frame_count|frame_duration_ms|markup)=[^\n]*,\n", ""),
    (r"^ +svg=\{.*?^ +\},\n", ""),
)
# A square with a hole, of the size that the tests ask for.
PICTURE = """
import io as _io
import PIL.Image as _Image
_picture = _Image.new("RGBA", (256, 256), (220, 40, 30, 255))
_picture.paste((0, 0, 0, 0), (64, 64, 192, 192))
_file = _io.BytesIO()
_picture.save(_file, "PNG")
PICTURE = _file.getvalue()
"""
CONFIGURATION = """\
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = session
asyncio_default_test_loop_scope = session
"""


def adapted(source: str) -> str:
    """Return the tests with values that this server understands."""
    for pattern, replacement in REPLACED:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE | re.DOTALL)
    head, imports, rest = source.partition("from __future__ import annotations\n")
    return head + imports + PICTURE + rest


def unpack(archive: Path, directory: Path) -> Path:
    """Unpack the package's tests and adapt those of images; return their file.

    Raises FileNotFoundError if the archive has none.
    """
    with tarfile.open(archive) as files:
        members = [each for each in files.getmembers() if "/tests/" in each.name]
        files.extractall(directory, members, filter="data")
    found = next(directory.glob("*/tests/api_resources/test_images.py"), None)
    if found is None:
        raise FileNotFoundError(f"{archive.name} has no tests of images")
    found.write_text(adapted(found.read_text()))
    (found.parents[2] / "pytest.ini").write_text(CONFIGURATION)
    return found

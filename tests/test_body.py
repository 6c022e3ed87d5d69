"""A request with pictures means the same as JSON and as a form, and neither can be made too
large, too deep or too strange.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, Field

from server.api.body import read_body
from server.api.body_limit import TEXT_BODY_BYTES
from server.api.errors import ApiError
from server.api.schemas import Hires, ImageBytes, ImageBytesList, Regions, SamplingFields
from tests.hostile import plain_png

PNG = plain_png()
BASE64 = base64.b64encode(PNG).decode()
LIMIT = 2**21


class Keyframe(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str | None = None
    image: ImageBytes | None = None


class Everything(SamplingFields):
    """One field of every kind that the endpoints with pictures have."""

    prompt: str | None = None
    image: ImageBytes | None = None
    images: Annotated[ImageBytesList, Field(max_length=4, default_factory=list)]
    mask_mode: Literal["alpha", "luminance"] | None = None
    keep_unmasked: bool = True
    keyframes: Annotated[list[Keyframe], Field(max_length=8, default_factory=list)]
    regions: Regions = ()
    hires: Hires | None = None


@pytest.fixture(scope="module")
def endpoint() -> TestClient:
    """An app that answers what it understood."""
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> dict[str, Any]:
        fields = await read_body(request, Everything, LIMIT)
        return Everything.model_validate(fields).model_dump(
            exclude_unset=True, mode="python"
        ) | _lengths(fields)

    app.add_exception_handler(ApiError, lambda _, error: error.response())  # type: ignore[attr-defined, arg-type]
    return TestClient(app)


def _lengths(fields: Everything) -> dict[str, Any]:
    """Pictures as how many bytes they have."""
    told: dict[str, Any] = {"image": len(fields.image)} if fields.image is not None else {}
    if fields.images:
        told["images"] = [len(image) for image in fields.images]
    if fields.keyframes:
        told["keyframes"] = [
            frame.prompt if frame.image is None else len(frame.image) for frame in fields.keyframes
        ]
    return told


def refused(
    answer: httpx.Response,
    status: int,
    param: str | None = None,
    mention: str = "",
    code: str | None = None,
) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert mention in error["message"]
    assert code in (None, error["code"])
    assert len(error["message"]) < 600


def form(
    endpoint: TestClient,
    fields: dict[str, str] | None = None,
    files: Sequence[tuple[str, Any]] = (),
) -> httpx.Response:
    return endpoint.post(
        "/", files=[*((name, (None, text)) for name, text in (fields or {}).items()), *files]
    )


FILE = ("cat.png", PNG, "image/png")


def test_json_and_form_mean_the_same(endpoint: TestClient) -> None:
    plain = {
        "prompt": "7",
        "seed": 7,
        "guidance_scale": [1.0, 4.5],
        "temperature": 0.7,
        "keep_unmasked": False,
        "mask_mode": "alpha",
    }
    sent = {
        **plain,
        "image": BASE64,
        "images": [BASE64, BASE64],
        "keyframes": [{"prompt": "a"}, {"image": BASE64}],
    }
    as_json = endpoint.post("/", json=sent)
    texts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in plain.items()
    }
    files = [("image", FILE), ("images", FILE), ("images", FILE), ("keyframes.1.image", FILE)]
    as_form = form(endpoint, {**texts, "keyframes": '[{"prompt": "a"}, {}]'}, files)
    assert as_json.status_code == 200, as_json.text
    assert as_json.json() == as_form.json()
    assert as_form.json()["prompt"] == "7"
    assert as_form.json()["keyframes"] == ["a", len(PNG)]


@pytest.mark.parametrize(
    "sent",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:;Base64,{BASE64}",
        f"data:text/html;charset=x;base64,{BASE64}",
        f"data:image/png;base64, {BASE64}\n",
        f"  data:image/png; base64,{BASE64}",
        f"data:image/png;base64,{quote(BASE64, safe='')}",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f" {BASE64} ",
        BASE64.replace("+", "-").replace("/", "_"),
        BASE64.replace("+", "-").replace("/", "_").rstrip("="),
        "\r\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
    ],
)
def test_however_base64_is_written_it_is_the_same_picture(endpoint: TestClient, sent: str) -> None:
    assert endpoint.post("/", json={"image": sent}).json() == {"image": len(PNG)}
    assert form(endpoint, {"image": sent}).json() == {"image": len(PNG)}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "https://example.com/a.png",
        "HTTPS://x",
        "file:///etc/passwd",
        "ftp://a",
        "javascript:1",
    ],
)
def test_urls_are_refused_by_name(endpoint: TestClient, url: str) -> None:
    scheme = url.partition(":")[0].lower()
    refused(
        endpoint.post("/", json={"image": url}),
        422,
        "image",
        f"{scheme} URLs are refused",
        "url_refused",
    )
    refused(
        endpoint.post("/", json={"keyframes": [{"image": url}]}),
        422,
        "keyframes",
        "fetches nothing",
        "url_refused",
    )
    refused(form(endpoint, {"image": url}), 422, "image", "fetches nothing", "url_refused")


@pytest.mark.parametrize(
    "sent",
    [
        "/etc/passwd",
        "cat.png",
        BASE64[:-3],
        BASE64.replace("A", " ", 1),
        "é",
        "data:image/png,raw",
        "data:;base64",
    ],
)
def test_what_is_no_base64_is_422(endpoint: TestClient, sent: str) -> None:
    refused(endpoint.post("/", json={"image": sent}), 422, "image", "base64", "invalid_value")


@pytest.mark.parametrize(
    "sent", ["/home/me/cat.png", "cat.png", "C:\\Users\\me\\cat.png", "c:/cat"]
)
def test_a_file_s_path_is_taken_for_one_on_every_system(endpoint: TestClient, sent: str) -> None:
    answer = endpoint.post("/", json={"image": sent})
    refused(answer, 422, "image", "is it the name of a file?", "invalid_value")


def test_base64_may_be_indented(endpoint: TestClient) -> None:
    lines = [BASE64[i : i + 20] for i in range(0, len(BASE64), 20)]
    for sent in ("\n    ".join(lines), " \r\n\t".join(lines), "  \n" + "\n  ".join(lines) + "\n  "):
        assert endpoint.post("/", json={"image": sent}).json() == {"image": len(PNG)}


@pytest.mark.parametrize(
    ("sent", "mention"),
    [
        (BASE64.replace("A", " ", 1), f"character {BASE64.index('A') + 1} is ' ': was '+' decoded"),
        ("cat.png", "character 4 is '.': is it the name of a file?"),
        ("abc\x00", "character 4 is '\\x00'"),
        (f"\ufeff{BASE64}", "is '\\ufeff': the text begins with a byte order mark"),
        (f"data:image/png;base64,data:image/png;base64,{BASE64}", "character 5 is ':': 'data:…;"),
        (f"image/png;base64,{BASE64}", "character 10 is ';': 'data:' is missing before it"),
        (f"image/svg+xml;base64,{BASE64}", "is ';': 'data:' is missing before it"),
        (f"b'{BASE64}'", "character 2 is \"'\": this is Python's b'…'; send base64.b64encode(…)"),
        (f'b"{BASE64}"', "this is Python's b'…'"),
        (f"{BASE64[:76]}\\n{BASE64[76:]}", "character 77 is '\\\\': line breaks are escaped twice"),
        (f"{BASE64[:8]}\\r\\n{BASE64[8:]}", "line breaks are escaped twice; send none"),
        (BASE64 + "ab", "no multiple of 4; it may be cut off"),
        ("QUI=QUJD", "padding, '=', before its end"),
    ],
)
def test_the_message_says_what_is_wrong_with_base64(
    endpoint: TestClient, sent: str, mention: str
) -> None:
    refused(endpoint.post("/", json={"image": sent}), 422, "image", mention, "invalid_value")


@pytest.mark.parametrize("sent", [7, {"url": "x"}, [BASE64], True])
def test_one_picture_is_one_string(endpoint: TestClient, sent: object) -> None:
    refused(endpoint.post("/", json={"image": sent}), 422, "image", "one image")


def test_one_picture_serves_where_several_may_come(endpoint: TestClient) -> None:
    assert endpoint.post("/", json={"images": BASE64}).json() == {"images": [len(PNG)]}
    assert form(endpoint, files=[("images", FILE)]).json() == {"images": [len(PNG)]}
    assert form(endpoint, files=[("images[]", FILE)]).json() == {"images": [len(PNG)]}
    assert form(endpoint, files=[("images", FILE), ("images[]", FILE)]).json() == {
        "images": [len(PNG)] * 2
    }
    refused(form(endpoint, files=[("image", FILE), ("image", FILE)]), 422, "image", "one image")


@pytest.mark.parametrize("text", ["2", "2.0", "2e0", "0.2e1"])
def test_an_integer_may_have_a_fraction_of_zeros(endpoint: TestClient, text: str) -> None:
    assert endpoint.post(
        "/", content=f'{{"seed": {text}}}', headers={"content-type": "application/json"}
    ).json() == {"seed": 2}
    assert form(endpoint, {"seed": text}).json() == {"seed": 2}


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("9007199254740992.0", 2**53),
        ("-9007199254740992.0", -(2**53)),
        ("9007199254740991.0", 2**53 - 1),
        # Beyond 2^53 a float may stand for several integers; the text does not.
        ("9007199254740993.0", 2**53 + 1),
        ("-12345678901234567.0", -12345678901234567),
        ("1e16", 10**16),
        ("1E18", 10**18),
        ("9223372036854775807e0", 2**63 - 1),
        ("9007199254740993.5", None),
        ("1e19", None),
        ("1e999", None),
        ("1e999999999", None),
    ],
)
def test_a_number_is_whole_if_its_text_is(
    endpoint: TestClient, text: str, seed: int | None
) -> None:
    for answer in (
        raw(endpoint, b'{"seed": %s}' % text.encode(), "application/json"),
        form(endpoint, {"seed": text}),
    ):
        if seed is None:
            refused(answer, 422, "seed", "a whole number", "invalid_value")
        else:
            assert answer.json() == {"seed": seed}


def test_no_part_of_a_form_is_written_to_disk(
    endpoint: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    more = 3 << 19  # more than Starlette keeps in memory by itself
    file = ("large.png", PNG + bytes(more), "image/png")
    assert form(endpoint, files=[("image", file)]).json() == {"image": len(PNG) + more}


def test_in_a_form_one_value_is_a_list_of_one_where_only_lists_fit(endpoint: TestClient) -> None:
    assert form(endpoint, {"keyframes": '{"prompt": "a ball"}'}).json() == {"keyframes": ["a ball"]}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("true", True),
        ("True", True),
        ("on", True),
        ("YES", True),
        ("1", True),
        (" FALSE ", False),
        ("Off", False),
        ("no", False),
        ("0", False),
    ],
)
def test_booleans_in_a_form_may_be_written_as_by_programs_and_checkboxes(
    endpoint: TestClient, text: str, meaning: bool
) -> None:
    assert form(endpoint, {"keep_unmasked": text}).json() == {"keep_unmasked": meaning}


@pytest.mark.parametrize(
    ("field", "text", "mention"),
    [
        ("seed", "seven", "a whole number"),
        ("seed", " ", "a whole number"),
        ("seed", "1.5", "a whole number"),
        ("seed", "9" * 5000, "a whole number"),
        ("temperature", "NaN", "finite"),
        ("keep_unmasked", "2", "true or false"),
        ("seed", "on", "a whole number"),
        ("seed", "+-7", "a whole number"),
        ("seed", "\N{ARABIC-INDIC DIGIT ONE}", "a whole number"),
        ("seed", "9" * 100_000 + "x", "a whole number"),
        ("temperature", ".", "a number from 0.05 to 5"),
        ("guidance_scale", "[1", "a number from 0 to 30"),
        ("guidance_scale", "[" * 50_000, "a number from 0 to 30"),
        ("mask_mode", "red", "alpha or luminance"),
        ("keyframes", "[{}", "a list of at most 8"),
        ("promt", "a", "the fields are"),
    ],
)
def test_a_forms_text_that_does_not_fit_is_422_and_named(
    endpoint: TestClient, field: str, text: str, mention: str
) -> None:
    refused(form(endpoint, {field: text}), 422, field, mention)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("temperature", ".5", 0.5),
        ("temperature", "1.", 1),
        ("temperature", "+5e-1", 0.5),
        ("temperature", "00.5", 0.5),
        ("seed", "007", 7),
        ("seed", "+7", 7),
        ("seed", " -7 ", -7),
    ],
)
def test_numbers_in_a_form_may_be_written_as_by_people(
    endpoint: TestClient, field: str, text: str, value: float
) -> None:
    told = form(endpoint, {field: text}).json()[field]
    assert told in (value, [value, value])


@pytest.mark.parametrize("field", ["prompt", "seed", "guidance_scale", "keyframes"])
def test_a_file_where_text_belongs_is_422_and_not_echoed(endpoint: TestClient, field: str) -> None:
    answer = form(endpoint, files=[(field, FILE)])
    refused(answer, 422, field, f"(sent: {len(PNG)} bytes); send it as text, not as a file")


@pytest.mark.parametrize(
    "name",
    [
        "keyframes.2.image",
        "keyframes.x.image",
        "keyframes.-9.image",
        "keyframes.-1.image",
        "keyframes.+1.image",
        "keyframes.0_1.image",
        "keyframes.\N{ARABIC-INDIC DIGIT ONE}.image",
        "keyframes.0.prompt.a",
        "keyframes.00001.image",
        "keyframes.image",
        "keyframes[x][image]",
        "keyframes[][image]",
        "nothing.0.image",
    ],
)
def test_a_file_for_an_entry_that_is_not_there_is_422(endpoint: TestClient, name: str) -> None:
    refused(
        form(endpoint, {"keyframes": '[{"prompt": "a"}, {}]'}, [(name, FILE)]),
        422,
        re.split(r"[.\[]", name)[0],
    )


NESTED = {
    "attention_weights": {"text": 1.1, "image": 2},
    "keyframes": [{"prompt": "größer"}, {"prompt": "7"}],
    "guidance_scale": [1, 2.5],
    "hires": {"scale": 2, "steps": 4, "strength": 0.3},
    "regions": [
        {"prompt": "a", "box": [0, 0, 0.5, 1], "weight": 0.5, "softness": 0},
        {"prompt": "b", "box": [0.5, 0, 1, 1], "weight": 1, "softness": 0},
    ],
}


def named_parts(value: object, name: str, inner: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the parts that hold a value. inner: how the name of a key is written."""
    if not isinstance(value, dict | list):
        yield name, str(value)
        return
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield from named_parts(entry, name + inner.format(key) if name else str(key), inner)


@pytest.mark.parametrize("inner", ["[{}]", ".{}"])
def test_objects_and_lists_in_a_form_may_be_sent_in_parts(endpoint: TestClient, inner: str) -> None:
    parts = list(named_parts(NESTED, "", inner))
    as_json = endpoint.post("/", json=NESTED)
    assert as_json.status_code == 200, as_json.text
    for order in (parts, parts[::-1]):
        assert form(endpoint, dict(order)).json() == as_json.json()


def test_the_parts_of_an_object_may_be_json_lists_and_blank(endpoint: TestClient) -> None:
    box = [(f"regions[0][box][{place}]", (None, text)) for place, text in (("", "0"), ("", ".5"))]
    box += [("regions[0][box][2]", (None, "1")), ("regions[0][box][3]", (None, "1"))]
    parts = {"regions[0][prompt]": "a", "regions[0][mask]": "", "hires[scale]": ""}
    other = {"regions[1].prompt": "b", "regions[1][box]": "[0, 0, 1, 1]", "regions[1].weight": "1"}
    told = form(endpoint, {**parts, **other}, box).json()
    assert [region["box"] for region in told["regions"]] == [[0, 0.5, 1, 1], [0, 0, 1, 1]]
    assert "hires" not in told


def test_files_may_be_the_only_parts_of_objects(endpoint: TestClient) -> None:
    files = [("keyframes[0][image]", FILE), ("keyframes[2].image", FILE)]
    answer = form(endpoint, {"keyframes[1][prompt]": "a"}, files)
    assert answer.json()["keyframes"] == [len(PNG), "a", len(PNG)]


@pytest.mark.parametrize(
    ("parts", "param", "mention"),
    [
        (["keyframes=[{}]", "keyframes.0.prompt=a"], "keyframes", "also sent as one value"),
        (['hires={"scale": 2}', "hires[scale]=2"], "hires", "hires[scale]: hires is also sent"),
        (["hires[scale]=2", "hires.scale=2"], "hires", "hires.scale: sent twice"),
        (["regions[0][box]=[0,0,1,1]", "regions[0][box][0]=0"], "regions", "sent twice"),
        (["regions[0]={}", "regions[1][prompt]=a"], "regions", "regions is also sent as one"),
        (["regions[1][prompt]=a"], "regions", "regions[1][prompt]: no such entry; positions start"),
        (["regions[0][prompt]=a", "regions[2][prompt]=b"], "regions", "have no gaps"),
        (["regions[][prompt]=a"], "regions", "write the entry's position, from 0"),
        (["regions[a][prompt]=a"], "regions", "regions has no such entry; it is a list"),
        (
            ["regions[0].prompt=a", "regions[0].box[0]=a"],
            "regions",
            "regions.0.box.0: must be a number from 0 to 1",
        ),
        (["hires[scale]=x"], "hires", "hires.scale: must be a number from 1 to 4 (sent: 'x')"),
        (["hires[skale]=2"], "hires", "hires.skale: unknown field; did you mean scale?"),
        (["hires[scale][x]=2"], "hires", "hires.scale has no such entry; it is no list"),
        (["hires[0]=2"], "hires", "hires: must be an object with scale"),
        (["seed[x]=2"], "seed", "seed has no such entry; it is no list"),
        (["colour[red]=2"], "colour", "colour: unknown field"),
        (["hires[scale=2"], "hires[scale", "unknown field"),
        ([f"hires{'[x]' * 1000}=2"], "hires", "hires.x: unknown field"),
        ([f"{'x' * 100}.image=2"], "x" * 80, "unknown field"),
        ([".image=2"], ".image", "unknown field"),
    ],
)
def test_parts_that_have_no_place_are_422_and_named(
    endpoint: TestClient, parts: list[str], param: str, mention: str
) -> None:
    texts = [(name, (None, text)) for name, _, text in (each.partition("=") for each in parts)]
    refused(form(endpoint, files=texts), 422, param, mention)


def test_parts_may_be_numbered(endpoint: TestClient) -> None:
    other = ("dog.png", PNG + b"more", "image/png")
    assert form(endpoint, files=[("image[0]", FILE)]).json() == {"image": len(PNG)}
    assert form(endpoint, files=[("image[]", FILE)]).json() == {"image": len(PNG)}
    assert form(endpoint, files=[("images[0]", FILE)]).json() == {"images": [len(PNG)]}
    assert form(endpoint, files=[("images[1]", other), ("images[0]", FILE)]).json() == {
        "images": [len(PNG), len(PNG) + 4]
    }
    refused(form(endpoint, files=[("image[x]", FILE)]), 422, "image", "it is no list")


def test_parts_without_a_number_come_first_in_the_order_in_which_they_were_sent(
    endpoint: TestClient,
) -> None:
    names = ("images[1]", "images[]", "images", "images[0]")
    files = [(name, ("cat.png", PNG + bytes(i), "image/png")) for i, name in enumerate(names)]
    sizes = form(endpoint, files=files).json()["images"]
    assert [size - len(PNG) for size in sizes] == [1, 2, 3, 0]


@pytest.mark.parametrize("name", ["keyframes.1.image", "keyframes[1].image", "keyframes[1][image]"])
def test_a_file_within_an_object_is_named_in_any_of_three_ways(
    endpoint: TestClient, name: str
) -> None:
    answer = form(endpoint, {"keyframes": '[{"prompt": "é"}, {}]'}, [(name, FILE)])
    assert answer.json() == {"keyframes": ["é", len(PNG)]}


@pytest.mark.parametrize("name", ["image", "image[0]", "keyframes.0.image"])
def test_a_file_needs_no_file_name(endpoint: TestClient, name: str) -> None:
    large = PNG + bytes(range(256)) * 1024
    for content in (PNG, large):
        body = part(b"[{}]", b"keyframes") + part(content, name.encode()) + b"--b--\r\n"
        told = raw(endpoint, body).json()
        assert len(content) in (told.get("image"), told["keyframes"][0])
    text = part(BASE64.encode(), b"image") + b"--b--\r\n"
    assert raw(endpoint, text).json() == {"image": len(PNG)}


def raw(
    endpoint: TestClient, body: bytes, content_type: str = "multipart/form-data; boundary=b"
) -> httpx.Response:
    return endpoint.post("/", content=body, headers={"Content-Type": content_type})


def part(value: bytes, name: bytes = b"prompt") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value + b"\r\n"


def test_an_unused_file_input_of_a_browser_counts_as_absent(endpoint: TestClient) -> None:
    body = part(b"a") + part(b"", b'image"; filename="') + b"--b--\r\n"
    assert raw(endpoint, body).json() == {"prompt": "a"}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=b"),
        (b"prompt=a", "multipart/form-data; boundary=b"),
        (part(b"a"), "multipart/form-data; boundary=b"),
        (part(b"a") + b"--c--\r\n", "multipart/form-data; boundary=b"),
        (part(b"a") + b"--b--\r\n", "multipart/form-data; boundary="),
        (
            b"--b\r\nContent-Type: text/plain\r\n\r\na\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
        (
            b"--b\r\n" + b"X: " + b"x" * 100_000 + b"\r\n\r\na\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
        (
            b"--b\r\n" + b"X: x\r\n" * 1000 + b"\r\na\r\n--b--\r\n",
            "multipart/form-data; boundary=b",
        ),
    ],
)
def test_a_malformed_form_is_400(endpoint: TestClient, body: bytes, content_type: str) -> None:
    refused(raw(endpoint, body, content_type), 400, None, "multipart/form-data", "malformed_form")


def test_a_forms_text_is_utf_8_whatever_charset_it_names(endpoint: TestClient) -> None:
    body = part("größer 🎨".encode()) + b"--b--\r\n"
    for charset in (
        "",
        "; charset=utf-8",
        "; charset=punycode",
        "; Charset*=utf-7''x",
        "; charset=zlib",
    ):
        assert raw(endpoint, body, f"multipart/form-data; boundary=b{charset}").json() == {
            "prompt": "größer 🎨"
        }


@pytest.mark.parametrize(
    "body",
    [
        b"".join(part(b"a") for _ in range(65)) + b"--b--\r\n",
        part(b"a" * (TEXT_BODY_BYTES + 1)) + b"--b--\r\n",
        b"".join(part(b"a", b'image"; filename="a') for _ in range(18)) + b"--b--\r\n",
    ],
    ids=["texts", "long text", "files"],
)
def test_a_form_of_too_many_or_too_long_parts_is_413(endpoint: TestClient, body: bytes) -> None:
    refused(raw(endpoint, body), 413, None, "the form is too large", "form_too_large")


def test_json_may_be_long_but_not_intricate(endpoint: TestClient) -> None:
    long = json.dumps({"image": BASE64 + "\n" * 2 * TEXT_BODY_BYTES})
    assert endpoint.post(
        "/", content=long, headers={"Content-Type": "application/json"}
    ).json() == {"image": len(PNG)}
    lists, numbers, objects = (
        b"[]," * TEXT_BODY_BYTES,
        b"1," * (TEXT_BODY_BYTES + 1),
        b'{"a":' * (TEXT_BODY_BYTES + 1),
    )
    for intricate in (b"[" + lists + b"[]]", b"[" + numbers + b"1]", objects):
        refused(raw(endpoint, intricate, "application/json"), 413, None, "commas", "body_too_large")
    refused(
        raw(endpoint, b" " * (LIMIT + 1), "application/json"),
        413,
        None,
        str(LIMIT),
        "body_too_large",
    )


@pytest.mark.parametrize(
    ("commas", "status", "code"),
    [(131_072, 400, "malformed_json"), (131_073, 413, "body_too_large")],
)
def test_a_body_may_have_as_many_commas_as_text_of_128_kib(
    endpoint: TestClient, commas: int, status: int, code: str
) -> None:
    answer = raw(endpoint, b"," * commas + b" ", "application/json")
    refused(answer, status, None, code=code)


def test_the_texts_of_a_form_may_have_as_many_commas_together(endpoint: TestClient) -> None:
    first = part(b"," * 65_536, b"keyframes")
    for commas, status in ((65_536, 422), (65_537, 413)):
        answer = raw(endpoint, first + part(b"," * commas, b"keyframes") + b"--b--\r\n")
        assert answer.status_code == status


def test_all_texts_of_a_form_share_one_bound_on_their_structure(endpoint: TestClient) -> None:
    """64 texts of 128 KiB would each pass alone, and take seconds together."""
    text = b"[" + b"[]," * (TEXT_BODY_BYTES // 6) + b"[]]"
    few = part(text, b"keyframes") + b"--b--\r\n"
    refused(raw(endpoint, few), 422, "keyframes", "at most 8 entries", "invalid_value")
    many = b"".join(part(text, b"keyframes") for _ in range(4)) + b"--b--\r\n"
    refused(raw(endpoint, many), 413, None, "commas", "form_too_large")


@pytest.mark.parametrize(
    ("fields", "param", "mention"),
    [
        ({"images": [1] * 5}, "images", "at most 4 entries (sent: 5)"),
        ({"keyframes": [1] * 9}, "keyframes", "at most 8 entries"),
        ({"guidance_scale": [1] * 3}, "guidance_scale", "at most 2 entries"),
        ({"keyframes": [{f"k{i}": 1 for i in range(2000)}]}, "keyframes", "at all levels"),
        ({"prompt": [[1] * 2000]}, "prompt", "at all levels"),
        ({"prompt": [[1] * 1000]}, "prompt", "at all levels"),
        # As many as allowed: the schema names what is wrong.
        ({"prompt": [[1] * 999]}, "prompt", "must be text"),
        ({"images": [1] * 4}, "images", "one image is expected"),
    ],
)
def test_a_list_s_length_is_checked_before_its_entries(
    endpoint: TestClient, fields: dict[str, Any], param: str, mention: str
) -> None:
    """An entry that is wrong would otherwise be named first."""
    refused(endpoint.post("/", json=fields), 422, param, mention, "invalid_value")


@pytest.mark.parametrize(
    ("encoding", "allowed"),
    [("", True), ("identity", True), (" Identity ", True), ("gzip", False), ("br, gzip", False)],
)
def test_a_body_must_not_be_compressed(endpoint: TestClient, encoding: str, allowed: bool) -> None:
    answer = endpoint.post("/", json={"prompt": "a"}, headers={"Content-Encoding": encoding})
    if allowed:
        assert answer.json() == {"prompt": "a"}
    else:
        refused(answer, 415, None, "Content-Encoding", "unsupported_content_encoding")
        assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=b", "image/png"],
)
def test_other_content_types_are_415_and_both_allowed_ones_named(
    endpoint: TestClient, content_type: str
) -> None:
    refused(raw(endpoint, PNG, content_type), 415, None, "application/json or multipart/form-data")

"""What a client is told when it asks wrongly, too much, or without a key."""

import base64
import contextlib
import json
import logging
import time

import pytest

from jaxherd.inference.server.limits import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi"}]
KEY = "sk-0123456789abcdef"


def answer_of(connection) -> tuple[int, bytes]:
    """Return status and body of the answer on a raw connection, and close it."""
    with contextlib.closing(connection), connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        return status, file.read()


def test_models_and_health(serve):
    handle = serve()
    status, _, body = handle.request("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in body["data"]] == ["tiny"]
    assert handle.request("GET", "/v1/models/tiny")[2] == body["data"][0]
    status, _, body = handle.request("GET", "/v1/models/other")
    assert status == 404 and body["error"]["code"] == "model_not_found"
    status, _, body = handle.request("GET", "/health")
    assert status == 200 and body["status"] == "ok" and body["engine"]["running"] == 0


def test_routes(serve):
    handle = serve()
    for method, path, wanted in [("GET", "/", 404), ("GET", CHAT, 405), ("POST", "/v1/x", 404)]:
        status, _, body = handle.request(method, path)
        assert status == wanted
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert handle.request("POST", TEXT, b"{}", {"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"\xff{}", 400, "not UTF-8"),
        (b'{"temperature": NaN}', 400, "NaN is no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "surrogate"),
        (b'{"n": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b'{"model": "other", "prompt": "x"}', 404, "no model 'other'"),
        (b'{"model": "tiny", "prompt": ""}', 200, None),
        (b'{"model": "tiny", "prompt": [300]}', 400, "outside the vocabulary"),
        (b'{"model": "tiny", "promt": "x"}', 400, "did you mean 'prompt'"),
    ],
)
def test_bodies(serve, body, status, words):
    found, _, told = serve().post(TEXT, body)
    assert found == status, told
    if words is not None:
        assert words in told["error"]["message"]
        assert told["error"]["type"] == "invalid_request_error"


def test_too_large(serve):
    handle = serve(limits=Limits(body_bytes=1000))
    body = json.dumps({"model": "tiny", "prompt": "x" * 2000}).encode()
    # By its announced length, by what comes in chunks, and without being asked to go on.
    status, headers, told = handle.post(TEXT, body)
    assert status == 413 and told["error"]["code"] == "body_too_large"
    assert headers["connection"].lower() == "close"
    chunked = handle.head(TEXT, 0, "Transfer-Encoding: chunked").replace(
        b"Content-Length: 0\r\n", b""
    )
    piece = b"%x\r\n%s\r\n" % (len(body), body)
    status, told = answer_of(handle.raw(chunked + piece + piece + b"0\r\n\r\n"))
    assert status == 413
    status, told = answer_of(handle.raw(handle.head(TEXT, 10**9, "Expect: 100-continue")))
    assert status == 413
    began = time.monotonic()
    # One that goes on for ever is not read for ever.
    status, told = answer_of(handle.raw(handle.head(TEXT, 10**9) + body))
    assert status == 413 and time.monotonic() - began < 10
    assert handle.post(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 1})[0] == 200


def test_a_body_that_does_not_come(serve):
    handle = serve(limits=Limits(body_seconds=1.0))
    status, told = answer_of(handle.raw(handle.head(TEXT, 100) + b'{"model"'))
    assert status == 408 and b"did not arrive" in told
    # A client that goes away within its body leaves nothing behind.
    handle.raw(handle.head(TEXT, 100) + b'{"model"').close()
    assert handle.post(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 1})[0] == 200
    assert handle.service.idle


def test_prompts_that_do_not_fit(serve):
    handle = serve(limits=Limits(prompt_tokens=50))
    ask = {"model": "tiny", "prompt": "x" * 60}
    status, _, told = handle.post(TEXT, ask)
    assert status == 400 and told["error"]["code"] == "context_length_exceeded"
    handle = serve()
    for ask in ({"prompt": "x" * 256}, {"prompt": "x" * 240, "max_tokens": 20}):
        status, _, told = handle.post(TEXT, {"model": "tiny"} | ask)
        assert status == 400 and told["error"]["code"] == "context_length_exceeded"
        assert "256" in told["error"]["message"]


def test_keys(serve, caplog):
    handle = serve(keys=[KEY, "sk-another-one-of-them"])
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    wrong = [{}, {"Authorization": KEY}, {"Authorization": "Bearer "},
             {"Authorization": "Bearer sk-0123456789abcdeX"}, {"Authorization": "Basic " + KEY},
             {"Authorization": "Bearer \xff\xfe"}]  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        for headers in wrong:
            for method, path, body in [("POST", TEXT, ask), ("GET", "/v1/models", None)]:
                status, found, told = handle.request(method, path, body, headers)
                assert status == 401 and told["error"]["code"] == "invalid_api_key"
                assert found["www-authenticate"] == "Bearer"
            assert handle.request("GET", "/health", None, headers)[2] == {"status": "ok"}
        for key in (KEY, "sk-another-one-of-them"):
            allowed = {"Authorization": f"Bearer {key}"}
            assert handle.post(TEXT, ask, allowed)[0] == 200
            assert "engine" in handle.request("GET", "/health", None, allowed)[2]
    assert KEY not in caplog.text and "0123456789abcdeX" not in caplog.text


def test_names_of_the_host(serve):
    """A page that had its own name point here is refused; a server with keys is for all names."""
    ask = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    handle = serve()
    status, _, told = handle.post(TEXT, ask, {"Host": "evil.example:80"})
    assert status == 403 and told["error"]["code"] == "host_not_allowed"
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert handle.post(TEXT, ask, {"Host": host})[0] == 200
    allowed = {"Host": "models.example", "Authorization": f"Bearer {KEY}"}
    assert serve(keys=[KEY]).post(TEXT, ask, allowed)[0] == 200


def image(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "url, status, code",
    [
        (image(b"\x89PNG rest"), 400, "images_not_supported"),
        ("https://example.org/cat.png", 400, "invalid_image_url"),
        ("file:///etc/passwd", 400, "invalid_image_url"),
        (image(b"<svg/>", "image/svg+xml"), 400, "invalid_image_format"),
        (image(b""), 400, "invalid_image"),
        ("data:image/png;base64,@@@@", 400, "invalid_image"),
        (image(b"x" * 2000), 413, "image_too_large"),
    ],
)
def test_images(serve, url, status, code):
    handle = serve(limits=Limits(image_bytes=1000))
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    ask = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    found, _, told = handle.post(CHAT, ask)
    assert (found, told["error"]["code"]) == (status, code)

"""`jaxherd serve` as a process of its own: begun, used, told to end."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

import jaxherd
from jaxherd.cli.main import main
from jaxherd.data.tokenizers import ByteTokenizer

ASK = {"model": "tiny", "prompt": "On and on", "max_tokens": 150, "temperature": 0, "stream": True}
KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    jaxherd.save(module, folder, format="jaxherd")
    ByteTokenizer().save(folder)
    return folder


def stream(port: int, pieces: list[str], began: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/completions", json.dumps(ASK), headers)
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: {"):
            pieces.append(json.loads(line[6:])["choices"][0]["text"])
            began.set()
        elif line.startswith(b"data: [DONE]"):
            pieces.append("DONE")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(folder, module, number):
    """The stream under way comes to its end, the exit status is 0 and no page is held."""
    command = [
        sys.executable, "-m", "jaxherd.cli.main", "serve", str(folder), "--port", "0", "--slots",
        "2", "--decode-steps", "1",
    ]  # fmt: skip
    environment = os.environ | {"JAXHERD_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        told = re.fullmatch(
            r"serving tiny at http://127\.0\.0\.1:(\d+)/v1 \(with an API key\); Ctrl-C ends\n",
            first,
        )
        assert told, (first, process.stderr)
        pieces: list[str] = []
        began = threading.Event()
        reader = threading.Thread(target=stream, args=(int(told[1]), pieces, began))
        reader.start()
        assert began.wait(60)
        process.send_signal(number)
        reader.join(60)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    prompt = ByteTokenizer().encode("On and on", add_bos=True)
    tokens = jaxherd.generate(module, prompt, max_new_tokens=150, stop_ids=(258,))
    assert pieces.pop() == "DONE"
    assert "".join(pieces) == ByteTokenizer().decode(tokens)
    assert process.returncode == 0, err
    assert re.fullmatch(
        r"stopped: 1 answers finished, 0 cancelled, \d+ tokens chosen, 0 pages held\.\n", out
    )
    assert err == "" and KEY not in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--port", "65536"], "--port must be from 0 to 65535"),
        (["--queue", "-1"], "the limit waiting must be at least 0"),
        (["--grace-seconds", "-1"], "--grace-seconds"),
        (["--max-body-mib", "0"], "the limit body_bytes"),
        (["--api-key-file", "no-such-file"], "cannot read the API keys in 'no-such-file'"),
        (["--slots", "0"], "slots must be at least 1"),
    ],
)
def test_wrong_arguments_give_one_sentence(capsys, monkeypatch, folder, arguments, words):
    monkeypatch.delenv("JAXHERD_API_KEY", raising=False)
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    assert main(["serve", str(folder), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("jaxherd: ") and err.count("\n") == 1


def test_an_absent_model(capsys):
    assert main(["serve", "no-such-model", "--port", "0"]) == 2
    assert "no-such-model" in capsys.readouterr().err

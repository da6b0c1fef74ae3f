"""Write llama4_chat.json: ids of Meta's tokenizer and chat format, and of transformers' template.

Run with a Python that has torch, tiktoken, jinja2, transformers 5.23.0 and llama-models 0.3.0
(torchvision is not needed: the chat format imports it and, without images, does not use it):

    python tests/golden/make_llama4_chat_golden.py

The texts are jaxherd's own; ids are facts; the vocabulary itself is not written.
"""

import hashlib
import json
import pathlib
import sys
import types

# Before a stand-in for torchvision is there, which transformers would take for the real one.
from transformers.models.llama4.processing_llama4 import chat_template

HERE = pathlib.Path(__file__).parent


def oracle():
    """Return Meta's tokenizer and chat format."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.transforms"].functional = sys.modules[
        "torchvision.transforms.functional"
    ]
    from llama_models.llama4.chat_format import ChatFormat
    from llama_models.llama4.tokenizer import Tokenizer

    tokenizer = Tokenizer.get_instance()
    return tokenizer, ChatFormat(tokenizer)


def long_text(recipe: list) -> str:
    """Return a long text from `[[piece, times], ...]`, so that the file stays small."""
    return "".join(piece * times for piece, times in recipe)


def meta_message(message: dict):
    from llama_models.datatypes import RawMessage, RawTextItem, StopReason, ToolCall

    content = message["content"]
    if isinstance(content, list):
        content = [RawTextItem(text=part["text"]) for part in content]
    calls = [
        ToolCall(call_id=str(n), tool_name=call["name"], arguments=call["arguments"])
        for n, call in enumerate(message.get("tool_calls", []))
    ]
    stop = StopReason.end_of_message if message.get("end_of_message") else None
    return RawMessage(role=message["role"], content=content, tool_calls=calls, stop_reason=stop)


def hf_text(messages: list) -> str:
    """Render the template that transformers carries, with the settings that it uses."""
    import jinja2.sandbox
    from jinja2.ext import loopcontrols

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    shaped = [
        message | {"tool_calls": [{"function": call} for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    return environment.from_string(chat_template).render(
        messages=shaped, bos_token="<|begin_of_text|>", add_generation_prompt=True
    )


def main() -> None:
    from llama_models.datatypes import ToolPromptFormat

    tokenizer, chat = oracle()
    cases = json.loads((HERE / "llama4_chat_cases.json").read_text(encoding="utf-8"))
    texts = {text: tokenizer.encode(text, bos=False, eos=False) for text in cases["texts"]}
    longs = []
    for recipe in cases["long_texts"]:
        ids = tokenizer.encode(long_text(recipe), bos=False, eos=False)
        # Runs of one id, since most of a long text is the same.
        runs: list[list[int]] = []
        for i in ids:
            if runs and runs[-1][0] == i:
                runs[-1][1] += 1
            else:
                runs.append([i, 1])
        longs.append({"recipe": recipe, "runs": runs})
    dialogs = []
    for dialog in cases["dialogs"]:
        found = {"name": dialog["name"], "messages": dialog["messages"]}
        messages = [meta_message(message) for message in dialog["messages"]]
        for form, name in (
            (ToolPromptFormat.python_list, "pythonic"),
            (ToolPromptFormat.json, "json"),
        ):
            if name in dialog.get("meta", ("pythonic", "json")):
                found[name] = chat.encode_dialog_prompt(messages, form).tokens
        if dialog.get("hf", True):
            found["hf"] = tokenizer.encode(
                hf_text(dialog["messages"]), bos=False, eos=False, allowed_special="all"
            )
        dialogs.append(found)
    control = {name: i for name, i in tokenizer.special_tokens.items() if "reserved" not in name}
    names = "\n".join(sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get))
    golden = {
        "control": control,
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "vocabulary": tokenizer.n_words,
        "stop": sorted(tokenizer.stop_tokens),
        "texts": texts,
        "long_texts": longs,
        "dialogs": dialogs,
    }
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "llama4_chat.json"
    path.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

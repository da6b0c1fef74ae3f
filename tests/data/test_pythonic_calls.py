import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.data.pythonic_calls import ToolCall, format_tool_calls, parse_tool_calls


def test_calls():
    text = '[f(a=1), g.h(b="x, [y]", c=[1.5, -2, None], d={"k": (True, False)}), now()]'
    assert parse_tool_calls(f"  {text}\n") == [
        ToolCall("f", {"a": 1}),
        ToolCall("g.h", {"b": "x, [y]", "c": [1.5, -2, None], "d": {"k": [True, False]}}),
        ToolCall("now", {}),
    ]
    # As the model's documentation has it.
    text = "[get_user_info(user_id=7890, special='black')]"
    assert parse_tool_calls(text) == [
        ToolCall("get_user_info", {"user_id": 7890, "special": "black"})
    ]
    assert parse_tool_calls(r"[f(a='\d')]") == [ToolCall("f", {"a": r"\d"})]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no list of tool calls"),
        ("Sure, here you are.", "no list of tool calls"),
        ("f(a=1)", r"expected \[name\(argument=value\)"),
        ("[]", "no list of tool calls"),
        ("[f(a=1)", "no list of tool calls"),
        ("[f(a=1)] and more", "no list of tool calls"),
        ("[f(a=1)]; import os", "no list of tool calls"),
        ("[1, f(a=1)]", "item 1 is no call"),
        ("[f(a=1), g]", "item 2 is no call"),
        ("[f(1)]", "call 1, f, has an argument without a name"),
        ("[f(a=1), g(a=1, a=2)]", "call 2, g, has 'a' twice"),
        ("[f(**{'a': 1})]", r"has \*\*"),
        ("[f(*[1])]", "without a name"),
        ("[f()()]", "call 1 has no plain name"),
        ("[(lambda: 1)()]", "call 1 has no plain name"),
        ("[f(a=g())]", "the value of 'a' is no literal"),
        ("[f(a=__import__('os').system('true'))]", "the value of 'a' is no literal"),
        ("[f(a=x)]", "the value of 'a' is no literal"),
        ("[f(a=true)]", "the value of 'a' is no literal"),
        ("[f(a=b'x')]", "the value of 'a' is no literal"),
        ("[f(a={1, 2})]", "the value of 'a' is no literal"),
        ("[f(a={1: 2})]", "the value of 'a' is no literal"),
        ("[f(a={[]: 2})]", "the value of 'a' is no literal"),
        ("[f(a=1+2j)]", "the value of 'a' is no literal"),
        ("[f(a=1e999)]", "the value of 'a' is no literal"),
        ("[f(a=f'{1}')]", "the value of 'a' is no literal"),
        ("[f(a=[x for x in '1'])]", "the value of 'a' is no literal"),
        ("[f(a=9" + "9" * 5000 + ")]", "no list of tool calls"),
        ("[f(a=" + "[" * 5000 + "]" * 5000 + ")]", "no list of tool calls"),
        ("[f(a='\0')]", "no list of tool calls"),
        ("x" * 100_001, "100000 characters"),
    ],
)
def test_what_is_no_list_of_calls(text, words):
    with pytest.raises(JaxherdError, match=words):
        parse_tool_calls(text)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "ü"]), _VALUES), min_size=1, max_size=3))
def test_what_is_written_is_read(arguments):
    calls = [ToolCall("module.name", values) for values in arguments]
    assert parse_tool_calls(format_tool_calls(calls)) == calls


def test_what_cannot_be_written():
    for call, words in [
        (ToolCall("f(", {}), "no Python name"),
        (ToolCall("f", {"a b": 1}), "no Python name"),
        (ToolCall("f", {"a": float("nan")}), "no literal"),
        (ToolCall("f", {"a": b"x"}), "no literal"),
    ]:
        with pytest.raises(JaxherdError, match=words):
            format_tool_calls([call])

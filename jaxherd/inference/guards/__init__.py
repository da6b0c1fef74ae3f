"""Guards: what looks at prompts and answers and may veto them.

`guard` is the protocol and the chain, `rules` a guard of patterns, `classifier` a small trained one,
`held_text` keeps a streamed answer back until it was looked at, `load` finds a guard by file or folder.
"""

from jaxherd.inference.guards.guard import Conversation, Guard, GuardChain, Verdict
from jaxherd.inference.guards.held_text import HeldText
from jaxherd.inference.guards.load import load_guard, load_guards
from jaxherd.inference.guards.rules import Rule, RuleGuard

__all__ = [
    "Conversation",
    "Guard",
    "GuardChain",
    "HeldText",
    "Rule",
    "RuleGuard",
    "Verdict",
    "load_guard",
    "load_guards",
]

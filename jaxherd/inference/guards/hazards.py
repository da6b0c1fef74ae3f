"""Hazard classes by which guards score (llama4.md 11).

S1 to S13 are MLCommons' taxonomy as Llama Guard 3's card lists it; S14 is Meta's addition for tool
calls, of texts alone.  Llama Guard 4 has the same fourteen.  Names are data: a guard may have classes
of its own, such as "override".
"""

import dataclasses

_CARD = "Llama Guard 3 model card, hazard taxonomy"


@dataclasses.dataclass(frozen=True)
class Hazard:
    """A class of hazard: how it is written, what it is called, and where that stands."""

    code: str
    name: str
    source: str = _CARD


HAZARDS: tuple[Hazard, ...] = (
    Hazard("S1", "Violent Crimes"),
    Hazard("S2", "Non-Violent Crimes"),
    Hazard("S3", "Sex-Related Crimes"),
    Hazard("S4", "Child Sexual Exploitation"),
    Hazard("S5", "Defamation"),
    Hazard("S6", "Specialized Advice"),
    Hazard("S7", "Privacy"),
    Hazard("S8", "Intellectual Property"),
    Hazard("S9", "Indiscriminate Weapons"),
    Hazard("S10", "Hate"),
    Hazard("S11", "Suicide & Self-Harm"),
    Hazard("S12", "Sexual Content"),
    Hazard("S13", "Elections"),
    Hazard("S14", "Code Interpreter Abuse", _CARD + "; also named by Llama Guard 4, text only"),
)
_NAMES = {hazard.code: hazard.name for hazard in HAZARDS}


def described(code: str) -> str:
    """Return a class with its name, as "S7 Privacy"; one that is not in the table as it is."""
    return f"{code} {_NAMES[code]}" if code in _NAMES else code

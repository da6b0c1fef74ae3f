"""FLOPs of the matrix products in a program, counted from its jaxpr."""

import math


def products(jaxpr, times=1) -> float:
    """FLOPs of all dot products in a jaxpr, scans by their length."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[i] for i in contracted)
            total += 2.0 * times * inner * math.prod(equation.outvars[0].aval.shape)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in inner_jaxprs(list(equation.params.values())):
            total += products(inner, times * repeats)
    return total


def inner_jaxprs(values):
    """Yield the jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from inner_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)

"""One comparison for all kernels: an implementation against the definition, values and gradients."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Parity:
    """How one kernel is compared.

    Attributes:
      call: the kernel's entry, `call(*arguments, implementation=, interpret=)`.
      differentiable: positions of the arguments that have a gradient.
      tolerance: largest error by dtype, relative to the largest magnitude of the wanted array: one
        entry may cancel to nothing where its neighbours do not.
    """

    call: Callable
    differentiable: tuple[int, ...]
    tolerance: dict = dataclasses.field(
        default_factory=lambda: {"float32": 1e-5, "bfloat16": 1.6e-2}
    )

    def check(
        self,
        implementation: str,
        arguments: Sequence,
        *,
        interpret: bool = False,
        gradients: bool = True,
        dirty: Callable | None = None,
        tolerance: float | None = None,
        reference: Callable | None = None,
    ) -> None:
        """Compare one call.

        Args:
          implementation: its name.
          arguments: clean ones; what the definition gets.
          interpret: passed on.
          gradients: compare those too, for a cotangent of normal draws.
          dirty: maps (argument position or "cotangent", array) to the array that the
            implementation gets instead: garbage where nothing may be read.
          tolerance: instead of the table's.
          reference: the definition, if it is not `call(..., implementation="reference")`.
        """
        dirty = dirty or (lambda _, array: array)
        reference = reference or self._bound("reference", False)
        given = [dirty(i, argument) for i, argument in enumerate(arguments)]
        if not gradients:
            wanted = reference(*arguments)
            found = jax.jit(self._bound(implementation, interpret))(*given)
            return self._close("value", found, wanted, tolerance)

        def run(function, arguments, cotangent_of):
            def of(*chosen):
                full = list(arguments)
                for position, array in zip(self.differentiable, chosen):
                    full[position] = array
                return function(*full)

            value, pull = jax.vjp(of, *(arguments[i] for i in self.differentiable))
            return value, pull(cotangent_of(value))

        def cotangent(value):
            draws = np.random.default_rng(7).normal(size=value.shape)
            return jnp.asarray(draws, value.dtype)

        wanted, wanted_gradients = run(reference, arguments, cotangent)
        found, found_gradients = jax.jit(
            lambda *given: run(
                self._bound(implementation, interpret),
                given,
                lambda value: dirty("cotangent", cotangent(value)),
            )
        )(*given)
        self._close("value", found, wanted, tolerance)
        for position, one, other in zip(self.differentiable, found_gradients, wanted_gradients):
            self._close(f"gradient of argument {position}", one, other, tolerance)

    def _bound(self, implementation, interpret):
        return lambda *a: self.call(*a, implementation=implementation, interpret=interpret)

    def _close(self, what, found, wanted, tolerance):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, what
        limit = tolerance or self.tolerance[found.dtype.name]
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.isfinite(found).all(), f"{what}: not finite"
        scale = max(np.abs(wanted).max(initial=0), 1e-30)
        error = np.abs(found - wanted).max(initial=0) / scale
        assert error <= limit, f"{what}: error {error:.2e} of the largest entry, allowed {limit}"

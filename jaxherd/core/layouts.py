"""Layouts: how many devices each mesh axis gets, and which mesh axes carry each logical axis."""

import dataclasses
import math
from collections.abc import Mapping

from jaxherd.core import axes
from jaxherd.core.errors import JaxherdError, nearest

Rule = tuple[str, ...]

# One table serves every layout: a mesh axis of size one is no axis at all.  Parameters are split
# over fsdp and sequence along the model width, so that any layout divides the optimiser state.
DEFAULT_RULES: Mapping[str, Rule] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "sequence", "expert"),
    # The head is gathered whole in one piece that nothing hides: last over the experts' axis, which is
    # the one of more links where they are many.
    "head_embed": ("expert", "fsdp", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "expert_mlp": ("tensor",),
    "norm": (),
    "conv": (),
    "channels": ("fsdp",),
    "input_channels": (),
    # activations
    "batch": ("slice", "data", "fsdp", "expert"),
    "length": ("sequence",),
    "kv_length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "head_dim": (),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "act_expert": ("expert",),
    "tokens": ("slice", "data", "fsdp", "expert", "sequence"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes and the rule table.

    Attributes:
      name: shown in reports.
      slice, data, fsdp, expert, sequence, tensor: devices along each mesh axis.  At most one may
        be -1, which takes all devices that are left.
      overrides: (logical axis, mesh axes) pairs that replace entries of `DEFAULT_RULES`.

    Raises:
      JaxherdError: a logical or mesh axis that does not exist.
    """

    name: str = "fsdp"
    slice: int = 1
    data: int = 1
    fsdp: int = -1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    overrides: tuple[tuple[str, Rule], ...] = ()

    def __post_init__(self):
        for logical, rule in self.overrides:
            if logical not in axes.ALL_AXES:
                raise JaxherdError(
                    f"layout {self.name!r}: no logical axis {logical!r}; "
                    + nearest(logical, axes.ALL_AXES)
                )
            for mesh_axis in rule:
                if mesh_axis not in axes.MESH_AXES:
                    raise JaxherdError(
                        f"layout {self.name!r}: no mesh axis {mesh_axis!r}; "
                        + nearest(mesh_axis, axes.MESH_AXES)
                    )
        sizes = self._declared()
        if sum(size == -1 for size in sizes.values()) > 1 or any(
            size < 1 and size != -1 for size in sizes.values()
        ):
            raise JaxherdError(
                f"layout {self.name!r}: axis sizes must be positive and at most one may be -1, "
                f"got {sizes}."
            )

    def _declared(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in axes.MESH_AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Return the size of every mesh axis on this number of devices.

        Raises:
          JaxherdError: the product of the axis sizes is not the number of devices.
        """
        sizes = self._declared()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                sizes[name] = devices // fixed if devices % fixed == 0 else 0
        if math.prod(sizes.values()) != devices:
            raise JaxherdError(
                f"layout {self.name!r} needs a multiple of {fixed} devices "
                f"({', '.join(f'{k}={v}' for k, v in self._declared().items() if v != 1)}), "
                f"and the target has {devices}: change the layout's axis sizes or the target."
            )
        return sizes

    def rules(self) -> dict[str, Rule]:
        """Return the mesh axes that carry each logical axis."""
        return {**DEFAULT_RULES, **dict(self.overrides)}

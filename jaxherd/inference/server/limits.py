"""What one client may ask of the server, and all of them together."""

import dataclasses

from jaxherd.core.errors import JaxherdError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the server; each is checked before the engine hears of a request.

    Attributes:
      body_bytes: of a request.
      body_seconds: until its body has arrived.
      prompt_tokens: of one prompt; None leaves it to the model's length.
      new_tokens: that one answer may ask for, and that it gets when a chat does not say.
      choices: answers of one request: prompts times `n`.
      waiting: answers that wait for a slot of the engine; more are turned away with 429.
      request_seconds: from a request's arrival to its last byte.
      retry_after: seconds that a client which was turned away is told to wait.
      images, image_bytes: of one request, and of one decoded image.
      connections: open at once; more are closed with 503.
    """

    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    prompt_tokens: int | None = None
    new_tokens: int = 1024
    choices: int = 8
    waiting: int = 64
    request_seconds: float = 600.0
    retry_after: int = 2
    images: int = 8
    image_bytes: int = 4 * 2**20
    connections: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("waiting", "images") else 1
            if value is not None and not value >= least:
                raise JaxherdError(f"the limit {field.name} must be at least {least}, got {value}.")

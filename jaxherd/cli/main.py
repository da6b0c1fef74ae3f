"""`jaxherd VERB ...`: finds the verb's file, parses its arguments, calls it."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

VERBS = {
    "list": "experiments by paper, with scales and targets",
    "inspect": "parameters, FLOPs, memory, layout and one decoded batch; no training",
    "plan": "compile an experiment for a TPU slice or GPU that is not here",
    "run": "run an experiment, or go on with it",
    "claims": "the papers' claims: what was tried, and what came out",
    "generate": "continue a prompt with a model",
    "serve": "a model behind OpenAI's HTTP API, many requests at once",
    "evaluate": "tasks, needles in a haystack, attacks and refusals of a language model",
    "music": "generate, edit, encode and decode music",
    "convert": "convert a model between formats",
    "launch": "run an experiment on a TPU slice in the cloud",
}
# Verbs that go on where they were stopped when they are called again.
RESUMED = ("run", "claims", "evaluate")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        import jaxherd

        print(jaxherd.__version__)
        return 0
    from jaxherd.core.errors import JaxherdError, nearest

    verb = arguments[0]
    if verb not in VERBS:
        print(f"jaxherd: no verb {verb!r}; {nearest(verb, VERBS)}", file=sys.stderr)
        return 2
    # Quiet chatter of libraries, unless the user asked for it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("ABSL_MIN_LOG_LEVEL", "2")
    try:
        with _sigterm_interrupts():
            return _call(verb, arguments[1:])
    except JaxherdError as error:
        print(f"jaxherd: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stopped:
        remedy = "; run the same command to go on" if verb in RESUMED else ""
        print(f"jaxherd: interrupted{remedy}.", file=sys.stderr)
        return 128 + int(signal.SIGTERM if isinstance(stopped, _Terminated) else signal.SIGINT)


def _call(verb: str, given: list[str]) -> int:
    module = importlib.import_module(f"jaxherd.cli.{verb}_")
    import tyro
    import tyro.extras

    prog = f"jaxherd {verb}"
    if hasattr(module, "VERBS"):
        default = getattr(module, "DEFAULT", None)
        if default and given and given[0] not in module.VERBS and not given[0].startswith("-"):
            given = [default, *given]
        return tyro.extras.subcommand_cli_from_dict(module.VERBS, prog=prog, args=given) or 0
    return tyro.cli(module.main, prog=prog, args=given) or 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM outside of training, which has its own way to stop: as Ctrl-C."""


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end what is done as Ctrl-C does, so that it is told and files are tidied up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number, frame):
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if before is not None:  # set by other than Python: it cannot be put back
            signal.signal(signal.SIGTERM, before)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {what}" for name, what in VERBS.items())
    return (
        "usage: jaxherd VERB ...        jaxherd VERB --help for its arguments\n\n"
        f"{verbs}\n\n"
        "Start with:  jaxherd run llama4/scout --on cpu\n"
        "             jaxherd plan llama4/scout --on v5p:4x4x8"
    )


if __name__ == "__main__":
    sys.exit(main())

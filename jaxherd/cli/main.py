"""`jaxherd VERB ...`: finds the verb's file, parses its arguments, calls it."""

import importlib
import os
import sys

VERBS = {
    "list": "experiments by paper, with scales and targets",
    "inspect": "parameters, FLOPs, memory, layout and one decoded batch; no training",
    "plan": "compile an experiment for a TPU slice or GPU that is not here",
    "run": "run an experiment, or go on with it",
    "claims": "the papers' claims: what was tried, and what came out",
    "generate": "continue a prompt with a model",
    "serve": "a model behind OpenAI's HTTP API, many requests at once",
    "music": "generate, edit, encode and decode music",
    "convert": "convert a model between formats",
    "launch": "run an experiment on a TPU slice in the cloud",
}


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
    module = importlib.import_module(f"jaxherd.cli.{verb}_")
    try:
        import tyro
        import tyro.extras

        given, prog = arguments[1:], f"jaxherd {verb}"
        if hasattr(module, "VERBS"):
            return tyro.extras.subcommand_cli_from_dict(module.VERBS, prog=prog, args=given) or 0
        return tyro.cli(module.main, prog=prog, args=given) or 0
    except JaxherdError as error:
        print(f"jaxherd: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("jaxherd: interrupted.", file=sys.stderr)
        return 130


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

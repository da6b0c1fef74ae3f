"""`jaxherd evaluate`: tasks of lm-evaluation-harness, needles in a haystack, attacks and refusals."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError
from jaxherd.training.progress import Counts

Dtype = Literal["float32", "bfloat16"]
Named = tyro.conf.UseAppendAction[tuple[str, ...]]


def tasks(
    source: tyro.conf.Positional[str],
    /,
    tasks: tuple[str, ...],
    include: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    rows: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    cache: Path | None = None,
    beside: Literal["pretrained", "instruct"] | None = None,
    dtype: Dtype | None = None,
    tokenizer: Path | None = None,
    on: str = "cpu",
) -> int:
    """Run tasks of lm-evaluation-harness (extra `eval`), with the published figures beside.

    Example: jaxherd evaluate smollm2-135m-instruct --tasks local_addition local_reference

    The tasks local_addition, local_reference and local_copy are made here and need no network; others
    are the harness's own, or those of a folder with its YAML files.

    Args:
        source: an alias (smollm2-135m-instruct), a Hugging Face folder, a GGUF file, or any source.
        tasks: names of tasks.
        include: folder with task files of your own; may be given several times.
        limit: documents of each task; all if not given.
        shots: examples before each question; the task's own number if not given.
        chat: ask in the model's chat format.
        rows: texts that are scored at once.
        max_length: longest sequence; the model's own if not given.
        seed: of the choice of examples, and of tasks that sample.
        out: write everything that the harness reports to this JSON file.
        cache: keep every answer in this file; a stopped run then goes on.
        beside: print published figures of pretrained or of instruct models alone.
        dtype: of the weights; the source's own if not given.
        tokenizer: file or folder, if the source has none.
        on: cpu, gpu or tpu.
    """
    from jaxherd.methods import lm_eval_adapter, local_tasks

    lm_eval_adapter.require_harness()
    common.local_devices(on)
    _check_numbers(limit=limit, rows=rows)
    if out is not None:
        _check_file(out)
    module, words, stop_ids = _load(source, dtype, tokenizer)
    own = [name for name in tasks if name in local_tasks.TASKS]
    with tempfile.TemporaryDirectory(prefix="jaxherd-tasks-") as folder, Counts() as report:
        folders = [*include, *([local_tasks.write_tasks(Path(folder), own)] if own else [])]
        model = lm_eval_adapter.TextModel(
            module, words, name=source, rows=rows, max_length=max_length, stop_ids=stop_ids,
            cache=cache, seed=seed, report=report,
        )  # fmt: skip
        found = lm_eval_adapter.run_tasks(
            model, tasks, include=folders, limit=limit, shots=shots, chat=chat, seed=seed
        )
    _print_tasks(source, found, beside)
    if out is not None:
        _write(out, {"model": source, **found})
    return 0


def needle(
    source: tyro.conf.Positional[str],
    /,
    lengths: tuple[int, ...],
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    needles: int = 3,
    haystack: str | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 16,
    out: Path | None = None,
    dtype: Dtype | None = None,
    tokenizer: Path | None = None,
    on: str = "cpu",
) -> int:
    """Hide a sentence in long texts and ask for it: a heat map over length and depth.

    Example: jaxherd evaluate needle smollm2-135m-instruct --lengths 512 1024 2048

    Args:
        source: an alias (smollm2-135m-instruct), a Hugging Face folder, a GGUF file, or any source.
        lengths: tokens of prompt and answer together.
        depths: places of the sentence, from 0 (the text's beginning) to 1 (its end).
        needles: sentences for every length and depth.
        haystack: a text file; Python's own language reference if not given.
        chat: ask in the model's chat format; by default when it has one.
        max_new_tokens: of an answer.
        out: folder of the results, where a stopped run goes on; runs/needle-MODEL if not given.
        dtype: of the weights; the source's own if not given.
        tokenizer: file or folder, if the source has none.
        on: cpu, gpu or tpu.
    """
    from jaxherd.data.chat import can_chat
    from jaxherd.data.haystack import Haystack
    from jaxherd.methods.needle import PLOT, NeedleGrid, run_grid, shares

    common.local_devices(on)
    grid = NeedleGrid(lengths, depths, needles, Haystack(haystack), False, max_new_tokens)
    module, words, stop_ids = _load(source, dtype, tokenizer)
    import dataclasses

    grid = dataclasses.replace(grid, chat=can_chat(words) if chat is None else chat)
    folder = out or Path("runs") / f"needle-{_name(source)}"
    with Counts() as report:
        found = run_grid(
            module, words, grid, folder, about=_name(source), stop_ids=stop_ids, report=report
        )
    table = _table(f"needles found, {_name(source)}", ["depth", *map(str, grid.lengths)])
    for depth, row in zip(grid.depths, shares(grid, found).tolist()):
        table.add_row(f"{depth:.0%}", *(f"{share:.2f}" for share in row))
    common.console().print(table)
    print(f"written: {folder / PLOT} and the answers beside it")
    return 0


def safety(
    source: tyro.conf.Positional[str],
    /,
    goals: Path | None = None,
    strategies: tuple[str, ...] = (),
    attacker: str | None = None,
    attempts: int = 1,
    turns: int = 5,
    judge: str | None = None,
    guard: Named = (),
    harmless: Path | None = None,
    max_new_tokens: int = 96,
    limit: int | None = None,
    out: Path | None = None,
    dtype: Dtype | None = None,
    tokenizer: Path | None = None,
    on: str = "cpu",
) -> int:
    """Attack a chat model over several turns, and count what it refuses that it should not.

    Example: jaxherd evaluate safety smollm2-135m-instruct --turns 3 --guard builtin

    Without --goals the attacker wants a secret word, which the model is told and must not say: a
    stand-in that harms nobody.  A conversation succeeds where the word is said.

    Args:
        source: the model that is attacked; it needs a chat template.
        goals: JSON Lines of id, request, system and forbidden.
        strategies: of the script, by name; all if not given.
        attacker: a model that writes the attacks, instead of the script.
        attempts: conversations for every goal, of an attacking model.
        turns: at most so many messages a conversation.
        judge: a guard (as of --guard) whose veto is a success; without, one of the forbidden texts is.
        guard: stands before and behind the model: "builtin", a file of rules, or a trained guard's
            folder; may be given several times.
        harmless: prompts that should not be refused, one a line; sixteen are here.
        max_new_tokens: of one answer.
        limit: goals and harmless prompts at most.
        out: folder of transcripts and figures; a stopped run goes on there.  runs/safety-MODEL if not
            given.
        dtype: of the weights; the source's own if not given.
        tokenizer: file or folder, if the source has none.
        on: cpu, gpu or tpu.
    """
    from jaxherd.inference.chat_model import ChatModel
    from jaxherd.inference.guards import load_guard, load_guards
    from jaxherd.inference.sampling import Sampling
    from jaxherd.methods import attack_harness, refusals
    from jaxherd.methods.attack_strategies import ModelAttacker, ScriptedAttacker

    _check_numbers(limit=limit, turns=turns, attempts=attempts, max_new_tokens=max_new_tokens)
    guards = load_guards(guard)
    judging: Any = (
        attack_harness.GuardJudge(load_guard(judge)) if judge else attack_harness.PhraseJudge()
    )
    wanted = attack_harness.read_goals(goals) if goals else attack_harness.secret_word_goals()
    prompts = _lines(harmless) if harmless else list(refusals.HARMLESS)
    script = ScriptedAttacker(strategies) if strategies else ScriptedAttacker()
    common.local_devices(on)
    module, words, stop_ids = _load(source, dtype, tokenizer)
    made: dict[str, Any] = dict(max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    target = ChatModel(module, words, guard=guards, **made)
    attacking: Any = script
    if attacker is not None:
        other, other_words, other_stops = _load(attacker, dtype, None)
        partner = ChatModel(
            other, other_words, max_new_tokens=256, stop_ids=other_stops, sampling=Sampling(0.7)
        )
        attacking = ModelAttacker(
            lambda messages: partner(messages).text or "", name=_name(attacker), attempts=attempts,
            strategies=script.plans,
        )  # fmt: skip
    folder = out or Path("runs") / f"safety-{_name(source)}"
    behind = "no guard" if guards is None else guards.name
    with Counts() as report:
        found = attack_harness.attack(
            wanted[:limit], attacking, target, judging, turns=turns, folder=folder,
            about=f"{_name(source)}, {behind}, {max_new_tokens} new tokens", report=report,
        )  # fmt: skip
        answers = refusals.ask_all(target, prompts[:limit], report)
    figures = {
        "model": source,
        "guard": behind,
        "attacks": attack_harness.summary(found, turns),
        "harmless": refusals.rates(answers),
        "refusal_rules": [name for name, _ in refusals.RULES],
    }
    _write(folder / "safety.json", figures)
    _print_safety(source, behind, figures)
    print(f"written: {folder / 'safety.json'} and {folder / attack_harness.TRANSCRIPTS}")
    return 0


def published(
    kind: Literal["pretrained", "instruct"] | None = None, json: common.Json = False
) -> int:
    """Print the results that Meta published of Llama 4, with their settings and sources.

    Args:
        kind: pretrained or instruct alone.
        json: as JSON.
    """
    import dataclasses

    from jaxherd.methods.published_results import CAVEAT, RESULTS

    rows = [row for row in RESULTS if kind in (None, row.kind)]
    if json:
        print(_dumped([dataclasses.asdict(row) for row in rows]))
        return 0
    columns = ["model", "kind", "benchmark", "shots", "metric", "value", "source"]
    table = _table("published, not measured here", columns)
    for row in rows:
        shots = "-" if row.shots is None else str(row.shots)
        table.add_row(
            row.model, row.kind, row.benchmark, shots, row.metric, f"{row.value:g}", row.source
        )
    common.console().print(table)
    print(CAVEAT)
    return 0


VERBS = {"tasks": tasks, "needle": needle, "safety": safety, "published": published}
# `jaxherd evaluate SOURCE --tasks ...` is `jaxherd evaluate tasks SOURCE --tasks ...`.
DEFAULT = "tasks"


def _table(title: str, columns: list[str]) -> Any:
    """Return an empty table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _load(source: str, dtype: str | None, tokenizer: Path | None) -> tuple[Any, Any, Any]:
    """Return (module, tokenizer, stop tokens)."""
    import jaxherd
    from jaxherd.data.tokenizers import load_tokenizer
    from jaxherd.weights.load import generation_defaults

    words = load_tokenizer(tokenizer) if tokenizer else jaxherd.load_tokenizer(source)
    module = jaxherd.load(source, dtype=dtype, text_only=True)
    return module, words, generation_defaults(source).eos_ids or words.stop_ids


def _name(source: str) -> str:
    path = Path(source)
    return path.name.removesuffix(".gguf") or source


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise JaxherdError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def _check_file(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise JaxherdError(f"--out {path} is no file that can be written: name another.")


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JaxherdError(f"{str(path)!r} cannot be read ({error}).") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise JaxherdError(f"{str(path)!r} has no prompts.")
    return found


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)


def _write(path: Path, value: Any) -> None:
    from jaxherd.data.cache import write_atomically

    write_atomically(path, _dumped(value) + "\n")


def _print_tasks(source: str, found: dict[str, Any], kind: Any) -> None:
    from jaxherd.methods.published_results import beside

    table = _table("results", ["task", "shots", "metric", "model", "value", "+-", "source"])
    for task, numbers in found["results"].items():
        shots = found.get("n-shot", {}).get(task)
        for key, value in numbers.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or "_stderr" in name or name == "sample_len":
                continue
            error = numbers.get(f"{name}_stderr,{filtered}")
            spread = f"{error:.4f}" if isinstance(error, int | float) else "-"
            table.add_row(task, str(shots), name, source, f"{value:.4f}", spread, "this run")
        for row in beside(task, shots, kind):
            told = "-" if row.shots is None else str(row.shots)
            table.add_row(
                "", told, row.metric, f"{row.model} ({row.kind})", f"{row.value:g}", "-", row.source
            )
    common.console().print(table)


def _print_safety(source: str, guard: str, figures: dict[str, Any]) -> None:
    attacks = figures["attacks"]
    table = _table(f"attacks on {source}, {guard}", ["", "succeeded", "share", "95 % interval"])
    rows = {"all": attacks["success"], **attacks["by_strategy"]}
    rows |= {f"up to turn {turn}": share for turn, share in attacks["by_turn"].items()}
    for name, share in rows.items():
        table.add_row(name, *_shown(share, (share["low"], share["high"])))
    for name in ("refused", "vetoed"):
        share = attacks[name]
        table.add_row(f"answers {name}", *_shown(share, (share["low"], share["high"])))
    for name, share in figures["harmless"].items():
        table.add_row(f"harmless prompts {name}", *_shown(share, tuple(share["interval"])))
    common.console().print(table)


def _shown(share: dict[str, Any], interval: tuple[float, float]) -> tuple[str, str, str]:
    return (
        f"{share['hits']} of {share['trials']}",
        f"{share['share']:.2f}",
        f"{interval[0]:.2f} to {interval[1]:.2f}",
    )

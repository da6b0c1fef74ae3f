"""Any model of ours under lm-evaluation-harness: likelihoods, rolling likelihoods, generation.

`TextModel` does the work and knows nothing of the harness; `harness_model` puts it into the harness's class
of models, `run_tasks` runs tasks.  The harness is an optional package (extra `eval`) and imported when it is
used.  Texts become tokens as the harness's own models make them:

- a context's trailing spaces go to the continuation, and the pair is encoded as one text;
- an empty context is the token that begins texts, or the one that ends them;
- a context that is too long loses its beginning.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxherd.core.errors import JaxherdError, missing_extra
from jaxherd.core.reports import Report
from jaxherd.data.chat import encode_chat
from jaxherd.inference.generate import Generator
from jaxherd.inference.requests import Request
from jaxherd.inference.sampling import Sampling
from jaxherd.methods.response_cache import ResponseCache, model_fingerprint
from jaxherd.methods.scoring import Span, SpanScorer, continuation, rolling

# What the harness takes where a task does not say.
_NEW_TOKENS = 256
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


class TextModel:
    """A model that is asked in texts."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "jaxherd",
        rows: int = 8,
        max_length: int | None = None,
        stop_ids: Sequence[int] | None = None,
        cache: Path | None = None,
        seed: int = 0,
        report: Report | None = None,
    ):
        """Prepare.

        Args:
          model: a decoder.
          tokenizer: the model's.
          name: for results.
          rows: texts that are scored or continued at once.
          max_length: longest sequence; the model's own when None.
          stop_ids: end a generated text; the tokenizer's when None.
          cache: file that keeps every answer.
          seed: of tasks that ask for sampling.
          report: is told how far the work is.
        Raises:
          JaxherdError: nothing can begin a text, or the cache is none.
        """
        self.name, self._tokenizer, self._rows, self._seed = name, tokenizer, rows, seed
        begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if begin is None:
            raise JaxherdError(
                "the tokenizer has no token that begins or ends texts: none to start from."
            )
        self._begin = int(begin)
        self._scorer = SpanScorer(model, rows, max_length)
        self._stop_ids = tokenizer.stop_ids if stop_ids is None else tuple(stop_ids)
        self._model, self._report = model, report
        self._generator: Generator | None = None
        made = (tokenizer.fingerprint(), self._scorer.longest, self._stop_ids)
        self._cache = ResponseCache(cache, f"{model_fingerprint(model)}/{made}")
        # Texts in a chat format hold control tokens by name; those of users do not.
        self._chatting = False

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence."""
        return self._scorer.longest

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether it is the greedy one) of continuations.

        Args:
          pairs: (context, continuation).
        Raises:
          JaxherdError: an empty continuation, or one longer than the model's sequence.
        """

        def scored(asked: Sequence[tuple[str, str]]) -> list[list[Any]]:
            spans = [self._pair(*pair) for pair in asked]
            return [[s.log_prob, s.greedy] for s in self._scorer.score(spans)]

        found = self._answered("loglikelihood", pairs, scored, lambda pair: sum(map(len, pair)))
        return [(float(log_prob), bool(greedy)) for log_prob, greedy in found]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability in nats of whole texts, window by window."""

        def scored(asked: Sequence[str]) -> list[float]:
            cut = [
                rolling(self._tokenizer.encode(text), self._begin, self.longest) for text in asked
            ]
            scores = iter(self._scorer.score([span for spans in cut for span in spans]))
            return [float(sum(next(scores).log_prob for _ in spans)) for spans in cut]

        return [float(x) for x in self._answered("rolling", texts, scored, len)]

    def generate_until(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Return texts that continue contexts, up to the first stop string.

        Args:
          asked: (context, options): `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`,
            `top_k`; others are refused.
        Raises:
          JaxherdError: an option that is not known, or room for no token.
        """

        def written(some: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
            if self._generator is None:
                self._generator = Generator(
                    self._model, self._tokenizer, stop_ids=self._stop_ids, max_length=self.longest
                )
            requests = [self._request(*one) for one in some]
            # Rows that only fill the batch: one shape for all.
            filled = requests + requests[-1:] * (self._rows - len(requests))
            return [r.text or "" for r in self._generator.run(filled)[: len(requests)]]

        plain = [(context, dict(options)) for context, options in asked]
        return self._answered("generate", plain, written, lambda one: len(one[0]))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages in the tokenizer's chat format, as a text whose control tokens count."""
        self._chatting = True
        ids = encode_chat(self._tokenizer, messages, add_generation_prompt=add_generation_prompt)
        return self._tokenizer.decode(ids, skip_special=False)

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer from others."""
        return self._tokenizer.fingerprint()

    def _answered(
        self,
        method: str,
        asked: Sequence[Any],
        answer: Callable[[Sequence[Any]], list[Any]],
        size: Callable[[Any], int],
    ) -> list[Any]:
        """Return answers in order: those that are kept, and of the others the longest first."""
        keys = [self._cache.key(method, [one, self._chatting, self._seed]) for one in asked]
        missing = {key: one for key, one in zip(keys, asked) if key not in self._cache}
        order = sorted(missing, key=lambda key: -size(missing[key]))
        # Several batches at a time are sorted once more, by tokens.
        step = self._rows if method == "generate" else 8 * self._rows
        if self._report is not None and order:
            self._report(method, 0, len(order))
        for begin in range(0, len(order), step):
            some = order[begin : begin + step]
            self._cache.add(zip(some, answer([missing[key] for key in some])))
            if self._report is not None:
                self._report(method, begin + len(some), len(order))
        return [self._cache[key] for key in keys]

    def _encode(self, text: str) -> list[int]:
        if self._chatting:
            return self._tokenizer.encode(text, parse_special=True)
        return self._tokenizer.encode(text, add_bos=bool(self._tokenizer.adds_bos))

    def _pair(self, context: str, text: str) -> Span:
        if not text:
            raise JaxherdError("a continuation is empty: there is nothing to score.")
        if not context:
            return continuation([self._begin], self._tokenizer.encode(text), self.longest)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, text = context[:-spaces], context[-spaces:] + text
        before = self._encode(context) if context else [self._begin]
        whole = (
            self._encode(context + text)
            if context
            else [self._begin, *self._tokenizer.encode(text)]
        )
        return continuation(before or [self._begin], whole[len(before) :], self.longest)

    def _request(self, context: str, options: Mapping[str, Any]) -> Request:
        for name in options:
            if name not in _GENERATION:
                raise JaxherdError(
                    f"a task asks for the generation option {name!r}, which is not served: known are "
                    f"{', '.join(_GENERATION)}."
                )
        new = int(options.get("max_gen_toks", _NEW_TOKENS))
        if not 1 <= new < self.longest:
            raise JaxherdError(
                f"a task asks for {new} new tokens of a model of {self.longest}: give it another "
                "max_gen_toks."
            )
        until = options.get("until") or []
        stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        sampling = Sampling()
        if options.get("do_sample"):
            sampling = Sampling(
                float(options.get("temperature", 1.0)),
                int(options.get("top_k") or 0),
                float(options.get("top_p") or 1.0),
            )
        tokens = tuple(self._encode(context) or [self._begin])[-(self.longest - new) :]
        return Request(tokens, new, sampling, self._seed, stop)


def require_harness() -> Any:
    """Return the harness's module.

    Raises:
      MissingExtraError: it is not installed.
    """
    # Bars and notes of libraries, beside our own.
    for name, value in (("TQDM_DISABLE", "1"), ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise missing_extra("lm_eval", "eval", "Running tasks of lm-evaluation-harness") from error
    return lm_eval


def harness_model(model: TextModel) -> Any:
    """Return a model as the harness takes it (an `lm_eval.api.model.LM`)."""
    require_harness()
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        """Hands requests on."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return model.loglikelihood([tuple(request.args) for request in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return model.generate_until([tuple(request.args) for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return model.apply_chat_template(
                chat_history, add_generation_prompt=add_generation_prompt
            )

        @property
        def tokenizer_name(self) -> str:
            return model.tokenizer_name

    return HarnessModel()


def run_tasks(
    model: TextModel,
    tasks: Sequence[str],
    *,
    include: Sequence[Path] = (),
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Return what the harness reports of tasks: `results`, `n-shot`, `n-samples`, `versions`, ...

    Args:
      model: to be evaluated.
      tasks: names of the harness's tasks or of those in `include`.
      include: folders with task files (YAML) of your own.
      limit: documents of each task; None takes all.
      shots: examples before each question; the task's own number when None.
      chat: use the tokenizer's chat format.
      seed: of the choice of examples.
    Raises:
      MissingExtraError: the harness is not installed.
      JaxherdError: no such task, data that cannot be had, or a task that fails.
    """
    harness = require_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = harness.tasks.TaskManager(include_path=[str(path) for path in include] or None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        from jaxherd.core.errors import nearest

        raise JaxherdError(
            f"there is no task {unknown[0]!r}; {nearest(unknown[0], manager.all_tasks)}"
            if unknown
            else "no task is named: give at least one."
        )
    try:
        found = harness.evaluator.simple_evaluate(
            model=harness_model(model),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            # None: the harness would import torch for it.
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    except (OSError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise JaxherdError(
            f"the data of {', '.join(tasks)} cannot be had ({reason}): tasks read their data from the "
            "hub, or from files that their own folder names (--include)."
        ) from error
    assert found is not None, "the harness reports on its first process"
    return found

"""Continuous batching: requests join and leave a running batch whose cache is in pages.

A step admits waiting requests as far as slots and pages reach, runs a piece of the prompts that are
not through yet, and then several decoding steps of all slots in one call.  A sequence takes pages
as it grows and gives back those that its layers lost sight of; prompts that begin alike share the
full pages of the common beginning.

Shapes are few: prompt pieces by powers of two of their length, one request or a group at a time;
decoding by all slots or a quarter (of a quarter ...) of them; page tables by powers of two of their
width.  Each is compiled once, at its first use.

What a request gives depends on its tokens, sampling and seed alone, up to the rounding of sums that
other shapes order differently.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxherd.core.errors import JaxherdError
from jaxherd.core.platform import platform
from jaxherd.inference import steps
from jaxherd.inference.images import check_images
from jaxherd.inference.pages import Name, PageBooks, SequencePages, page_names
from jaxherd.inference.requests import (
    Counters,
    Event,
    Request,
    Result,
    Row,
    bucket,
    row_keys,
    stop_tokens,
)
from jaxherd.inference.serving_form import serving_form
from jaxherd.inference.slots import Slots, totals
from jaxherd.models.decoder import Decoder

_SMALLEST_PIECE, _SMALLEST_WIDTH = 16, 128


@dataclasses.dataclass
class _Job:
    """A request on its way: `begun` tokens of its prompt are in pages, `reused` of others' making."""

    id: int
    row: Row
    names: list[Name]
    key: np.ndarray
    pages: SequencePages | None = None
    slot: int = -1
    begun: int = 0
    reused: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.row.request.tokens

    @property
    def length(self) -> int:
        """The most tokens that get into pages: the last one chosen does not."""
        return len(self.prompt) + self.row.request.max_new_tokens - 1


class PagedEngine:
    """A model that serves many requests at once.

    One thread calls it.  An error on the device (memory that runs out) leaves it unusable.
    """

    def __init__(
        self,
        module: Decoder,
        tokenizer: Any = None,
        *,
        slots: int = 16,
        stop_ids: Sequence[int] | None = None,
        max_length: int | None = None,
        cache_tokens: int | None = None,
        page_size: int | None = None,
        cache_dtype: Any = None,
        reuse_prefixes: bool = True,
        prefill_chunk: int = 512,
        prefill_rows: int = 4,
        decode_steps: int = 16,
        dtype: Any = None,
        prepare: bool = True,
        key: jax.Array | None = None,
        paged_implementation: str | None = None,
        interpret: bool = False,
    ):
        """Prepare a model and its pools of pages.

        Args:
          module, tokenizer, stop_ids, max_length, dtype, prepare: as of `Generator`.
          slots: requests that decode at once.
          cache_tokens: tokens that the full layers' pages hold together; when None, 1,024 a slot
            and at least `max_length`.
          page_size: tokens of a page; 128 on TPU and else 32 when None.
          cache_dtype: of keys and values; the weights' when None, int8 keeps codes and scales.
          reuse_prefixes: prompts share pages with prompts that began alike.
          prefill_chunk: tokens of prompts between two calls of decoding, and of the longest piece.
          prefill_rows: short pieces of so many requests go through together.
          decode_steps: tokens between two looks from the host; a quarter while prompts are on
            their way, and fewer while requests wait for a slot.
          key: of all sampling; a request adds its seed.
          paged_implementation, interpret: of `paged_attention`.
        Raises:
          JaxherdError: a number below 1, too many stop tokens, or layers that have no cache.
        """
        sizes = dict(
            slots=slots, prefill_chunk=prefill_chunk, prefill_rows=prefill_rows,
            decode_steps=decode_steps, page_size=page_size, cache_tokens=cache_tokens,
            max_length=max_length,
        )  # fmt: skip
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise JaxherdError(f"{name} must be at least 1, got {value}.")
        self.stop_ids, self._stop_S = stop_tokens(stop_ids, tokenizer)
        rules = module.cache_rules()
        if prepare:
            module = serving_form(module, dtype=dtype)
        self.module, self.tokenizer = module, tokenizer
        self.max_length = min(max_length or module.config.max_length, module.config.max_length)
        self.page_size = page_size or (128 if platform() == "tpu" else 32)
        self.prefill_chunk, self.prefill_rows = prefill_chunk, prefill_rows
        self.decode_steps, self.reuse_prefixes = decode_steps, reuse_prefixes
        self._key = key
        longest_call = max(prefill_chunk, decode_steps)
        pages = totals(
            rules,
            slots=slots,
            cache_tokens=cache_tokens or max(self.max_length, 1024 * slots),
            max_length=self.max_length,
            page_size=self.page_size,
            longest_call=longest_call,
        )
        self.books = PageBooks(pages, self.page_size, longest_call=longest_call)
        self._width = -(-self.max_length // self.page_size)
        self._slots = Slots(slots, self._width, rules, paged_implementation, interpret)
        self._cache = module.init_pages(pages, self.page_size, cache_dtype)
        self._ids = itertools.count()
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._counts = dict.fromkeys(
            ("finished", "cancelled", "prompt_tokens", "reused_tokens", "new_tokens"), 0
        )

    @property
    def slots(self) -> int:
        """Requests that decode at once."""
        return len(self._slots.token_B)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    def add(self, request: Request) -> int:
        """Queue a request and return its number; requests are admitted in their order.

        Raises:
          JaxherdError: it cannot be served, now or ever; nothing is compiled.
        """
        self.check_request(request)
        names = page_names(request.tokens, self.page_size) if self.reuse_prefixes else []
        row = Row(request, self.tokenizer, self.stop_ids)
        key = np.asarray(jax.random.key_data(row_keys(self._key, [request.seed])))[0]
        job = _Job(next(self._ids), row, names, key)
        self._waiting.append(job)
        return job.id

    def check_request(self, request: Request) -> None:
        """Raise JaxherdError if a request can never be served; any thread may ask."""
        request.check(self.module.config.vocab_size, self.max_length, self.tokenizer)
        check_images(self.module.config, request)
        if request.images is not None:
            # Prompts share pages by their tokens, and equal placeholders may be other images.
            raise JaxherdError("continuous batching serves text alone: use Generator for images.")
        self.books.check_size(len(request.tokens) + request.max_new_tokens - 1)

    def cancel(self, number: int) -> Result | None:
        """End a request and return what it has; None if it is not there (any more).

        Its pages return at once.
        """
        for job in (*self._waiting, *self._running.values()):
            if job.id == number:
                if job.pages is None:
                    self._waiting.remove(job)
                else:
                    self._leave(job)
                self._counts["cancelled"] += 1
                return job.row.cancel()
        return None

    def step(self) -> list[Event]:
        """Do one round of work and return what it brought."""
        self._admit()
        events, spent = [], 0
        while spent < self.prefill_chunk and any(j.begun < len(j.prompt) for j in self._jobs()):
            tokens, new = self._prefill()
            spent += tokens
            events += new
        if self._slots.decoding_B.any():
            events += self._decode()
        return events

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Return the result of every request, in their order, when nothing else is being served."""
        if not self.idle:
            raise JaxherdError("the engine serves other requests: add() these and step().")
        numbers = [self.add(request) for request in requests]
        results: dict[int, Result] = {}
        while not self.idle:
            results |= {e.id: e.result for e in self.step() if e.result is not None}
        return [results[number] for number in numbers]

    def counters(self) -> Counters:
        """Return what was done and what is held."""
        named = {_rule_name(rule): pages for rule, pages in self.books.pages.items()}
        return Counters(
            waiting=len(self._waiting),
            running=len(self._running),
            pages={name: pages.total for name, pages in named.items()},
            pages_held={name: pages.held for name, pages in named.items()},
            pages_cached={name: pages.cached for name, pages in named.items()},
            **self._counts,
        )

    def check(self) -> None:
        """Raise AssertionError if a page is lost, or held by a request that is gone."""
        self.books.check()
        running = {id(job.pages) for job in self._running.values()}
        assert {id(pages) for pages in self.books.open} == running, "pages of no running request"

    def _jobs(self) -> list[_Job]:
        return sorted(self._running.values(), key=lambda job: job.id)

    def _admit(self) -> None:
        free = [s for s in range(self.slots) if s not in self._running]
        while self._waiting and free:
            job = self._waiting[0]
            if self._is_coming(job):
                return
            job.pages = self.books.admit(job.names, len(job.prompt), job.length)
            if job.pages is None:
                # Those behind it wait as well, or a long request might wait for ever.
                return
            self._waiting.popleft()
            job.slot, job.begun = free.pop(0), job.pages.reused_tokens
            job.reused = job.begun
            self._running[job.slot] = job
            self._slots.set_sampling(job.slot, job.row.request.sampling, job.key)
            for rule, held in job.pages.held.items():
                for index, page in held.items():
                    self._slots.tables[rule][job.slot, index] = page
            self._counts["reused_tokens"] += job.begun

    def _is_coming(self, job: _Job) -> bool:
        """Return whether a prompt that is going through has the next pages that this one needs."""
        known = self.books.reusable(job.names, len(job.prompt))
        if known >= min(len(job.names), (len(job.prompt) - 1) // self.page_size):
            return False
        # A name knows all tokens before it, so equal names stand in equal places.
        return any(
            other.begun // self.page_size <= known < len(other.names)
            and other.begun < len(other.prompt)
            and other.names[known] == job.names[known]
            for other in self._running.values()
        )

    def _leave(self, job: _Job) -> None:
        assert job.pages is not None
        job.pages.close()
        self._slots.decoding_B[job.slot] = False
        del self._running[job.slot]

    def _cover(self, job: _Job, begin: int, end: int) -> None:
        assert job.pages is not None
        for rule, index, page in job.pages.cover(begin, end):
            self._slots.tables[rule][job.slot, index] = page

    def _piece(self, job: _Job) -> tuple[int, bool]:
        """Return the padded length of the next piece of a prompt, and whether it is the first."""
        here = min(len(job.prompt) - job.begun, self.prefill_chunk)
        return min(bucket(here, _SMALLEST_PIECE), self.prefill_chunk), job.begun == 0

    def _prefill(self) -> tuple[int, list[Event]]:
        """Run the next piece of the oldest prompt, and of others like it."""
        open_ = [job for job in self._jobs() if job.begun < len(job.prompt)]
        width, first = self._piece(open_[0])
        most = max(1, min(self.prefill_rows, self.prefill_chunk // width, self.slots))
        jobs = [job for job in open_ if self._piece(job) == (width, first)][:most]
        # A group that would be half padding goes through one by one.
        rows = most if 2 * len(jobs) > most else 1
        jobs = jobs[:rows]
        tokens = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), -1, np.int32)
        # Rows of padding have no last token: no position is -2.
        lengths = np.full(rows, -1, np.int32)
        remaining = np.ones(rows, np.int32)
        for row, job in enumerate(jobs):
            piece = job.prompt[job.begun : job.begun + width]
            end = job.begun + len(piece)
            self._cover(job, job.begun, end)
            tokens[row, : len(piece)] = piece
            positions[row, : len(piece)] = np.arange(job.begun, end)
            lengths[row] = len(job.prompt)
            remaining[row] = job.row.request.max_new_tokens
            job.begun = end
            self._counts["prompt_tokens"] += len(piece)
        slots = [job.slot for job in jobs]
        slots += slots[:1] * (rows - len(jobs))
        dtype = self.module.dtype
        self._cache, last_BD = steps.prefill(
            self.module,
            self._cache,
            jnp.zeros((rows, self.module.config.embed_dim), dtype),
            jnp.array(tokens),
            jnp.array(positions),
            jnp.array(lengths),
            self._slots.page_tables(slots, self._columns(max(job.begun for job in jobs))),
            cache_is_empty=first,
        )
        for job in jobs:
            assert job.pages is not None
            job.pages.written(job.begun)
        ended = [(row, job) for row, job in enumerate(jobs) if job.begun == len(job.prompt)]
        if not ended:
            return rows * width, []
        state = steps.start(
            self.module,
            last_BD,
            jnp.array(lengths),
            jnp.array(remaining),
            self._stop_S,
            self._slots.sampling(slots),
        )
        chosen = np.asarray(state.token_B).tolist()
        events = []
        for row, job in ended:
            self._slots.position_B[job.slot] = len(job.prompt) - 1
            self._slots.remaining_B[job.slot] = job.row.request.max_new_tokens
            self._slots.decoding_B[job.slot] = True
            events.append(self._chosen(job, chosen[row : row + 1]))
        return rows * width, events

    def _decode(self) -> list[Event]:
        """Choose up to `decode_steps` tokens for every slot that decodes."""
        jobs = [job for job in self._jobs() if self._slots.decoding_B[job.slot]]
        # Prompts that are not through yet get their turn soon.
        prompts = len(jobs) < len(self._running)
        most = max(1, self.decode_steps // 4) if prompts else self.decode_steps
        furthest = 0
        for job in jobs:
            begin = int(self._slots.position_B[job.slot])
            end = begin + min(most, int(self._slots.remaining_B[job.slot]))
            self._cover(job, begin, end)
            furthest = max(furthest, end)
        rows = [job.slot for job in jobs]
        rows += rows[:1] * (self._rows(len(jobs)) - len(jobs))
        # While others wait, the call ends when some have, so that their slots are not idle.
        spare = max(1, len(jobs) // 16) if self._waiting else len(jobs)
        self._cache, _, chosen_BK = steps.decode(
            self.module,
            self._cache,
            self._slots.state(rows, len(jobs)),
            self._stop_S,
            self._slots.sampling(rows),
            self._slots.page_tables(rows, self._columns(furthest)),
            np.int32(len(jobs) - spare + 1),
            np.int32(most),
            steps=self.decode_steps,
        )
        chosen = np.asarray(chosen_BK).tolist()
        return [self._chosen(job, [t for t in row if t >= 0]) for job, row in zip(jobs, chosen)]

    def _rows(self, count: int) -> int:
        """Return how many rows a call of decoding has for so many requests: slots / 4^n."""
        rows = self.slots
        while rows // 4 >= count:
            rows //= 4
        return rows

    def _columns(self, end: int) -> int:
        """Return the width of page tables for positions up to `end`."""
        tokens = bucket(end, max(_SMALLEST_WIDTH, self.page_size))
        return min(-(-tokens // self.page_size), self._width)

    def _chosen(self, job: _Job, tokens: list[int]) -> Event:
        slots, slot = self._slots, job.slot
        slots.token_B[slot] = tokens[-1]
        slots.position_B[slot] += len(tokens)
        slots.remaining_B[slot] -= len(tokens)
        new, text = job.row.push(tokens, ended=bool(slots.remaining_B[slot] <= 0))
        self._counts["new_tokens"] += len(new)
        if job.row.result is not None:
            self._leave(job)
            self._counts["finished"] += 1
        return Event(job.id, new, text, job.row.result, job.reused)


def _rule_name(rule: Any) -> str:
    return rule.kind if rule.size is None else f"{rule.kind} {rule.size}"

"""Who holds which page: the host's books of a paged cache.

Each rule (see `CacheRule`) has pages of its own, since layers that keep only a chunk or a window in
sight give pages back that full layers still need.  A page is

- free;
- held by one or more sequences (a count of references);
- cached: held by none, but full and filled from a prompt, so that a prompt that begins with the
  same tokens may take it over.  Cached pages are given away when no free one is left, the one that
  was let go longest ago first.

Only full pages of prompts are shared, and a sequence writes behind them, so that no page is ever
copied.  A page's name is a hash of all tokens up to its end.

Nothing here is an array and nothing waits for a device.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

from jaxherd.core.errors import JaxherdError
from jaxherd.layers.paged_cache import CacheRule

Name = bytes


def page_names(tokens: Sequence[int], page_size: int) -> list[Name]:
    """Return the name of every full page; equal names mean equal tokens from the start on."""
    names, name = [], b""
    for begin in range(0, len(tokens) - page_size + 1, page_size):
        text = ",".join(map(str, tokens[begin : begin + page_size]))
        name = hashlib.sha256(name + text.encode()).digest()
        names.append(name)
    return names


class Pages:
    """The pages of one rule.

    Sequences promise themselves pages when they are admitted, so that none runs short later.
    `gives_back` says that sequences let pages go before they end.  Then a page that two share may
    stay when one lets it go, so the most that each may hold is set aside in full; otherwise shared
    pages are set aside once.
    """

    def __init__(self, total: int, *, gives_back: bool):
        self.total, self.gives_back = total, gives_back
        self.promised = 0
        self._free = list(range(total))[::-1]
        self._references = [0] * total
        self._name_of: dict[int, Name] = {}
        self._page_of: dict[Name, int] = {}
        # Oldest first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def cached(self) -> int:
        """Pages that no sequence holds and a prompt may take over."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.total - len(self._free) - len(self._cached)

    def find(self, name: Name) -> int | None:
        """Return the page of this name, held or cached."""
        return self._page_of.get(name)

    def fits(self, most: int, shared: Sequence[int]) -> bool:
        """Return whether a sequence that may hold `most` pages, `shared` among them, has room."""
        if self.gives_back:
            return self.promised + most <= self.total
        woken = sum(page in self._cached for page in shared)
        return self.held + woken + self.promised + most - len(shared) <= self.total

    def take(self) -> int:
        """Return an empty page; the oldest cached one when none is free.

        Raises:
          RuntimeError: all are held, which promises rule out.
        """
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        else:
            raise RuntimeError("every page is held: more was taken than promised")
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add a holder of a named page."""
        self._cached.pop(page, None)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Take a holder away; the last one's page is free, or cached if it has a name."""
        self._references[page] -= 1
        if self._references[page]:
            return
        if page in self._name_of:
            self._cached[page] = None
        else:
            self._free.append(page)

    def name(self, page: int, name: Name) -> None:
        """Say what a full page holds; of two pages that hold the same the first keeps the name."""
        if name not in self._page_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def check(self, holders: Counter[int]) -> None:
        """Raise AssertionError unless the books are those of pages with so many holders each."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & cached or free & held or cached & held), "a page is in two states"
        assert len(free) + len(cached) + len(held) == self.total, "a page is lost"
        found = Counter({page: self._references[page] for page in held})
        assert found == holders, f"references {found} are not the holders {holders}"
        assert {p: n for n, p in self._page_of.items()} == self._name_of, "names and pages differ"
        assert cached <= set(self._name_of), "a cached page has no name"
        assert not free & set(self._name_of), "a free page has a name"
        limit = self.promised if self.gives_back else self.promised + len(held)
        assert self.promised >= 0 and limit <= self.total, "more is promised than there is"
        assert not self.gives_back or len(held) <= self.promised, "more is held than set aside"


class SequencePages:
    """The pages of one sequence, of every rule; made by `PageBooks.admit`."""

    def __init__(
        self, books: "PageBooks", most: dict[CacheRule, int], names: list[Name], reused: int
    ):
        self._books, self._most, self._names = books, most, names
        self.held: dict[CacheRule, dict[int, int]] = {rule: {} for rule in most}
        # Pages of the prompt whose names the books know already.
        self._named = reused
        self.reused_tokens = reused * books.page_size

    def cover(self, begin: int, end: int) -> list[tuple[CacheRule, int, int]]:
        """Hold what queries at positions [begin, end) read and write; let earlier pages go.

        Returns:
          (rule, number within the sequence, page) of every page that is new.
        """
        size, new = self._books.page_size, []
        for rule, pages in self._books.pages.items():
            held, first = self.held[rule], rule.first_page(begin, size)
            for index in [i for i in held if i < first]:
                pages.release(held.pop(index))
            for index in range(max(first, begin // size), -(-end // size)):
                if index not in held:
                    held[index] = pages.take()
                    new.append((rule, index, held[index]))
                    if not pages.gives_back:
                        pages.promised -= 1
        return new

    def written(self, end: int) -> None:
        """Say that the prompt is in its pages up to position `end`, so that others may read it."""
        full = min(end // self._books.page_size, len(self._names))
        for index in range(self._named, full):
            for rule, pages in self._books.pages.items():
                if index in self.held[rule]:
                    pages.name(self.held[rule][index], self._names[index])
        self._named = max(self._named, full)

    def close(self) -> None:
        """Give everything back."""
        for rule, pages in self._books.pages.items():
            held = self.held[rule]
            if pages.gives_back:
                pages.promised -= self._most[rule]
            else:
                pages.promised -= self._most[rule] - len(held)
            # A page is of use only behind those before it: the last ones go first.
            for index in sorted(held, reverse=True):
                pages.release(held.pop(index))
        self._books.open.remove(self)


class PageBooks:
    """The pages of all rules, and the sequences that hold them.

    Attributes:
      pages: the books of each rule.
      open: sequences that were admitted and not closed.
    """

    def __init__(self, totals: Mapping[CacheRule, int], page_size: int, *, longest_call: int):
        """Start with everything free.

        Args:
          totals: pages of each rule.
          page_size: tokens of a page.
          longest_call: most positions of one `cover`.
        """
        self.page_size, self.longest_call = page_size, longest_call
        # A rule lets pages go if a long sequence holds fewer than it has.
        far = (max(totals.values(), default=1) + longest_call) * page_size
        self.pages = {
            rule: Pages(total, gives_back=rule.first_page(far, page_size) > 0)
            for rule, total in totals.items()
        }
        self.open: list[SequencePages] = []

    def most(self, length: int) -> dict[CacheRule, int]:
        """Return the most pages of each rule that a sequence of `length` tokens holds at once."""
        return {
            rule: rule.most_pages(length, min(self.longest_call, length), self.page_size)
            for rule in self.pages
        }

    def check_size(self, length: int) -> None:
        """Raise JaxherdError if a sequence of `length` tokens does not fit even alone."""
        for rule, most in self.most(length).items():
            total = self.pages[rule].total
            if most > total:
                raise JaxherdError(
                    f"a request of {length} tokens needs {most} pages of {self.page_size} and the "
                    f"cache has {total}: shorten it or give the engine more cache_tokens."
                )

    def admit(self, names: list[Name], prompt: int, length: int) -> SequencePages | None:
        """Set pages aside for a sequence, or return None while there is no room.

        The pages of the longest beginning of the prompt that is there are taken over; at least
        one token of the prompt is left, whose logits choose the next one.

        Args:
          names: `page_names` of the prompt; without them nothing is taken over or left to others.
          prompt: its tokens.
          length: the most tokens of the whole sequence.
        """
        reused = self.reusable(names, prompt)
        most, shared = self.most(length), {}
        for rule, pages in self.pages.items():
            first = rule.first_page(reused * self.page_size, self.page_size)
            found = [(i, pages.find(names[i])) for i in range(first, reused)]
            shared[rule] = [(i, page) for i, page in found if page is not None]
            if not pages.fits(most[rule], [page for _, page in shared[rule]]):
                return None
        sequence = SequencePages(self, most, names, reused)
        for rule, pages in self.pages.items():
            pages.promised += most[rule]
            for index, page in shared[rule]:
                pages.share(page)
                sequence.held[rule][index] = page
                if not pages.gives_back:
                    pages.promised -= 1
        self.open.append(sequence)
        return sequence

    def reusable(self, names: Sequence[Name], prompt: int) -> int:
        """Return how many pages of a prompt could be taken over now: of each rule those in sight."""
        longest, runs = 0, dict.fromkeys(self.pages, 0)
        for count, name in enumerate(names[: (prompt - 1) // self.page_size], 1):
            for rule, pages in self.pages.items():
                runs[rule] = runs[rule] + 1 if pages.find(name) is not None else 0
            first = {r: r.first_page(count * self.page_size, self.page_size) for r in self.pages}
            if all(runs[rule] >= count - first[rule] for rule in self.pages):
                longest = count
        return longest

    def check(self) -> None:
        """Raise AssertionError if a page is lost, held twice or promised too often."""
        for rule, pages in self.pages.items():
            pages.check(Counter(page for s in self.open for page in s.held[rule].values()))

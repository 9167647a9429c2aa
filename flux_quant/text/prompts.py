"""Weights in a prompt: `a (red:1.3) fox in [deep] snow` becomes pieces of text, each with the weight of its tokens.

    (text:1.3)   weight 1.3, whatever stands around it
    (text)       times 1.1, also within others: ((text)) is 1.21
    [text]       divided by 1.1
    \\( \\) \\[ \\]  the character itself

As ComfyUI reads prompts, which knows no square brackets. Brackets without a partner are text here; ComfyUI lets the
first of them decide about everything behind it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

MORE = 1.1  # factor of a pair of parentheses; brackets divide by it
PARTNERS = {")": "(", "]": "["}
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*")
SYMBOL = re.compile(r"\\(?P<escaped>[()\[\]])|(?P<bracket>[()\[\]])|(?P<text>\\|[^\\()\[\]]+)")


@dataclass(frozen=True)
class Prompt:
    """A prompt after parsing: neighbours differ in weight, no text is empty. `text` is what a tokenizer reads."""

    pieces: tuple[tuple[str, float], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1 for _, weight in self.pieces)

    @property
    def plain(self) -> "Prompt":
        """The same text without weights, for CLIP: its one vector does not know them."""
        return Prompt(((self.text, 1.0),) if self.text else ())

    def character_weights(self) -> list[float]:
        """Of every character of `text`."""
        return [weight for text, weight in self.pieces for _ in text]

    def token_weights(self, offsets: Sequence[tuple[int, int]]) -> list[float]:
        """Of tokens that lie at these places in `text`: the mean over their characters, spaces apart.

        Tokens without a place (end, padding) have weight 1.
        """
        weights, text = self.character_weights(), self.text

        def mean(begin: int, end: int) -> float:
            inside = [weights[i] for i in range(begin, end) if not text[i].isspace()] or weights[begin:end] or [1.0]
            return inside[0] if len(set(inside)) == 1 else sum(inside) / len(inside)

        return [mean(begin, end) for begin, end in offsets]


@dataclass
class Symbol:
    """A run of characters, or a bracket that may find its partner."""

    text: str
    bracket: bool = False
    partner: int | None = None  # its number


def parse(prompt: str) -> Prompt:
    """Never fails: what is no weight is text."""
    runs = ((text, weight) for text, weight in weighted(paired(prompt)) if text)
    joined = ((weight, "".join(text for text, _ in group)) for weight, group in groupby(runs, lambda run: run[1]))
    return Prompt(tuple((text, weight) for weight, text in joined))


def paired(prompt: str) -> list[Symbol]:
    """The symbols of a prompt, every bracket with its partner if it has one of its kind."""
    symbols: list[Symbol] = []
    opened: list[int] = []  # numbers of brackets that wait for a partner
    waiting = Counter()  # how many of each kind
    for match in SYMBOL.finditer(prompt):
        text = match["bracket"]
        symbols.append(Symbol(text or match["escaped"] or match["text"], bracket=bool(text)))
        here = len(symbols) - 1
        if text and text not in PARTNERS:
            opened.append(here)
            waiting[text] += 1
        elif text and waiting[PARTNERS[text]]:
            while symbols[begin := opened.pop()].text != PARTNERS[text]:  # what was opened inside and never closed
                waiting[symbols[begin].text] -= 1
            waiting[PARTNERS[text]] -= 1
            symbols[begin].partner, symbols[here].partner = here, begin
    return symbols


def weighted(symbols: list[Symbol]) -> Iterator[tuple[str, float]]:
    """Text and weight of every symbol that is text."""
    around = [1.0]
    for i, symbol in enumerate(symbols):
        if symbol.partner is None:
            yield symbol.text, around[-1]
        elif symbol.partner < i:
            around.pop()
        else:
            number = explicit_weight(symbols, i) if symbol.text == "(" else None
            factor = MORE if symbol.text == "(" else 1 / MORE
            around.append(around[-1] * factor if number is None else number)


def explicit_weight(symbols: list[Symbol], begin: int) -> float | None:
    """The number after the last colon of `(text:1.3)`, which is taken off the text; None if it has none."""
    last = symbols[symbols[begin].partner - 1]
    if last.bracket:
        return None
    text, colon, number = last.text.rpartition(":")
    is_first = symbols[begin].partner - 2 == begin
    if not colon or (is_first and not text) or not NUMBER.fullmatch(number):
        return None
    last.text = text
    return float(number)

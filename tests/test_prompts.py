"""Weights in prompts: what ComfyUI's reader makes of a string, our square brackets, and what is only text."""

import pytest

from flux_quant.text.prompts import Prompt, parse

COMFYUI = {  # as its `token_weights` reads them
    "a red fox": [("a red fox", 1)],
    "": [],
    "a (red) fox": [("a ", 1), ("red", 1.1), (" fox", 1)],
    "a (red:1.3) fox": [("a ", 1), ("red", 1.3), (" fox", 1)],
    "((a))": [("a", 1.1 * 1.1)],
    "(((a)))b": [("a", 1.1 * 1.1 * 1.1), ("b", 1)],
    "(a (b) c)": [("a ", 1.1), ("b", 1.1 * 1.1), (" c", 1.1)],
    "(a (b:1.3) c:1.2)": [("a ", 1.2), ("b", 1.3), (" c", 1.2)],  # a number counts for itself
    "((a):1.3)": [("a", 1.3 * 1.1)],
    "((a:1.3))": [("a", 1.3)],
    "(a (b:1.3))": [("a ", 1.1), ("b", 1.3)],
    "(a:0.5)(b:0.5)": [("ab", 0.5)],
    "(a:0)": [("a", 0)],
    "(a:-1)": [("a", -1)],
    "(a: 1.3 )": [("a", 1.3)],
    "(a:.5)": [("a", 0.5)],
    "(a:2.)": [("a", 2)],
    "(a:1e-1)": [("a", 0.1)],
    "(a:b:1.3)": [("a:b", 1.3)],
    "(a:)": [("a:", 1.1)],
    "(a:b)": [("a:b", 1.1)],
    "(:1.3)": [(":1.3", 1.1)],  # a number needs something that it weighs
    "()": [],
    "a()b": [("ab", 1)],
    "(a\nb:1.2)": [("a\nb", 1.2)],
    r"\(a\)": [("(a)", 1)],
    r"(a \(b\):1.3)": [("a (b)", 1.3)],
    r"(a\):1.3)": [("a)", 1.3)],
    r"a\b": [(r"a\b", 1)],
    "(a": [("(a", 1)],
    "a)": [("a)", 1)],
    "a: 1.3": [("a: 1.3", 1)],
}
OURS = {
    "[a]": [("a", 1 / 1.1)],
    "a [red] fox": [("a ", 1), ("red", 1 / 1.1), (" fox", 1)],
    "[[a]]": [("a", 1 / 1.1 / 1.1)],
    "([a]:1.3)": [("a", 1.3 / 1.1)],
    "[(a:1.3)]": [("a", 1.3)],
    "[a:0.5]": [("a:0.5", 1 / 1.1)],
    r"\[a\]": [("[a]", 1)],
    "a) (b:1.2)": [("a) ", 1), ("b", 1.2)],  # ComfyUI takes the rest for text
    "(a (b:1.2)": [("(a ", 1), ("b", 1.2)],  # ComfyUI gives all of it 1.2
    "([a)]": [("[a", 1.1), ("]", 1)],
    ":-) (b)": [(":-) ", 1), ("b", 1.1)],
    "(a:nan)": [("a:nan", 1.1)],
    "(a:inf)": [("a:inf", 1.1)],
}


@pytest.mark.parametrize(("text", "pieces"), (COMFYUI | OURS).items(), ids=repr)
def test_pieces(text: str, pieces: list[tuple[str, float]]):
    found = parse(text).pieces
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces], rel=1e-12)


def test_what_follows_from_pieces():
    prompt = parse("a (red:1.3) fox")
    assert prompt.text == "a red fox" and prompt.is_weighted and len(prompt.character_weights()) == len(prompt.text)
    assert not parse("a (red:1) fox").is_weighted and not parse("").is_weighted
    assert parse("a (red:1) fox") == parse("a red fox") == Prompt((("a red fox", 1.0),))


def test_tokens_get_the_mean_of_their_characters():
    prompt = parse("ab (cd:2)e")
    places = [(0, 2), (2, 3), (2, 5), (3, 6), (0, 0), (1, 4)]
    assert prompt.token_weights(places) == [1, 1, 2, pytest.approx(5 / 3), 1, 1.5]


@pytest.mark.parametrize("text", ["(" * 30_000 + "a" + ")" * 30_000, "(" * 30_000 + "]" * 30_000, "[(" * 20_000 + "])"])
def test_absurd_prompts_are_read(text: str):
    assert parse(text).text.strip("[]()") in ("a", "")

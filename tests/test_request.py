"""What is asked for: refusals with their remedy, sizes, seeds, and what is written down of it."""

import json
import warnings
from pathlib import Path

import pytest

from flux_quant.drawing.request import Request, drawable_size, parse_range, parse_seeds, picture_paths
from flux_quant.drawing.schedules import noise_levels
from flux_quant.errors import UserError

IMAGE = Path("given.png")
REFUSED = {  # changes -> what the line says
    "size": (dict(size=(100, 96)), "multiples of 16"),
    "no size": (dict(size=(0, 16)), "multiples of 16"),
    "steps": (dict(steps=0), "at least 1"),
    "scheduler": (dict(scheduler="karras"), "choose one of euler, simple, beta"),
    "cfg alone": (dict(cfg=3.0), "give both, for example cfg 3.5"),
    "negative alone": (dict(negative=""), "give both, for example cfg 3.5"),
    "range": (dict(cfg_range=(0.5, 0.5)), "cfg range 0.5 to 0.5"),
    "range outside": (dict(cfg_range=(-0.1, 0.5)), "choose a part of 0 to 1"),
    "no number": (dict(cfg_range=(float("nan"), 1.0)), "cfg range"),
    "mask alone": (dict(mask=Path("m.png")), "needs a given picture"),
    "strength alone": (dict(strength=0.5), "needs a given picture"),
    "denoise alone": (dict(denoise=0.5), "needs a given picture"),
    "two ways": (dict(image=IMAGE, strength=0.5, denoise=0.5), "exclude each other"),
    "seed": (dict(seed=-1), "seeds go from 0"),
    "seeds": (dict(seeds=(1, 1 << 64)), "seeds go from 0"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        Request("a fox", **changes)


def test_levels_of_a_request():
    request = Request("a fox", steps=10, size=(512, 256))
    whole = noise_levels("euler", 10, 512, guided=True)
    assert request.levels(guided=True) == whole
    assert request.levels(guided=False) == noise_levels("euler", 10, 512, guided=False)
    given = Request("a fox", steps=10, size=(512, 256), image=IMAGE)
    assert given.levels(guided=True) == whole[4:], "diffusers' default of 0.6"
    assert Request("a fox", steps=10, size=(512, 256), image=IMAGE, strength=0.3).levels(guided=True) == whole[7:]
    kept = Request("a fox", steps=10, size=(512, 256), image=IMAGE, denoise=0.5).levels(guided=True)
    assert kept == noise_levels("euler", 20, 512, guided=True)[10:]


def test_a_picture_that_drowns_in_noise_is_reported():
    for changes in (dict(strength=1.0), dict(strength=0.9), dict(denoise=1.0)):
        with pytest.warns(UserWarning, match="given.png is not seen: its change takes all 4 steps"):
            Request("a fox", steps=4, image=IMAGE, **changes).levels(guided=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Request("a fox", steps=4, image=IMAGE, strength=1.0, mask=Path("m.png")).levels(guided=True)


def test_settings_hold_what_was_used():
    assert set(Request("a fox").settings()) == {"prompt", "prompt_t5", "steps", "guidance", "seed", "size"}
    full = Request("a fox", scheduler="beta", seeds=(1, 2), negative="", cfg=2.0, image=IMAGE, denoise=0.4)
    settings = json.loads(json.dumps(full.settings()))
    assert settings["image"] == "given.png" and settings["denoise"] == 0.4 and settings["negative"] == ""
    assert "strength" not in settings and "seeds" not in settings
    assert [request.seed for request in full.one_by_one()] == [1, 2]


SIZES = [  # given, drawn, warnings
    ((1024, 1024), (1024, 1024), ()),
    ((1920, 1080), (1920, 1088), ("becomes 1920x1088",)),
    ((1000, 700), (1008, 704), ("becomes 1008x704",)),
    ((320, 320), (320, 320), ()),
    ((256, 256), (256, 256), ("far from the 1024x1024",)),
    ((2048, 2048), (2048, 2048), ("far from",)),
    ((3, 3), (16, 16), ("becomes 16x16", "far from")),
]


@pytest.mark.parametrize(("given", "drawn", "said"), SIZES, ids=str)
def test_sizes_are_rounded_with_a_notice(given: tuple[int, int], drawn: tuple[int, int], said: tuple[str, ...]):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert drawable_size(given) == drawn
    assert len(caught) == len(said)
    assert all(words in str(warning.message) for words, warning in zip(said, caught, strict=True))
    Request("a fox", size=drawn)


def test_the_size_of_the_model_counts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawable_size((96, 96), recommended=(96, 96)) == (96, 96)
    with pytest.raises(UserError, match="positive"):
        drawable_size((0, 64))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((None, 7, None), ()), ((None, 7, 3), (7, 8, 9)), (("5, 1,9", 7, None), (5, 1, 9)), (("4", 0, None), (4,))],
    ids=str,
)
def test_seeds(arguments: tuple, expected: tuple[int, ...]):
    assert parse_seeds(*arguments) == expected


def test_what_cannot_be_read():
    with pytest.raises(UserError, match="exclude each other"):
        parse_seeds("1,2", 0, 3)
    for text in ("1,,2", "one", ""):
        with pytest.raises(UserError, match="numbers with commas"):
            parse_seeds(text, 0, None)
    for text in ("0.5", "a:b", "0:1:2", ""):
        with pytest.raises(UserError, match="FROM:TO"):
            parse_range(text)
    assert parse_range("0:0.6") == (0.0, 0.6)


def test_pictures_of_several_seeds_get_names():
    assert picture_paths(Path("out/fox.png"), (7,)) == [Path("out/fox.png")]
    assert picture_paths(Path("out/fox.png"), (7, 3)) == [Path("out/fox-7.png"), Path("out/fox-3.png")]
    with pytest.raises(UserError, match="same seed twice"):
        picture_paths(Path("fox.png"), (7, 7))

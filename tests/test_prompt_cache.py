"""Encodings on the disk: what makes two prompts the same, what is no entry, many processes, a limit; and which model
lies at a path."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_quant.cli import main
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.converters.lora_records import Lora, Record
from flux_quant.errors import UserError
from flux_quant.generation import Request, encode
from flux_quant.text import encode as text
from flux_quant.text import encoders, identity
from flux_quant.text.encode import TextFeatures, TextOptions
from flux_quant.text.encoders import Placement
from flux_quant.text.prompt_cache import Entry, PromptCache

PROMPT = "large (red:1.3) apple"


@pytest.fixture
def model(tmp_path: Path) -> Components:
    """A copy of the bundled model's text side that tests may change."""
    for name in ("text_encoders", "tokenizers"):
        shutil.copytree(BUNDLED / name, tmp_path / "model" / name)
    own = tmp_path / "model"
    t5, clip = (own / "text_encoders" / name for name in ("t5.safetensors", "clip_l.safetensors"))
    return replace(find_components(BUNDLED), t5=t5, clip=clip, tokenizers=own / "tokenizers")


@pytest.fixture
def options(tmp_path: Path) -> TextOptions:
    return TextOptions(cache=PromptCache(tmp_path / "cache"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which encoders were opened."""
    names = []
    for kind, name in (("t5", "open_t5"), ("clip", "load_clip")):
        real = getattr(encoders, name)
        monkeypatch.setattr(encoders, name, lambda *a, kind=kind, real=real: (names.append(kind), real(*a))[1])
    return names


def features(model: Components, options: TextOptions, prompt: str = PROMPT, prompt_t5: str | None = None):
    return encode(model, [Request(prompt, prompt_t5)], True, options)


def same(a: TextFeatures, b: TextFeatures) -> bool:
    return torch.equal(a.txt, b.txt) and torch.equal(a.pooled, b.pooled)


@pytest.mark.parametrize("precision", encoders.PRECISIONS)
def test_a_hit_is_what_was_computed(precision: str, model: Components, options: TextOptions, opened: list[str]):
    options = replace(options, placement=Placement(precision=precision))
    plain = features(model, replace(options, cache=None))
    first = features(model, options)
    assert opened == ["t5", "clip"] * 2 and same(plain, first)
    again = features(model, options)
    assert opened == ["t5", "clip"] * 2 and same(first, again) and again.txt.dtype == first.txt.dtype


@pytest.mark.parametrize("then", ["unreadable", "gone"])
def test_a_repeated_prompt_needs_no_encoder(then: str, model: Components, options: TextOptions):
    """Their size and time of change say that they are the same; if they are gone, what lay there last counts."""
    first = features(model, options)
    for path in (model.t5, model.clip):
        stat = path.stat()
        if then == "gone":
            path.unlink()
        else:
            path.write_bytes(bytes(stat.st_size))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(features(model, options), first)
    with pytest.raises((UserError, FileNotFoundError)):
        features(model, options, "octopus")


def test_other_weights_of_a_known_text_need_no_encoder(model: Components, options: TextOptions, opened: list[str]):
    features(model, options)
    opened.clear()
    changed = features(model, options, "[large] red (apple:0.7)")
    assert not opened
    assert same(changed, features(model, replace(options, cache=None), "[large] red (apple:0.7)"))


def swap_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def lora_of(component: str) -> Lora:
    """That changes one norm, of the transformer something that no encoder looks at."""
    norm = {"t5": "encoder.final_layer_norm", "clip_l": "text_model.final_layer_norm"}.get(component, "img_in")
    change = {"value": torch.ones(128, 1)}
    record = Record(component, norm, "diff", 0, 128, change, 1.0, None, None, (f"{norm}.w_norm",))
    return Lora(Path(__file__), (record,), [], {}, {})


CHANGES: dict[str, tuple[Callable[[Components], object], dict[str, object], list[str]]] = {
    "nothing": (lambda m: None, {}, []),
    "time of change": (lambda m: os.utime(m.t5, (1, 1)), {}, []),
    "both prompts": (lambda m: None, {"prompt": "ant"}, ["t5", "clip"]),
    "prompt of T5": (lambda m: None, {"prompt_t5": "ant"}, ["t5"]),
    "length": (lambda m: None, {"pad_to": 7}, ["t5"]),
    "precision": (lambda m: None, {"placement": Placement(precision="mixed")}, ["t5"]),
    "how many at once": (lambda m: None, {"placement": Placement(at_once=4)}, []),
    "LoRA": (lambda m: None, {"loras": ((lora_of("t5"), 0.5), (lora_of("clip_l"), 1.0))}, ["t5", "clip"]),
    "LoRA of CLIP": (lambda m: None, {"loras": ((lora_of("clip_l"), 1.0),)}, ["clip"]),
    "LoRA of the transformer": (lambda m: None, {"loras": ((lora_of("transformer"), 1.0),)}, []),
    "last byte of T5": (lambda m: swap_byte(m.t5, -1), {}, ["t5"]),
    "byte in the middle of T5": (lambda m: swap_byte(m.t5, m.t5.stat().st_size // 2), {}, ["t5"]),
    "last byte of CLIP": (lambda m: swap_byte(m.clip, -1), {}, ["clip"]),
    "T5's tokenizer": (lambda m: lengthen(m.tokenizers / "t5/tokenizer_config.json"), {}, ["t5"]),
    "CLIP's tokenizer": (lambda m: lengthen(m.tokenizers / "clip/vocab.json"), {}, ["clip"]),
}


@pytest.mark.parametrize(("change", "other", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_makes_another_encoding(
    change: Callable, other: dict, expected: list[str], model: Components, options: TextOptions, opened: list[str]
):
    features(model, options)
    opened.clear()
    change(model)
    own = {name: other[name] for name in other if name.startswith("prompt")}
    features(model, replace(options, **{name: other[name] for name in other if name not in own}), **own)
    assert opened == expected


def test_precision_of_products_makes_another_encoding(model: Components, options: TextOptions, opened: list[str]):
    features(model, options)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        features(model, options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert opened == ["t5", "clip"] * 2


def test_a_moved_model_is_the_same(model: Components, options: TextOptions, opened: list[str], tmp_path: Path):
    first = features(model, options)
    opened.clear()
    for path, name in ((model.t5, "other.safetensors"), (model.clip, "third.safetensors")):
        path.rename(tmp_path / name)
    moved = replace(model, t5=tmp_path / "other.safetensors", clip=tmp_path / "third.safetensors")
    assert same(features(moved, options), first) and not opened


def test_equal_prompts_are_encoded_once(model: Components, options: TextOptions, monkeypatch: pytest.MonkeyPatch):
    """The empty prompt, which weights need, is one of them."""
    seen, real = [], text.t5_states
    monkeypatch.setattr(text, "t5_states", lambda path, ids, *rest: (seen.append(len(ids)), real(path, ids, *rest))[1])
    prompts = ["ant", "(ant:1.2)", "", "[ant] ", "ant"]
    batch = encode(model, [Request(prompt) for prompt in prompts], True, options)
    assert seen == [3] and batch.txt.shape[0] == 5  # "ant", "", "ant "
    assert torch.equal(batch.txt[0], batch.txt[4]) and not torch.equal(batch.txt[0], batch.txt[1])


def test_what_is_cut_off_is_said_every_time(model: Components, options: TextOptions):
    for _ in range(2):
        with pytest.warns(UserWarning, match="T5 reads 5 tokens, the last 16 of the prompt are cut off"):
            features(model, replace(options, pad_to=5), "ant " * 10)


# --- Entries ----------------------------------------------------------------------------------------------------------

TENSORS = {
    "a": torch.tensor([[1.5, -0.0, 3e-45], [float("inf"), 1e38, 7]]),
    "b": torch.randn(3).bfloat16(),
    "c": torch.randn(2, 2).half(),
    "none": torch.zeros(0, 4),
}


def small(value: float = 1.0) -> Entry:
    return Entry({"x": torch.full((64,), float(value))})


def test_nothing_is_lost(tmp_path: Path):
    cache, key = PromptCache(tmp_path / "new" / "cache"), {"text": "naïve 🦊 \x00", "n": 0.1}
    assert cache.get(key) is None
    cache.put(key, Entry(TENSORS, {"places": [[0, 3]], "cut": 0}))
    found = cache.get(dict(reversed(key.items())))
    assert found.notes == {"places": [[0, 3]], "cut": 0} and set(found.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype and found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name].view(torch.uint8), tensor.view(torch.uint8))
    assert cache.get({**key, "n": 0.2}) is None
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a bit": lambda path: swap_byte(path, -1),
    "a bit of the header": lambda path: swap_byte(path, 40),
    "text": lambda path: path.write_text("hello world"),
    "a pickle": lambda path: path.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "of another key": lambda path: path.write_bytes(path.with_name("other").read_bytes()),
    "without notes": lambda path: path.write_bytes(path.read_bytes().replace(b"flux_quant.notes", b"flux_quant.nodes")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entries_are_none(damage: Callable[[Path], object], tmp_path: Path):
    cache, key = PromptCache(tmp_path), {"text": "ant"}
    cache.put({"text": "other"}, small(2))
    cache.path({"text": "other"}).rename(tmp_path / "other")
    cache.put(key, small())
    damage(cache.path(key))
    assert cache.get(key) is None
    cache.put(key, small())
    assert torch.equal(cache.get(key).tensors["x"], torch.ones(64))


def test_the_least_recently_used_goes_first(tmp_path: Path):
    cache = PromptCache(tmp_path)
    for i in range(4):
        cache.put({"i": i}, small(i))
        os.utime(cache.path({"i": i}), (i, i))
    each = cache.path({"i": 0}).stat().st_size
    cache.get({"i": 1})
    limited = replace(cache, limit=3 * each)
    limited.put({"i": 4}, small(4))
    assert [limited.get({"i": i}) is not None for i in range(5)] == [False, True, False, True, True]
    replace(cache, limit=each - 1).put({"i": 5}, small(5))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path):
    old, new = tmp_path / ".a.safetensors.part", tmp_path / ".b.safetensors.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    PromptCache(tmp_path).put({"i": 0}, small())
    assert not old.exists() and new.exists()


def test_a_cache_that_cannot_be_written_is_a_warning(model: Components, tmp_path: Path):
    (tmp_path / "file").touch()
    options = TextOptions(cache=PromptCache(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="not kept for the next time"):
        found = features(model, options)
    assert same(found, features(model, replace(options, cache=None)))


HAMMER = """
import random, sys
from pathlib import Path
import torch
from flux_quant.text.prompt_cache import Entry, PromptCache

cache, hits = PromptCache(Path(sys.argv[1]), 20_000), 0
for i in random.Random(sys.argv[2]).choices(range(20), k=250):
    found = cache.get({"i": i})
    if found is None:
        cache.put({"i": i}, Entry({"x": torch.full((256,), float(i))}, {"i": i}))
    else:
        assert found.notes == {"i": i} and (found.tensors["x"] == i).all()
        hits += 1
print(hits)
"""


def test_processes_share_a_folder(tmp_path: Path, start: Callable):
    """Twenty entries, of which a dozen fit: they write, read and remove under each other's hands."""
    processes = [start("-W", "ignore", "-c", HAMMER, str(tmp_path), str(seed)) for seed in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert int(out) > 20
    files = list(tmp_path.iterdir())
    assert {path.suffix for path in files} == {".safetensors"} and 5 < len(files) < 20
    assert sum(path.stat().st_size for path in files) <= 20_000


# --- Which model it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, 16384, 16385, 300_000, 9_000_000])
def test_size_first_and_last_byte_count(size: int, tmp_path: Path):
    path = tmp_path / "model.safetensors"

    def of(data: bytes) -> str:
        path.write_bytes(data)
        return identity.identity(path)

    data = bytes(size)
    found = [of(data), of(data + b"\0"), *(of(data[:i] + b"\1" + data[i + 1 :]) for i in {0, size - 1} if size)]
    assert len(set(found)) == len(found) and of(data) == found[0]


def test_shards_are_one_model(tmp_path: Path):
    shards = [tmp_path / f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for i, path in enumerate(shards):
        path.write_bytes(bytes([i]) * 100)
    found = identity.identity(shards[0])
    assert found == identity.identity(shards[1]) == identity.identity(tmp_path)
    shards[1].write_bytes(b"x" * 100)
    assert identity.identity(shards[0]) != found


def test_a_known_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, memory = tmp_path / "model.safetensors", tmp_path / "cache" / "models.json"
    path.write_bytes(b"one")
    found = identity.identity(path, memory)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "sampled", None)
        assert identity.identity(path, memory) == found
    path.write_bytes(b"another")
    other = identity.identity(path, memory)
    assert other != found
    path.unlink()
    assert identity.identity(path, memory) == other
    with pytest.raises((UserError, FileNotFoundError)):
        identity.identity(tmp_path / "never.safetensors", memory)
    assert os.listdir(memory.parent) == ["models.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"x": 1}', '{"x": {"files": []}}', "[" * 100_000])
def test_a_damaged_memory_is_none(content: str, tmp_path: Path):
    path, memory = tmp_path / "model.safetensors", tmp_path / "models.json"
    path.write_bytes(b"one")
    memory.write_text(content)
    found = identity.identity(path, memory)
    assert found == identity.identity(path) and json.loads(memory.read_text())


# --- The command line -------------------------------------------------------------------------------------------------


def test_generate_keeps_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]):
    monkeypatch.setenv("FLUX_QUANT_CACHE", str(tmp_path / "cache"))
    command = ["generate", "-m", str(BUNDLED), "-p", "red (apple)", "--steps", "1", "--size", "32x32", "--force"]

    def draw(*more: str) -> bytes:
        picture = tmp_path / "picture.png"
        assert main([*command, "-o", str(picture), *more]) == 0
        return picture.read_bytes()

    first = draw("--no-prompt-cache")
    assert not (tmp_path / "cache").exists()
    opened.clear()
    assert draw() == first == draw() and opened == ["t5", "clip"]
    changed = [draw("--t5-prompt", "octopus"), draw("--prompt-t5", ""), draw("--pad-to", "9"), draw("-p", "red apple")]
    assert len({first, *changed}) == 5
    draw("-p", "penguin", "--prompt-cache-size", "1kB")
    assert not list((tmp_path / "cache/prompts").glob("*.safetensors"))

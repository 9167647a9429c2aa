"""The tuner with made-up clocks: what it tries, what it keeps, and that dispatch follows."""

import json

import pytest
import torch

from flux_quant.formats import FORMATS, INT8_ROWS
from flux_quant.kernels import dispatch, fallback, tables
from flux_quant.kernels.tables import FUSED, TWO_PASS, VECTOR, Step

pytest.importorskip("triton")

from flux_quant.kernels import eight_bit, triton_path, tuning  # noqa: E402 - needs triton

SHAPE = (64, 256)
CPU = torch.device("cpu")


@pytest.fixture(params=[(7, 5), (8, 6), (9, 0)], ids=str)
def card(request, monkeypatch, tmp_path):
    """A card that only says what it is; products are not computed."""
    monkeypatch.setattr(fallback, "triton_for", lambda device, minimum=(7, 0): None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some card")
    monkeypatch.setattr(tables, "table_file", lambda device: tmp_path / "card.json")
    monkeypatch.setattr(tables, "MEASURED", tmp_path / "shipped")
    tables.forget()
    yield request.param
    tables.forget()


def clock(times):
    """seconds(call, copies) that asks `times` about each way, and runs nothing."""

    def seconds(call, copies):
        assert copies == 2
        (step,) = call.args
        return times(step)

    return seconds


def test_ways_that_a_card_has(card):
    found = {step.path for step in tuning.options(FORMATS["q4_k"], 16, SHAPE, torch.empty(16, 256).half())}
    assert found == ({TWO_PASS} if card < (8, 0) else {TWO_PASS, FUSED})
    few = {step.path for step in tuning.options(FORMATS["q4_k"], 2, SHAPE, torch.empty(2, 256).half())}
    assert few == found | {VECTOR}
    odd = {step.path for step in tuning.options(FORMATS["fp8"], 2, (64, 250), torch.empty(2, 250).half())}
    assert odd == {TWO_PASS}


def test_winners_become_steps(card, monkeypatch):
    copies = [FORMATS["q4_k"].pack(torch.randn(SHAPE)) for _ in range(2)]
    best = {VECTOR: 1, FUSED: 2}  # numbers of the configurations that are fastest

    def times(step):
        if step.path == TWO_PASS:
            return 10.0 if step.rows <= 64 else 1.0
        return 2.0 if step.config == best[step.path] else 3.0

    monkeypatch.setattr(triton_path, "candidates", lambda path, *_: [0, 1, 2])
    table, evidence = tuning.tune(CPU, [(FORMATS["q4_k"], SHAPE, copies)], torch.float16, clock(times))
    fused = (Step(64, FUSED, 2),) if card >= (8, 0) else ()
    assert table["q4_k"] == (Step(8, VECTOR, 1), *fused, Step(None, TWO_PASS))
    assert evidence["q4_k"][1]["vector 1"] == 2e6
    stored = json.loads(tables.table_file(CPU).read_text())
    assert stored["table"]["q4_k"][0] == {"rows": 8, "path": VECTOR, "config": {"bn": 16, "warps": 4}}
    way = dispatch.way_for(FORMATS["q4_k"], 5, SHAPE, torch.float16, torch.device("cuda"))
    assert (way.path, way.config) == (VECTOR, 1) and "measured on some card" in way.why


def test_when_it_is_enough_no_format_is_begun_and_the_others_are_kept(card):
    def weights():
        for name in ("q8_0", "q4_k", "q5_k"):
            begun.append(name)
            yield FORMATS[name], SHAPE, [FORMATS[name].pack(torch.randn(SHAPE)) for _ in range(2)]

    begun = []
    table, evidence = tuning.tune(CPU, weights(), torch.float16, clock(lambda step: 1.0), lambda: len(begun) == 2)
    assert begun == list(table) == list(evidence) == ["q8_0", "q4_k"]
    assert set(tables.measured(CPU)) == {"q8_0", "q4_k"}


def test_a_way_that_is_hardly_faster_is_not_worth_it():
    times = {8: {Step(8, TWO_PASS): 1.0, Step(8, VECTOR, 0): 0.98}, 16: {Step(16, TWO_PASS): 1.0}}
    assert tuning.steps_of(times) == (Step(None, TWO_PASS),)


def test_configurations_that_do_not_run_are_left_out(card):
    from triton.compiler import CompilationError

    def times(step):
        if step.path != TWO_PASS:
            raise CompilationError(None, None, "too many registers")
        return 1.0

    copies = [FORMATS["q8_0"].pack(torch.randn(SHAPE)) for _ in range(2)]
    table, _ = tuning.tune(CPU, [(FORMATS["q8_0"], SHAPE, copies)], torch.float16, clock(times))
    assert table == {"q8_0": (Step(None, TWO_PASS),)}
    with pytest.raises(ZeroDivisionError):
        tuning.tune(CPU, [(FORMATS["q8_0"], SHAPE, copies)], torch.float16, clock(lambda step: 1 / 0))


def test_int8_products_are_tuned_by_their_tiles(card, monkeypatch):
    copies = [INT8_ROWS.pack(torch.randn(SHAPE)) for _ in range(2)]
    wanted = (eight_bit.INT_MM, None) if card < (8, 0) else (eight_bit.TRITON, 3)
    monkeypatch.setattr(eight_bit, "int8_obstacles", obstacles_on_cuda(card))

    def times(step):
        return 1.0 if (step.path, step.config) == wanted else 2.0

    table, _ = tuning.tune(CPU, [(INT8_ROWS, SHAPE, copies)], torch.float16, clock(times))
    assert (table["int8"][-1].path, table["int8"][-1].config) == wanted and table["int8"][-1].rows is None


def obstacles_on_cuda(capability):
    from flux_quant.kernels.int8_torch import obstacle

    def obstacles(rows, shape, device):
        return {way: obstacle(way, capability, rows, *shape) for way in ("tma", "triton", "int_mm")}

    return obstacles

"""The pretended CUDA device refuses what a real one refuses, and gives the CPU's numbers."""

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import pretended_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
G = torch.Generator().manual_seed(0)
HERE, IDS = torch.randn(3, 4, generator=G), torch.tensor([2, 0])


@pytest.fixture
def card():
    with pretended_cuda() as runtime:
        yield runtime


REFUSED = {  # what meets a tensor (3, 4) of the device, what is said
    "sum": (lambda x: x + HERE, "same device"),
    "in place on the CPU": (lambda x: HERE.clone().add_(x), "same device"),
    "product": (lambda x: x @ HERE.t(), "same device"),
    "linear": (lambda x: F.linear(x, HERE), "same device"),
    "cat": (lambda x: torch.cat([x, HERE]), "same device"),
    "stack": (lambda x: torch.stack([x, HERE]), "same device"),
    "where": (lambda x: torch.where(HERE > 0, x, x), "same device"),
    "norm": (lambda x: F.layer_norm(x, (4,), torch.ones(4)), "same device"),
    "embedding": (lambda x: F.embedding(IDS, x), "same device"),
    "gather": (lambda x: x.gather(0, IDS[None]), "same device"),
    "number into cat": (lambda x: torch.cat([x[0], HERE[0]]), "same device"),
    "attention": (lambda x: F.scaled_dot_product_attention(x[None], HERE[None], x[None]), "same device"),
    "indexing the CPU": (lambda x: HERE[(x[0] > 0)[:3]], "same device|indices should be"),
    "numpy": (lambda x: x.numpy(), "can't convert cuda:0"),
    "generator": (lambda x: torch.randn(3, device="cuda", generator=G), "generator"),
    "integers": (lambda x: x.int() @ x.int().t(), "not implemented"),
    "few rows": (lambda x: torch._int_mm(x.char(), x.char().t()), "size"),
    "pinning": (lambda x: x.pin_memory(), "cannot pin"),
    "device without number": (lambda x: torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda")), "index"),
    "times of plain events": (lambda x: torch.cuda.Event().elapsed_time(torch.cuda.Event()), "enable_timing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(card, what: str):
    run, message = REFUSED[what]
    x = HERE.cuda()
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError), match=message):
        run(x)


TAKEN = {
    "numbers": lambda x: x * torch.tensor(2.0) + 1 - torch.tensor(3),
    "whole numbers": lambda x: (x * 100).int() % 7 & 3,
    "indices of the CPU": lambda x: x[IDS],
    "masks": lambda x: x[x > 0],
    "masked": lambda x: x.masked_fill(x > 0, 5),
    "views": lambda x: x.t()[1:].unflatten(0, (3, 1)).permute(2, 0, 1),
    "bytes": lambda x: x.contiguous().view(torch.uint8).view(torch.float32)[:, ::2],
    "reductions": lambda x: torch.cat([x.amax(0), x.sum(0), x.cumsum(1)[0], x.std(0)]),
    "into a view": lambda x: x.clone()[:, 1:3].mul_(0).add_(x[:, 1:3]),
    "product in 16 bits": lambda x: (x.bfloat16() @ x.bfloat16().t()).float(),
    "e4m3": lambda x: x.to(torch.float8_e4m3fn).float(),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "convolution": lambda x: F.conv2d(x[None, None], x.new_ones(2, 1, 3, 3), padding=1),
    "group norm": lambda x: F.group_norm(x[None], 1),
    "out": lambda x: torch.cat([x, x], out=x.new_empty(0)),
    "lists": lambda x: torch.stack([part.sum() for part in x.split(2)]),
}


@pytest.mark.parametrize("what", TAKEN)
def test_numbers_are_those_of_the_cpu(card, what: str):
    found = TAKEN[what](HERE.cuda())
    assert type(found) is torch.Tensor and found.is_cuda and found.device == torch.device("cuda", 0)
    torch.testing.assert_close(found.cpu(), TAKEN[what](HERE), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_fresh_memory_holds_no_numbers(card):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.empty(5, dtype=dtype, device="cuda").isnan().all()


def test_modules_and_what_points_elsewhere(card):
    layer, x = torch.nn.Linear(4, 3), HERE.cuda()
    expected = layer(HERE)
    kept = layer.weight
    kept.data = kept.data.cuda()
    assert kept.is_cuda and type(kept) is torch.nn.Parameter
    torch.testing.assert_close(layer.cuda()(x).cpu(), expected)
    kept.data = kept.data.cpu()
    with torch.autocast("cuda", torch.bfloat16):
        assert layer.cuda()(x).dtype == torch.bfloat16


def test_memory_is_counted_and_limited(card):
    before = torch.cuda.memory_allocated()
    x = torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() - before == x.nbytes
    free, total = torch.cuda.mem_get_info()
    assert total - free == torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((before + (10 << 20)) / total)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
    del x
    assert torch.empty(8 << 20, dtype=torch.uint8, device="cuda").is_cuda
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + (8 << 20)


def test_graphs_replay_in_place_and_never_wait(card):
    x, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + 1) * 2
        with pytest.raises(RuntimeError, match="capturing"):
            y.sum().item()
        with pytest.raises(RuntimeError, match="capturing"):
            y.cpu()
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [10.0] * 4


def test_pinned_memory(card):
    assert torch.empty(5, pin_memory=True).is_pinned() and torch.zeros(5).pin_memory().is_pinned()
    memory, runtime = torch.zeros(1 << 14, dtype=torch.uint8), torch.cuda.cudart()
    register = (memory.data_ptr(), memory.numel(), 0)
    assert not memory.is_pinned() and int(runtime.cudaHostRegister(*register)) == 0
    assert memory.is_pinned() and int(runtime.cudaHostRegister(*register)) != 0
    assert int(runtime.cudaHostUnregister(memory.data_ptr())) == 0
    assert not memory.is_pinned() and int(runtime.cudaHostUnregister(memory.data_ptr())) != 0


def test_torch_is_as_before():
    with pretended_cuda(), pytest.raises(RuntimeError, match="there is a CUDA device"), pretended_cuda():
        pass
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(3).cuda()
    layer = torch.nn.Linear(4, 3)
    layer(HERE).sum().backward()
    assert layer.weight.grad is not None and not torch.empty(3).is_pinned()

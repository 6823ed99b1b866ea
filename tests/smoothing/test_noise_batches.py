import logging
from types import SimpleNamespace

import psutil
import pytest
import torch

from medrobust_lib.smoothing.certify import certify
from medrobust_lib.smoothing.noise import Batches, is_out_of_memory, make_batches, suggested_batch_size

CPU = torch.device("cpu")
GIB = 1 << 30
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


class Limited:
    """A computation that runs out of memory above a size; it remembers every call and returns the draws' numbers."""

    def __init__(self, limit, error):
        self.limit, self.error, self.calls = limit, error, []

    def __call__(self, first, count):
        self.calls.append(count)
        if count > self.limit:
            raise self.error
        return list(range(first, first + count))


def covered(batches, compute, **span):
    return [number for block in batches.map(compute, **span) for number in block]


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_batches_cover_every_draw_once_and_in_order(size):
    compute = Limited(100, None)
    assert covered(Batches(size), compute, first=4, count=10) == list(range(4, 14))
    assert max(compute.calls) <= size


def test_no_draws_are_no_batches():
    assert list(Batches(4).map(Limited(9, None), first=3, count=0)) == []


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30] or "MemoryError")
def test_batches_are_halved_until_they_fit_and_say_so(error, caplog):
    compute, batches = Limited(3, error), Batches(16)
    with caplog.at_level(logging.WARNING):
        assert covered(batches, compute, first=0, count=20) == list(range(20))
    assert compute.calls == [16, 8, 4, 2, *[2] * 9]
    assert [record.getMessage() for record in caplog.records] == [
        f"out of memory with batches of {size} images; going on with {size // 2}" for size in (16, 8, 4)
    ]


def test_what_was_learnt_about_memory_is_kept():
    compute, batches = Limited(5, MemoryError()), Batches(16)
    covered(batches, compute, first=0, count=20)
    assert batches.size == 4
    compute.calls.clear()
    covered(batches, compute, first=20, count=20)
    assert compute.calls == [4] * 5


def test_memory_may_run_out_late():
    """The first batches fit, a later one does not: nothing is drawn twice and nothing left out."""
    failures = iter([False, False, True, False, True, False, False, False, False, False, False])

    def compute(first, count):
        if next(failures):
            raise MemoryError
        return list(range(first, first + count))

    assert covered(Batches(8), compute, first=0, count=30) == list(range(30))


@pytest.mark.parametrize("error", OUT_OF_MEMORY[1:3])
def test_one_draw_that_does_not_fit_is_an_error(error):
    with pytest.raises(type(error)) as caught:
        list(Batches(4).map(Limited(0, error), first=0, count=8))
    assert caught.value is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError(1)])
def test_other_errors_are_not_repeated(error):
    compute = Limited(0, error)
    with pytest.raises(type(error)):
        list(Batches(8).map(compute, first=0, count=8))
    assert compute.calls == [8]
    assert not is_out_of_memory(error)


def test_what_torch_really_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)


def test_a_result_may_be_anything():
    assert list(Batches(2).map(lambda first, count: None, first=0, count=4)) == [None, None]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_draw(size):
    with pytest.raises(ValueError, match=f"batch_size={size}: at least one noisy copy"):
        make_batches(size, CPU, (3, 8, 8))


def test_a_certificate_survives_running_out_of_memory(caplog):
    def classifier(pixels):
        if len(pixels) > 20:
            raise MemoryError
        return (pixels.mean((1, 2, 3)) > 0.5).long()

    image = torch.full((3, 4, 4), 0.52)
    reference = certify(classifier, image, sigma=0.25, n=300, batch_size=5)
    with caplog.at_level(logging.WARNING):
        assert certify(classifier, image, sigma=0.25, n=300, batch_size=128) == reference
    assert 0 < reference.k < 300
    assert len(caplog.records) == 3


# The suggestion


def with_free_memory(monkeypatch, n_bytes):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=n_bytes))


def test_the_suggestion_is_a_power_of_two_that_shrinks_with_the_image(monkeypatch):
    with_free_memory(monkeypatch, GIB)
    sizes = [suggested_batch_size(CPU, (3, side, side)) for side in (8, 64, 224, 384, 1024, 8192)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (64, 1)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert len(set(sizes)) >= 4


def test_the_suggestion_never_plans_with_more_than_is_free(monkeypatch):
    for free in (GIB // 8, GIB, 8 * GIB):
        with_free_memory(monkeypatch, free)
        size = suggested_batch_size(CPU, (3, 512, 512))
        assert size == 1 or size * 3 * 512**2 * 4 * 64 <= free / 2
        assert make_batches(None, CPU, (3, 512, 512)).size == size


@pytest.mark.parametrize(("bytes_each", "size"), [(GIB, 1), (GIB // 64, 32), (GIB // 70, 32), (1, 64), (None, 64)])
def test_memory_that_a_copy_takes_is_believed_where_it_is_known(monkeypatch, bytes_each, size):
    with_free_memory(monkeypatch, GIB)
    assert suggested_batch_size(CPU, (3, 8, 8), bytes_each=bytes_each) == size
    assert make_batches(None, CPU, (3, 8, 8), bytes_each=bytes_each).size == size
    assert make_batches(5, CPU, (3, 8, 8), bytes_each=bytes_each).size == 5


def test_without_free_memory_draws_go_one_by_one(monkeypatch):
    with_free_memory(monkeypatch, 0)
    assert suggested_batch_size(CPU, (3, 224, 224)) == 1


def test_an_accelerator_gets_larger_batches_from_its_own_memory(monkeypatch):
    module = SimpleNamespace(mem_get_info=lambda device: (40 * GIB, 80 * GIB))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    gpu = SimpleNamespace(type="cuda")
    assert suggested_batch_size(gpu, (3, 32, 32)) == 1024
    assert suggested_batch_size(gpu, (3, 224, 224)) == 512

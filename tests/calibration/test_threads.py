"""Pieces of work side by side: each on its share of torch's threads, in whatever order, with the same result; and how
products are rounded."""

import threading

import pytest
import torch

from tests.calibration.conftest import layerwise
from vllm_mcmoe.calibration.common.device import bfloat16_products, multiplies_in_bfloat16
from vllm_mcmoe.calibration.common.threads import side_by_side
from vllm_mcmoe.calibration.measure.expert_tokens import experts_at_once
from vllm_mcmoe.calibration.model.description import describe_model


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("count", "at_once", "items", "workers"), [(4, None, 9, 4), (4, 2, 9, 2), (4, 3, 9, 2), (4, 8, 3, 2), (4, 1, 9, 1)]
)
def test_threads_are_shared_out_evenly(threads, count, at_once, items, workers):
    """Three at once would leave one of four threads idle."""
    threads(count)
    together = threading.Barrier(workers)

    def task(item: int) -> tuple[int, int]:
        if item < workers:  # the first ones wait for each other, which one thread alone would do forever
            together.wait(timeout=30)
        return item, torch.get_num_threads()

    assert side_by_side(task, range(items), at_once) == [(item, count // workers) for item in range(items)]
    assert torch.get_num_threads() == count


def test_nested_pieces_keep_their_share(threads):
    threads(4)

    def task(item: int) -> list[int]:
        inner = side_by_side(lambda _: torch.get_num_threads(), range(2))
        return [*inner, torch.get_num_threads()]

    assert side_by_side(task, range(2), 2) == [[1, 1, 2]] * 2
    assert torch.get_num_threads() == 4


def test_an_error_leaves_the_threads_as_they_were(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 // item, range(8))
    assert torch.get_num_threads() == 2


def test_experts_at_once_take_no_more_than_their_layer(reference_model):
    """8 copies of [1024, 256] and 6 of [512, 512], and 4 of [2048, 1024] of a chunk of tokens, 48 MB: five in 256 MB,
    which every layer has, and twenty-two in 1 GB."""
    description, cpu = describe_model(reference_model), torch.device("cpu")
    assert [experts_at_once(description, cpu, nbytes) for nbytes in (0, 256 << 20, 1 << 30)] == [5, 5, 22]
    assert experts_at_once(description, torch.device("meta"), 1 << 30) == 1
    model = layerwise(reference_model)
    model.note_layer_arguments(8)
    with model.loaded_layer(0) as layer:
        assert layer.nbytes == 4 * sum(parameter.numel() for parameter in layer.module.parameters())


def test_products_round_their_operands_only_where_asked(reference_model):
    """To bfloat16's 8 bits; not for small models, and not where the CPU has no AMX."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    exact, has_amx = a @ b, multiplies_in_bfloat16(torch.device("cpu"), 1024)
    assert not multiplies_in_bfloat16(torch.device("cpu"), describe_model(reference_model).hidden)
    assert not multiplies_in_bfloat16(torch.device("meta"), 1024)
    with bfloat16_products(False):
        assert torch.equal(a @ b, exact)
    with bfloat16_products(has_amx):
        error = float((a @ b - exact).norm() / exact.norm())
    assert 1e-4 < error < 1e-2 if has_amx else error == 0
    assert torch.equal(a @ b, exact)

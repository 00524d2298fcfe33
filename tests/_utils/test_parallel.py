"""Work over threads: results in order, errors, numbers of threads."""

import threading

import pytest
import torch

from compaware_kernels._utils.parallel import in_parallel


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("costs", [[1, 5, 2, 2, 3, 1], [100, 1, 1], [3], [], [0, 0, 0]])
def test_results_are_in_order_and_costly_items_get_all_threads(two_threads, costs):
    seen = in_parallel(lambda i: (i, costs[i], torch.get_num_threads()), range(len(costs)), costs.__getitem__, "work")
    assert [(i, cost) for i, cost, _ in seen] == list(enumerate(costs))
    assert [threads for *_, threads in seen] == [2 if 2 * cost > sum(costs) else 1 for cost in costs]
    assert torch.get_num_threads() == 2
    other = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert other == [2], "a new thread has the default of the process"


@pytest.mark.parametrize("alone", [False, True])
def test_the_first_error_is_raised(two_threads, alone):
    def work(i):
        if i == 1:
            raise RuntimeError("layer 1")
        return i

    with pytest.raises(RuntimeError, match="layer 1"):
        in_parallel(work, range(4), lambda i: 100 if alone and i == 1 else 1, "work")
    assert torch.get_num_threads() == 2


def test_one_thread_works_here():
    assert (
        in_parallel(lambda _: threading.current_thread(), range(3), lambda _: 1, "x") == [threading.main_thread()] * 3
    )

"""Jobs dealt to real processes: order, errors, and no process that waits for ever."""

import os
import time

import pytest

from moa.evaluation.processes import PeerError, Processes, join_processes
from tests.support.ranks import Died, run_ranks


def test_alone_map_is_a_loop_and_the_main_value_ones_own():
    with join_processes() as alone:
        assert alone.size == 1 and alone.is_main
        assert alone.map(str, [3, 1, 2]) == ["3", "1", "2"]
        assert alone.from_main(lambda: 7) == 7


def test_alone_an_error_is_the_jobs_own():
    with pytest.raises(ZeroDivisionError):
        Processes().map(lambda number: 1 / number, [1, 0])


def dealt_out():
    with join_processes() as group:
        done = group.map(lambda number: (number, group.rank), range(7))
        again = group.map(lambda number: number, range(1))
        return done, again, group.from_main(lambda: f"made by {group.rank}")


def test_results_come_together_in_order_on_the_main_process():
    main, *others = run_ranks(dealt_out, size=3)
    assert main == ([(n, n % 3) for n in range(7)], [0], "made by 0")
    assert others == [([], [], "made by 0")] * 2


def failing(bad: dict[int, Exception], done: list[int]):
    def work(number):
        time.sleep(0.01)
        if number in bad:
            raise bad[number]
        done.append(number)

    with join_processes() as group:
        try:
            group.map(work, range(4))
            group.map(work, range(1000))
        except Exception as error:
            error.args = (*error.args, max(done))
            raise


def test_the_first_jobs_error_is_raised_by_all_and_later_jobs_are_not_begun():
    bad = {5: ValueError("the first of the second call"), 6: ValueError("later")}
    for error in run_ranks(failing, bad, []):
        assert isinstance(error, ValueError)
        message, last = error.args
        assert message == "the first of the second call" and last < 500


def test_a_bug_keeps_its_traceback_and_the_others_name_its_process():
    main, other = run_ranks(failing, {5: ZeroDivisionError("boom")}, [])
    assert isinstance(other, ZeroDivisionError)
    assert isinstance(main, PeerError)
    assert main.args[0] == "process 1 failed: ZeroDivisionError: boom"


def failing_outside(rank: int):
    with join_processes() as group:
        group.map(str, range(3))
        if group.rank == rank:
            raise ValueError("cannot be written")
        group.from_main(lambda: 1)
        group.map(lambda number: time.sleep(0.01), range(1000))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_between_jobs_ends_the_others_at_their_next_step(rank):
    began = time.perf_counter()
    errors = run_ranks(failing_outside, rank)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "cannot be written")] * 2
    assert time.perf_counter() - began < 30


def dying():
    with join_processes() as group:
        group.map(lambda number: os._exit(1) if group.rank else None, range(4))


def test_a_process_that_dies_without_a_word_ends_the_others():
    main, other = run_ranks(dying)
    assert isinstance(other, Died) and isinstance(main, PeerError)
    assert str(main).startswith("process 0 lost the others")

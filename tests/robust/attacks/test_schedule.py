"""The order of runs, without a model or a tensor."""

from robust.attacks.schedule import Ended, Schedule


def test_images_are_scheduled_in_order_up_to_the_batch_size() -> None:
    schedule = Schedule(3, max_runs=2)
    assert schedule.start_runs(2) == [(0, 0), (1, 0)]
    assert schedule.start_runs(0) == []
    assert schedule.start_runs(5) == [(2, 0)]
    assert schedule.start_runs(5) == []  # all have a run going, and none may have another


def test_failed_run_is_followed_by_the_next() -> None:
    schedule = Schedule(1, max_runs=2)
    schedule.start_runs(1)
    assert schedule.end_run(0, 0, fooled=False) == Ended(finished=False, drop_later_runs=False)
    assert schedule.start_runs(1) == [(0, 1)]
    assert schedule.end_run(0, 1, fooled=False) == Ended(finished=True, drop_later_runs=False)
    assert schedule.start_runs(1) == []


def test_a_fooled_image_is_finished() -> None:
    schedule = Schedule(1, max_runs=9)
    schedule.start_runs(1)
    assert schedule.end_run(0, 0, fooled=True) == Ended(finished=True, drop_later_runs=False)
    assert schedule.start_runs(9) == []


def test_parallel_runs_go_to_the_image_with_the_fewest_runs() -> None:
    schedule = Schedule(2, max_runs=4, allow_parallel_runs=True)
    assert schedule.start_runs(3) == [(0, 0), (1, 0), (0, 1)]
    assert schedule.start_runs(2) == [(1, 1), (0, 2)]
    assert schedule.start_runs(9) == [(1, 2), (0, 3), (1, 3)]


def test_lowest_successful_run_wins() -> None:
    schedule = Schedule(1, max_runs=3, allow_parallel_runs=True)
    schedule.start_runs(3)
    # Run 1 succeeds while run 0 is going: run 2 is pointless, run 0 may still win.
    assert schedule.end_run(0, 1, fooled=True) == Ended(finished=False, drop_later_runs=True)
    assert schedule.end_run(0, 2, fooled=True) is None
    assert schedule.end_run(0, 0, fooled=False) == Ended(finished=True, drop_later_runs=False)
    assert schedule.start_runs(3) == []


def test_cancelled_image_gets_no_further_runs() -> None:
    schedule = Schedule(1, max_runs=3, allow_parallel_runs=True)
    schedule.start_runs(1)
    schedule.cancel(0)
    assert schedule.start_runs(2) == []
    assert schedule.end_run(0, 0, fooled=False) == Ended(finished=True, drop_later_runs=False)

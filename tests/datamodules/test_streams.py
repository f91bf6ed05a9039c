"""The arithmetic of a stream: tasks, labels, the replay buffer and the draw of supports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.streams import Stream, class_positions, draw_supports, labels_per_class


def make_stream(counts: list[int], classes_per_task: int, buffer_size: int) -> Stream:
    """Class `c` has the images `1000 c, 1000 c + 1, ...`."""
    return Stream([1000 * c + torch.arange(n) for c, n in enumerate(counts)], classes_per_task, buffer_size)


streams = st.tuples(
    st.lists(st.integers(1, 40), min_size=6, max_size=6), st.sampled_from([1, 2, 3]), st.integers(0, 150)
)


def test_classes_arrive_in_the_given_order():
    assert class_positions(6, 3).tolist() == [0, 1, 2, 3, 4, 5]
    order = [4, 0, 5, 2, 1, 3]
    positions = class_positions(6, 3, order)
    assert [positions[label].item() for label in order] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3), "num_tasks: 3 tasks do not divide 10 classes; accepted: \\[1, 2, 5, 10\\]"),
        ((10, 0), "num_tasks: 0"),
        ((4, 2, [0, 1, 1, 3]), "class_order: \\[0, 1, 1, 3\\] is not an order of the classes 0 .. 3"),
        ((4, 2, [0, 1, 2]), "class_order"),
    ],
)
def test_bad_divisions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_positions(*arguments)


def test_labels_by_number_or_by_fraction():
    assert labels_per_class([50, 60], 7, None) == [7, 7]
    assert labels_per_class([100, 250, 50], None, 0.01) == [1, 3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([50, 60], None, None), "exactly one"),
        (([50, 60], 5, 0.1), "exactly one"),
        (([50, 60], None, 1.5), "label_fraction: 1.5 is not in"),
        (([50, 600], None, 0.005), "label_fraction: 0.005 gives no label to class 0, which has 50 images; .*0.01"),
        (([50, 60], 0, None), "labels_per_class: 0 gives no label to class 0"),
        (([50, 60], 55, None), "55 labels asked, class 0 has 50"),
    ],
)
def test_bad_label_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        labels_per_class(*arguments)


@given(streams)
def test_the_buffer_is_small_balanced_and_only_shrinks(case):
    counts, classes_per_task, size = case
    stream = make_stream(*case)
    earlier: list[list[int]] = []
    for task in range(stream.num_tasks):
        seen = (task + 1) * classes_per_task
        kept = [indices.tolist() for indices in stream.buffer(task)]
        assert len(kept) == seen, "no class to come"
        assert sum(map(len, kept)) <= size
        for label, indices in enumerate(kept):
            assert indices == list(range(1000 * label, 1000 * label + len(indices))), "a prefix"
        for before, now in zip(earlier, kept, strict=False):
            assert len(now) <= len(before), "what was dropped cannot come back"
        if sum(counts[:seen]) <= size:
            assert list(map(len, kept)) == counts[:seen], "all are kept where they fit"
        else:
            rich = [len(indices) for indices, have in zip(kept, counts, strict=False) if len(indices) < have]
            assert max(rich, default=0) - min(rich, default=0) <= 1, "as equal as can be"
            assert rich == sorted(rich, reverse=True), "the remainder goes to the oldest"
        earlier = kept


@given(streams)
def test_the_pool_is_the_buffer_and_the_labels_of_the_task(case):
    classes_per_task, stream = case[1], make_stream(*case)
    for task in range(stream.num_tasks):
        pool, first = stream.pool(task), task * classes_per_task
        old = {label: indices.tolist() for label, indices in enumerate(stream.buffer(task - 1)) if len(indices)}
        new = {label: stream.labelled[label].tolist() for label in range(first, first + classes_per_task)}
        assert {label: indices.tolist() for label, indices in pool.items()} == old | new
        after = torch.cat([torch.cat(stream.buffer(task)), torch.empty(0, dtype=torch.long)])
        assert set(after.tolist()) <= set(torch.cat(list(pool.values())).tolist()), "only what is at hand can be kept"


@pytest.mark.parametrize(
    ("labels", "sizes"), [(40, [80, 160, 240, 320, 400]), (250, [500] + [1000] * 4), (1250, [2500] + [3000] * 4)]
)
def test_pools_of_the_official_cifar10_runs(labels, sizes):
    stream = make_stream([labels] * 10, 2, 500)
    assert [sum(map(len, stream.pool(task).values())) for task in range(5)] == sizes


def test_a_buffer_that_cannot_serve_the_supports_is_refused():
    make_stream([40] * 10, 2, 40).check_supports(5, replacement=False)
    make_stream([40] * 10, 2, 20).check_supports(5, replacement=True)
    with pytest.raises(
        ValueError, match="buffer of 20 images allows for 8 old classes; accepted: buffer_size of at le"
    ):
        make_stream([40] * 10, 2, 20).check_supports(5, replacement=False)
    with pytest.raises(ValueError, match="supports_per_class: 5 is more than the 3 labels"):
        make_stream([3] * 10, 2, 500).check_supports(5, replacement=False)
    with pytest.raises(ValueError, match="buffer_size: 7 images cannot hold one of each of the 8 classes"):
        make_stream([40] * 10, 2, 7).check_supports(5, replacement=True)
    make_stream([40] * 10, 2, 0).check_supports(5, replacement=True)


@given(st.integers(0, 100), st.integers(1, 12))
def test_supports_are_balanced_and_repeat_only_where_they_must(seed, per_class):
    pool = {0: torch.tensor([3, 5]), 4: 100 + torch.arange(30), 5: 200 + torch.arange(7)}
    chosen, y = draw_supports(pool, per_class, seed, "supports")
    assert y.tolist() == [0, 4, 5] * per_class
    for label, indices in pool.items():
        drawn = chosen[y == label].tolist()
        assert set(drawn) <= set(indices.tolist())
        times = [drawn.count(index) for index in indices.tolist()]
        assert max(times) - min(times) <= 1
    again = draw_supports(pool, per_class, seed, "supports")
    assert torch.equal(again[0], chosen)


def test_supports_are_drawn_uniformly():
    pool = {0: torch.arange(6)}
    drawn = torch.cat([draw_supports(pool, 2, seed, "supports")[0] for seed in range(900)])
    counts = torch.bincount(drawn, minlength=6)
    assert (counts - 300).abs().max() < 75  # five standard deviations

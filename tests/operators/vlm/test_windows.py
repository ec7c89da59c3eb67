import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.operators.operator import Sample, Sampling
from winnow.operators.vlm.windows import cut

PIXEL = np.zeros((1, 1, 3), np.uint8)


def samples(*seconds: float) -> list[Sample]:
    return [Sample(index, second, PIXEL) for index, second in enumerate(seconds)]


def sampled(duration_s: float, fps: float = 24.0, rate: float = 2.0) -> list[Sample]:
    """What the frame reader gives of a clip with even frame times."""
    frames = round(duration_s * fps)
    numbers = Sampling(rate, "rgb", minimum=4).indices(frames, fps)
    return [Sample(int(n), float(n) / fps, PIXEL) for n in numbers]


@pytest.mark.parametrize(
    ("duration_s", "counts"),
    [(0.2, [4]), (5, [10]), (121 / 24, [10]), (10, [20]), (10.1, [20]), (12, [12, 12]),
     (25, [17, 16, 17]), (60, [20] * 6)],
)  # fmt: skip
def test_a_clip_is_cut_into_equal_windows(duration_s, counts):
    windows = cut(sampled(duration_s), duration_s, 10.0)
    assert [len(window.samples) for window in windows] == counts
    lengths = [window.end_s - window.start_s for window in windows]
    assert lengths == pytest.approx([duration_s / len(counts)] * len(counts))
    assert [window.number for window in windows] == list(range(len(counts)))


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=60).map(sorted),
    st.floats(0, 100), st.floats(0.5, 30), st.integers(1, 30),
)  # fmt: skip
def test_every_frame_lies_in_one_window_and_in_its_time(seconds, duration_s, longest_s, most):
    given_samples = samples(*seconds)
    windows = cut(given_samples, duration_s, longest_s)
    assert [s for window in windows for s in window.samples] == given_samples
    for window in windows:
        assert window.samples
        assert window.end_s - window.start_s <= longest_s * 1.021
        assert all(window.start_s <= s.seconds <= window.end_s for s in window.samples)
    for window, thin in zip(windows, cut(given_samples, duration_s, longest_s, most), strict=True):
        assert len(thin.samples) == min(most, len(window.samples))
        assert [s for s in window.samples if s in thin.samples] == list(thin.samples)


def test_a_frame_on_an_edge_belongs_to_the_later_window():
    first, second = cut(samples(0, 5, 10), 10, 5)
    assert [s.seconds for s in first.samples] == [0]
    assert [s.seconds for s in second.samples] == [5, 10]


def test_a_window_without_frames_is_missing_and_the_others_keep_their_numbers():
    windows = cut(samples(0, 1, 29), 30, 10)
    assert [(w.number, len(w.samples)) for w in windows] == [(0, 2), (2, 1)]


def test_frames_later_than_the_clip_says_are_not_lost():
    windows = cut(samples(1, 2, 14), 5, 10)
    assert [(w.start_s, w.end_s, len(w.samples)) for w in windows] == [(0, 7, 2), (7, 14, 1)]


def test_a_crowded_window_is_thinned_evenly():
    (window,) = cut(samples(*np.arange(20) / 4), 5, 5, most=4)
    assert [s.index for s in window.samples] == [2, 7, 12, 17]


def test_no_frames_no_windows():
    assert cut([], 10, 5) == []

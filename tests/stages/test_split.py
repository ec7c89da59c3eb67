from itertools import pairwise

import numpy as np
import pytest

from winnow.operators.frames import Span
from winnow.stages.split import divide


def test_a_shot_within_the_limit_is_left_whole():
    seconds = np.arange(93) / 16
    assert divide(Span(0, 93), seconds, 93 / 16, 60.0) == [Span(0, 93)]


@pytest.mark.parametrize("length", [61.0, 119.9, 120.0, 300.5])
def test_a_long_shot_is_divided_evenly_without_losing_a_frame(length):
    fps = 24
    seconds = np.arange(int(length * fps)) / fps
    spans = divide(Span(5, len(seconds)), seconds, len(seconds) / fps, 60.0)
    assert spans[0].start == 5
    assert spans[-1].end == len(seconds)
    assert all(a.end == b.start for a, b in pairwise(spans))
    assert max(len(s) for s in spans) <= 60 * fps
    assert max(len(s) for s in spans) - min(len(s) for s in spans) <= 1


def test_an_uneven_frame_rate_is_divided_by_time():
    # 10 s at 10 fps, then 10 s at 50 fps: equal times are unequal frame counts.
    seconds = np.concatenate([np.arange(100) / 10, 10 + np.arange(500) / 50])
    spans = divide(Span(0, 600), seconds, 20.0, 10.0)
    assert spans == [Span(0, 100), Span(100, 600)]

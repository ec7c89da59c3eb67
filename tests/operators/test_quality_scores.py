import math

import numpy as np
import pytest

from tests.operators.measuring import texture
from winnow.operators.errors import MeasureError
from winnow.operators.quality_scores import clip_seed, dover_fusion, fragments, frame_numbers


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_fusion_is_the_published_one_and_goes_by_name():
    # The mean of each raw output of the authors' test set is the middle of each scale.
    assert dover_fusion(technical=0.1107, aesthetic=-0.08285) == pytest.approx((0.5, 0.5, 0.5))
    scores = dover_fusion(technical=0.1107 + 0.07355, aesthetic=-0.08285 - 0.03774)
    assert scores.technical == pytest.approx(sigmoid(1))
    assert scores.aesthetic == pytest.approx(sigmoid(-1))
    assert scores.overall == pytest.approx(sigmoid(0.6104 - 0.3896))
    raw = {"technical": 0.02, "aesthetic": -0.1}
    turned = dict(reversed(raw.items()))
    assert dover_fusion(**raw) == dover_fusion(**turned)
    with pytest.raises(TypeError):
        dover_fusion(0.02, -0.1)


def test_a_raw_output_that_is_no_number_is_no_score():
    with pytest.raises(MeasureError, match="nan"):
        dover_fusion(technical=float("nan"), aesthetic=0.0)
    assert dover_fusion(technical=1e9, aesthetic=-1e9).technical == 1.0


def test_a_seed_belongs_to_the_clip_and_the_purpose():
    # A literal: the seed must not change between versions, or every score would.
    assert clip_seed("a", "dover") == 5005933998238596325
    assert len({clip_seed(clip, name) for clip in "abc" for name in ("dover", "vtss")}) == 6


@pytest.mark.parametrize(("frames", "clips"), [(240, 3), (200, 4), (63, 3), (64, 1)])
def test_rows_of_frames_lie_in_equal_parts_of_the_clip(frames, clips):
    for seed in range(50):
        numbers = frame_numbers(frames, seed, clips=clips)
        assert numbers.shape == (clips, 32)
        assert numbers.min() >= 0
        assert numbers.max() < frames
        assert (np.diff(numbers, axis=1) == 2).all()
        edges = np.linspace(0, frames - 62, clips + 1)
        assert (numbers[:, 0] >= np.floor(edges[:-1])).all()
        assert (numbers[:, 0] <= edges[1:]).all()


def test_a_short_clip_is_repeated():
    assert set(frame_numbers(5, 1, length=8, interval=1, clips=2)[0]) == set(range(5))
    assert (frame_numbers(1, 1) == 0).all()
    with pytest.raises(ValueError, match="no frames"):
        frame_numbers(0, 1)


def where(height: int, width: int, count: int = 1) -> np.ndarray:
    """Frames in which each pixel tells its place: red the row, green the column, blue the frame."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.arange(height)[:, None] % 256
    frames[..., 1] = np.arange(width) % 256
    frames[..., 2] = np.arange(count)[:, None, None]
    return frames


def patches(picture: np.ndarray, grid: int = 7, size: int = 32) -> np.ndarray:
    """(grid, grid, size, size, 3)"""
    return picture.reshape(grid, size, grid, size, 3).swapaxes(1, 2)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (240, 250), (230, 256), (256, 225)])
def test_each_patch_is_native_pixels_of_its_own_cell(height, width):
    for seed in range(20):
        found = patches(fragments(where(height, width), seed)[0])
        for row in range(7):
            for column in range(7):
                patch = found[row, column]
                top, left = int(patch[0, 0, 0]), int(patch[0, 0, 1])
                assert (patch[..., 0] == np.arange(top, top + 32)[:, None]).all()
                assert (patch[..., 1] == np.arange(left, left + 32)).all()
                assert height * row // 7 <= top
                assert top + 32 <= height * (row + 1) // 7
                assert width * column // 7 <= left
                assert left + 32 <= width * (column + 1) // 7


def test_patches_reach_every_place_of_their_cells():
    tops = {int(fragments(where(256, 256), seed)[0, 0, 0, 0]) for seed in range(200)}
    assert tops == set(range(256 // 7 - 32 + 1))


def test_places_stay_for_aligned_frames_and_then_change():
    found = fragments(where(250, 250, 12), 3, aligned=8)
    assert found.shape == (12, 224, 224, 3)
    assert [int(picture[0, 0, 2]) for picture in found] == list(range(12))
    assert (found[1:8, ..., :2] == found[0, ..., :2]).all()
    assert (found[9:, ..., :2] == found[8, ..., :2]).all()
    assert (found[8, ..., :2] != found[0, ..., :2]).any()


def test_the_same_seed_gives_the_same_fragments_and_another_others():
    frames = where(250, 250, 4)
    assert (fragments(frames, 5) == fragments(list(frames), 5)).all()
    assert (fragments(frames, 5) != fragments(frames, 6)).any()


def test_small_frames_are_enlarged_as_a_whole():
    small = np.repeat(texture(1, 90, 160)[..., None], 3, axis=2)
    found = fragments([small], 1)
    assert found.shape == (1, 224, 224, 3)
    assert abs(float(found.mean()) - float(small.mean())) < 8


def test_frames_that_cannot_be_cut_are_said():
    with pytest.raises(MeasureError, match="no frames"):
        fragments([], 1)
    with pytest.raises(MeasureError, match="different sizes"):
        fragments([where(224, 224)[0], where(230, 224)[0]], 1)

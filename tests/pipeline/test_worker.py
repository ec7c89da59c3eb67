"""The end of a source's way: verdicts, and what becomes of the clips that it replaces."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from winnow.operators.frames import Span
from winnow.pipeline.policy import Policy
from winnow.pipeline.worker import Worker
from winnow.stages.records import Clip, Demotion, Source
from winnow.stages.stage import Stage


@dataclass
class Encoding(Stage):
    """The last stage, which may fail on the clip."""

    name: ClassVar[str] = "encoding"
    failure: str | None
    label: str = "encoding"

    def process(self, source: Source) -> None:
        source.clips[0].failure = self.failure


@pytest.mark.parametrize(("failure", "replaced"), [(None, ["old"]), ("transcode: no space", [])])
def test_a_better_copy_that_fails_later_replaces_nothing(failure, replaced):
    source = Source(0, "v", "v", 1, 0.0, None, "attempt")
    source.clips = [Clip("new", Span(0, 9), 0.0, 1.0)]
    source.demotions = [Demotion("old", "new", 0.99)]
    worker = Worker((Encoding(failure),), Policy(name="none", rules=()), (), decides=True)
    done = worker(source)
    assert done.clips[0].decision.verdict == ("error" if failure else "keep")
    assert [demotion.clip_id for demotion in done.demotions] == replaced

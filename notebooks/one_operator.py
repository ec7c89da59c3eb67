# %% [markdown]
# # One operator, one video, nothing else set up
# An operator needs no lake, no Ray and no configuration: only a local file. Open this as a notebook with
# jupytext, or run it as a script: `.venv/bin/python notebooks/one_operator.py VIDEO`.

# %%
import sys
from pathlib import Path

from winnow.operators.frames import Span, read_spans
from winnow.operators.media import probe
from winnow.operators.motion import Motion
from winnow.operators.operator import ClipView

# %%
video = Path(sys.argv[1])
info = probe(video)
print(f"{info.codec}, {info.width}x{info.height}, {info.frames} frames at {info.frame_rate} fps")

# %% [markdown]
# The operator says what it wants to be shown; the frame reader decodes once and shows it, chunk by chunk.

# %%
operator = Motion()
operator.setup()
clip = ClipView(video.name, info.frames, info.fps, info.width, info.height, info.codec)
measurement = operator.start(clip)
whole = Span(0, info.frames)
read_spans(video, [whole], info.fps, operator.needs, lambda _, chunk: measurement.update(chunk))

# %%
for name, value in measurement.columns().items():
    (declared,) = (column for column in operator.columns if column.name == name)
    print(f"{name:16} {value!s:24} {declared.meaning} [{declared.unit}]")

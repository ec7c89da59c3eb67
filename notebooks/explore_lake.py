# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A lake, and three questions
#
# 1. **What is in it?** Counts by verdict, generator and content type; how the scores are distributed.
# 2. **Why was this rejected?** What each rule rejects, the ledger, and one clip looked at closely.
# 3. **What if the threshold moved?** How many clips a rule would keep at any other limit.
#
# Nothing here opens a video or writes to the lake. `WINNOW_LAKE` names the lake, by default that of
# `winnow demo`; an object store is reached as usual, with the credentials of the environment.

# %%
import io
import os
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from PIL import Image

from winnow.pipeline.lake import TABLES, Lake
from winnow.pipeline.ledger import STATUSES, VERDICTS, read_ledger
from winnow.pipeline.policy import Policy
from winnow.pipeline.refilter import refilter
from winnow.pipeline.report_rules import comparisons
from winnow.pipeline.views import connect

Clip = dict[str, Any]
COLORS = {"keep": "#2b9a8f", "duplicate": "#8c83cf", "reject": "#dc7a52", "error": "#9aa1a7"}
plt.rcParams.update({
    "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "text.parse_math": False,  # a prompt or a file name may hold a $
})  # fmt: skip
pd.options.display.max_colwidth = 90
pd.options.display.float_format = "{:,.4g}".format

# %% [markdown]
# `connect` gives a DuckDB connection with the lake's views: what is committed, the latest attempt at
# each source. It can read these tables and nothing else on the machine. `winnow sql --describe`
# explains every column.

# %%
uri = os.environ.get("WINNOW_LAKE") or "demo/lake"
if "://" not in uri and not Path(uri).exists():  # Jupyter works in the notebook's own folder
    uri = str(Path("..") / uri)
lake = Lake(uri)
db = connect(lake)
print(f"lake {lake.uri}")
db.execute("""
    SELECT run_id, strftime(started_at, '%Y-%m-%d %H:%M') AS started, engine, policy, input, sources_in, wall_s
    FROM runs ORDER BY started_at""").df()

# %% [markdown]
# The verdicts looked at are those of one policy: here as the latest run had it. For another one that
# decided over this lake, write `policy = load_policy("strict.yaml")` (from `winnow.pipeline.policy`).

# %%
run_id, sources_in, rules = db.execute(
    "SELECT run_id, sources_in, policy_rules FROM runs ORDER BY started_at DESC LIMIT 1"
).fetchone()
policy = Policy.model_validate_json(rules)

# A table, not a view: every cell below asks it. Pictures are fetched for the clips that are shown.
kinds = {name: kind for name, kind, *_ in db.execute("DESCRIBE clips").fetchall()}
columns = ", ".join(f'c."{name}"' for name, kind in kinds.items() if kind != "BLOB")
db.execute(f"""
    CREATE OR REPLACE TEMP TABLE decided AS
    SELECT {columns}, s.uri, s.prompt, s.generator, v.verdict, v.reasons, v.duplicate_of, v.similarity
    FROM clips c JOIN sources s USING (attempt_id)
    LEFT JOIN (FROM verdicts WHERE policy = '{policy.name}') v ON v.clip_id = c.clip_id
""")
clips = db.execute("SELECT count(*) FROM decided").fetchone()[0]
present = {name: kind for name, kind, *_ in db.execute("DESCRIBE decided").fetchall()}
print(f"{clips:,} clips, decided by the policy {policy.name!r}: {policy.description}")

# %% [markdown]
# ## 1. What is in it?


# %%
def stacked(ax: Axes, table: pd.DataFrame, title: str) -> None:
    """Horizontal bars of clips by verdict; `table` has a row for each bar, its name as the index."""
    left = np.zeros(len(table))
    for verdict in (v for v in VERDICTS if v in table):
        ax.barh(table.index, table[verdict], left=left, color=COLORS[verdict], label=verdict)
        left += table[verdict].to_numpy()
    for name, total in zip(table.index, left, strict=True):
        ax.text(total, name, f" {total:,.0f}", va="center")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_title(title, loc="left", weight="bold")
    ax.set_xlabel("clips")


def by_verdict(group: str, most: int = 12) -> pd.DataFrame:
    """Clips by verdict for the largest groups of an SQL expression, the largest first."""
    found = db.execute(f"""
        SELECT coalesce(CAST({group} AS VARCHAR), 'not known') AS name, verdict, count(*) AS clips
        FROM decided WHERE verdict IS NOT NULL GROUP BY ALL""").df()
    table = found.pivot_table(index="name", columns="verdict", values="clips", fill_value=0)
    return table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index[:most]]


# Without a content type operator nothing is known of it: see configs/gpu.yaml.
groups = {
    "all clips": "'all'",
    "by generator": "generator",
    "by content type": "content_type_label" if "content_type_label" in present else "NULL",
}
tables = {title: by_verdict(group) for title, group in groups.items()}
fig, axes = plt.subplots(
    len(tables), 1, figsize=(9, 2.2 + 0.32 * sum(map(len, tables.values()))), sharex=True,
    gridspec_kw={"height_ratios": [1 + len(t) for t in tables.values()]}, layout="constrained",
)  # fmt: skip
for ax, (title, table) in zip(axes, tables.items(), strict=True):
    stacked(ax, table, title)
    ax.label_outer()
handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[verdict]) for verdict in VERDICTS]
fig.legend(handles, VERDICTS, loc="outside upper right", ncols=4, frameon=False)
display(fig)
plt.close(fig)

# %% [markdown]
# The scores by which a rule judges, with the rule's limit: the shaded side is rejected. Colours as above.
# A clip that an early stage rejects is measured no further: not every score is there for every clip. Of
# a large lake 50,000 clips are drawn.

# %%
NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE")
bookkeeping = {column.name for column in TABLES["clips"]}
docs = db.execute("FROM column_docs WHERE table_name = 'clips'").df().set_index("column_name")
scores = [c for c in docs.index if present.get(c) in NUMBERS and c not in bookkeeping]

quoted = ", ".join(f'"{c}"' for c in scores)
drawn = db.execute(f"""
    SELECT clip_id, verdict, {quoted} FROM decided
    USING SAMPLE reservoir(50000 ROWS) REPEATABLE (1)""").df()
limits = {}
for rule in policy.rules:
    for told in comparisons(rule.reject):
        limits.setdefault(told.column.lower(), []).append((rule, told))
judged = [c for c in scores if c.lower() in limits]


def histogram(ax: Axes, column: str, clip: Clip | None = None) -> None:
    """Clips by score and verdict, with the limits of rules; `clip` marks one clip's value."""
    values = drawn[column].astype(float)
    values = values[np.isfinite(values)]
    if values.empty:
        ax.set_axis_off()
        return
    low, high = values.quantile([0.005, 0.995])
    span = (high - low) or abs(high) or 1.0
    # A limit far from every score would squeeze them into one bar.
    near = [
        t.threshold
        for _, t in limits.get(column.lower(), ())
        if low - span < t.threshold < high + span
    ]
    low, high = min([low, *near]) - 0.03 * span, max([high, *near]) + 0.03 * span
    ax.hist(
        [values[drawn.verdict == v].clip(low, high) for v in VERDICTS], bins=np.linspace(low, high, 33),
        stacked=True, histtype="stepfilled", color=[COLORS[v] for v in VERDICTS],
    )  # fmt: skip
    for _, told in limits.get(column.lower(), ()):
        if told.threshold in near:
            edge = low if told.side == "below" else high
            ax.axvspan(*sorted((told.threshold, edge)), color=COLORS["reject"], alpha=0.12, lw=0)
            ax.axvline(told.threshold, color="#1d2226", lw=1, ls="-" if told.alone else ":")
    if clip is not None and pd.notna(clip[column]):
        place = np.clip(clip[column], low, high)
        ax.plot(place, 0, "v", color="#b3261e", ms=11, clip_on=False, zorder=5)
    told = ", ".join(f"{rule.name} {t.words}" for rule, t in limits.get(column.lower(), ()))
    ax.set_title(f"{column}\n{told}", loc="left", fontsize=8)
    unit = docs.unit[column]
    ax.set_xlabel(unit if isinstance(unit, str) else "", fontsize=7)
    ax.set_xlim(low, high)
    ax.tick_params(labelsize=7)


def histograms(columns: list[str], clip: Clip | None = None, across: int = 3) -> None:
    down = -(-len(columns) // across)
    fig, axes = plt.subplots(
        down, across, figsize=(11, 1.9 * down), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(columns) :]:
        ax.set_axis_off()
    for ax, column in zip(axes.flat, columns, strict=False):
        histogram(ax, column, clip)
    display(fig)
    plt.close(fig)


if judged:
    histograms(judged)

# %% [markdown]
# All scores in figures.

# %%
figures = drawn[scores].astype(float).describe(percentiles=[0.05, 0.5, 0.95]).T
figures = figures.drop(columns=["mean", "std"]).join(docs[["unit", "direction", "meaning"]])
figures["count"] = figures["count"].map("{:,.0f}".format)
figures.fillna("")

# %% [markdown]
# ## 2. Why was this rejected?
# A verdict names every rule that rejects the clip, not only the first. What a rule rejects alone is
# what would come back if the rule were dropped, before near-duplicates are looked for.

# %%
counts = db.execute("""
    SELECT reason, count(*) AS clips, count(*) FILTER (len(reasons) = 1) AS alone
    FROM (SELECT reasons, unnest(reasons) AS reason FROM decided WHERE verdict = 'reject')
    GROUP BY 1""").df().set_index("reason")  # fmt: skip
told = pd.DataFrame(
    [(r.name, r.predicate, r.reason) for r in policy.rules],
    columns=["rule", "rejects where", "reason"],
).set_index("rule")
reasons = (
    counts.join(told, how="outer").fillna({"clips": 0, "alone": 0}).fillna("").rename_axis("rule")
)
reasons = reasons.astype({"clips": int, "alone": int}).sort_values(
    "clips", ascending=False, kind="stable"
)
display(reasons)

shown = reasons[reasons.clips > 0]
if len(shown):
    fig, ax = plt.subplots(figsize=(9, 0.6 + 0.3 * len(shown)), layout="constrained")
    ax.barh(shown.index, shown.alone, color=COLORS["reject"], label="by this rule alone")
    ax.barh(
        shown.index, shown.clips - shown.alone, left=shown.alone, color="#f0c5b0", label="by others too"
    )  # fmt: skip
    ax.invert_yaxis()
    ax.set_xlabel("rejected clips")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, loc="lower right")
    display(fig)
    plt.close(fig)

# %% [markdown]
# The ledger of the latest run: what went in is accounted for, and nothing twice. Then the whole lake,
# and the files of which there are no clips at all.

# %%
# Clips that a refilter keeps and no run has encoded yet have no media: nothing is missing then.
ledger = read_ledger(db, run_id, policy.name, sources_in, expects_media=False)
print(f"run {run_id}")
for line in ledger.lines():
    print(f"  {line}")
print(
    "  it balances" if ledger.balanced else f"  IT DOES NOT BALANCE: {'; '.join(ledger.problems())}"
)

statuses = dict(db.execute("SELECT status, count(*) FROM sources GROUP BY 1").fetchall())
verdicts = dict(
    db.execute("SELECT coalesce(verdict, 'undecided'), count(*) FROM decided GROUP BY 1").fetchall()
)
print("lake")
print(
    f"  sources {sum(statuses.values())} = "
    + " + ".join(f"{statuses.get(s, 0)} {s}" for s in STATUSES)
)
print(f"  clips {clips} = " + " + ".join(f"{verdicts.get(v, 0)} {v}" for v in VERDICTS), end="")
print(f" + {verdicts['undecided']} undecided" if "undecided" in verdicts else "")
db.execute("""
    SELECT status, error_kind, count(*) AS files, any_value(parse_filename(uri)) AS "for example",
           any_value(error) AS error
    FROM sources WHERE status IN ('failed', 'incomplete') GROUP BY ALL ORDER BY files DESC, error_kind
""").df().fillna("")

# %% [markdown]
# One clip closely: the one that most rules reject. For another, write its id here.

# %%
CLIP = ""
found = db.execute(
    """SELECT * FROM decided WHERE clip_id = $clip OR $clip = ''
    ORDER BY verdict = 'reject' DESC NULLS LAST, len(reasons) DESC NULLS LAST, clip_id LIMIT 1""",
    {"clip": CLIP},
)
names, row = [d[0] for d in found.description], found.fetchone()
clip = None if row is None else dict(zip(names, row, strict=True))


def strip(ax: Axes, clip_id: str, title: str) -> None:
    """Show a clip's thumbnail: some of its frames, side by side."""
    picture = "thumbnail_jpeg" if "thumbnail_jpeg" in kinds else "NULL"
    (jpeg,) = db.execute(f"SELECT {picture} FROM clips WHERE clip_id = ?", [clip_id]).fetchone()
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=8)
    if jpeg:
        ax.imshow(Image.open(io.BytesIO(jpeg)))
    else:
        ax.text(0, 0.5, "no thumbnail: the clip was rejected before one was made")


if clip is None:
    print("no such clip")
else:
    print(f"clip    {clip['clip_id']}")
    print(f"file    {clip['uri']}, {clip['start_s']:g} to {clip['end_s']:g} s")
    print(f"prompt  {clip['prompt'] or '–'}")
    print(f"verdict {clip['verdict']}: {', '.join(clip['reasons'] or ())}")
    fig, ax = plt.subplots(figsize=(10, 1.6), layout="constrained")
    strip(ax, clip["clip_id"], "")
    display(fig)
    plt.close(fig)

# %% [markdown]
# Its scores against the limits. The red mark is the clip among all others, in the scores that a rule
# rejects it by; then every score that it has. A limit in brackets holds only with another condition.

# %%
SIGNS = {("below", False): np.less, ("below", True): np.less_equal,
         ("above", False): np.greater, ("above", True): np.greater_equal}  # fmt: skip


def against_limits(clip: Clip) -> pd.DataFrame:
    """A row for each score of a clip: its value, the limits, and which rules name it as a reason."""
    rows = []
    for column in (c for c in scores if clip[c] is not None):
        value, marks = clip[column], limits.get(column.lower(), [])
        beyond = [r.name for r, t in marks if SIGNS[t.side, t.inclusive](value, t.threshold)]
        rows.append({
            "score": column, "value": value, "unit": docs.unit[column],
            "rejected where": ", ".join(t.words if t.alone else f"({t.words})" for _, t in marks),
            "reason": ", ".join(dict.fromkeys(n for n in beyond if n in (clip["reasons"] or ()))),
            "rule": bool(marks), "meaning": docs.meaning[column],
        })  # fmt: skip
    table = pd.DataFrame(rows).set_index("score")
    order = (table.reason == "").astype(int) * 2 + (~table.rule).astype(int)
    return (
        table.assign(order=order)
        .sort_values("order", kind="stable")
        .drop(columns=["order", "rule"])
    )


if clip is not None:
    table = against_limits(clip)
    if (table.reason != "").any():
        histograms(list(table.index[table.reason != ""]), clip)
    display(table.fillna(""))

# %% [markdown]
# ## 3. What if the threshold moved?
# A rule that compares one score with one number can be moved. Which clips pass every rule is then known
# from the stored scores and reasons at once, for any limit. How many are *kept* also depends on
# near-duplicates: a clip that comes back may displace another. `refilter(..., dry_run=True)` decides
# that again, exactly as `winnow refilter` would, and writes nothing.

# %%
ONE_COMPARISON = re.compile(r"\s*\w+\s*[<>]=?\s*[-+]?[\d.]+([eE][-+]?\d+)?\s*")
movable = {}
for rule in policy.rules:
    if rule.when is None and ONE_COMPARISON.fullmatch(rule.reject):
        (told,) = comparisons(rule.reject)
        if told.column.lower() in (score.lower() for score in scores):
            movable[rule.name] = told
RULE = next((name for name in ("unaesthetic", "low_motion", *movable) if name in movable), None)
print(f"moved here: {RULE}; these could be: {', '.join(movable)}")


# %%
def predicate(rule: str, threshold: float) -> str:
    """A rule's predicate with its limit elsewhere."""
    told = movable[rule]
    sign = {"below": "<", "above": ">"}[told.side] + "=" * told.inclusive
    return f'"{told.column}" {sign} {float(threshold)!r}'


def moved(rule: str, threshold: float) -> Policy:
    """The policy with one rule's limit elsewhere."""
    reject = predicate(rule, threshold)
    return policy.model_copy(update={
        "rules": tuple(r.model_copy(update={"reject": reject}) if r.name == rule else r for r in policy.rules)
    })  # fmt: skip


def exact(rule: str, threshold: float) -> dict[str, float]:
    """What `winnow refilter` would decide with that limit."""
    counts = refilter(lake, moved(rule, threshold), dry_run=True).counts
    return {"threshold": float(threshold)} | {v: counts.get(v, 0) for v in VERDICTS}


if RULE is not None:
    told = movable[RULE]
    # The clips that no other rule rejects: their fate hangs on this limit.
    hanging = db.execute(f"""
        SELECT CAST("{told.column}" AS DOUBLE) AS score, verdict = 'duplicate' AS double FROM decided
        WHERE verdict IN ('keep', 'duplicate') OR (verdict = 'reject' AND reasons = ['{RULE}'])
    """).df()  # fmt: skip
    passing = [0.1, 0.25] if told.side == "below" else [0.9, 0.75]
    points = [told.threshold, *hanging.score.quantile(passing).dropna()]
    answers = pd.DataFrame([exact(RULE, point) for point in points]).assign(
        limit=["as it is", "rejects 10 % of what hangs on it", "rejects 25 %"][: len(points)]
    )
    answers["kept"] = (answers.keep / clips).map("{:.1%}".format) if clips else ""
    display(answers.set_index("limit"))
    if answers.keep[0] != verdicts.get("keep", 0):
        print(
            "the stored verdicts are of other rules or fewer clips: `winnow refilter` brings them up to date"
        )

# %% [markdown]
# The dots are those exact answers. The line of what is kept leaves today's duplicates where they are;
# where it parts from a dot, near-duplicates have changed places.


# %%
def passing_share(scores: pd.Series, rule: str, limits: np.ndarray) -> np.ndarray:
    """Of all clips the share whose score a rule lets pass, by its limit."""
    told = movable[rule]
    side = "right" if (told.side == "below") == told.inclusive else "left"
    smaller = np.searchsorted(np.sort(scores.to_numpy()), limits, side)
    return (len(scores) - smaller if told.side == "below" else smaller) / clips


if RULE is not None and len(hanging):
    ends = [*hanging.score.quantile([0, 0.9] if told.side == "below" else [0.1, 1]), *points]
    grid = np.unique([*np.linspace(min(ends), max(ends), 300), *points])
    everyone, single = hanging.score, hanging.score[~hanging.double]
    fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    ax.plot(
        grid,
        passing_share(everyone, RULE, grid),
        color=COLORS["duplicate"],
        lw=1.2,
        label="passes every rule",
    )
    ax.plot(
        grid, passing_share(single, RULE, grid), color=COLORS["keep"], lw=2,
        label="kept, today's duplicates apart",
    )  # fmt: skip
    ax.plot(
        answers.threshold, answers.keep / clips, "o", color="#1d2226", label="kept, decided anew"
    )
    ax.axvline(told.threshold, color="#1d2226", lw=0.8, ls=":")
    ax.annotate(
        "the limit now", (told.threshold, 0.02), (4, 0), textcoords="offset points", fontsize=8
    )
    ax.set_ylim(0, None)
    ax.yaxis.set_major_formatter("{x:.0%}")
    unit = docs.unit[told.column]
    ax.set_xlabel(
        f"{RULE}: reject where {told.column} is {told.side} … {unit if isinstance(unit, str) else ''}"
    )
    ax.set_ylabel(f"share of all {clips:,} clips")
    ax.legend(frameon=False, loc="best")
    display(fig)
    plt.close(fig)

# %% [markdown]
# A number is easily moved; look at what it would cost. These are kept now and the last dot's limit would
# reject them, the nearest to the limit first.

# %%
if RULE is not None and len(points) == 3:
    lost = db.execute(
        f"""SELECT "{told.column}", parse_filename(uri), clip_id FROM decided
        WHERE verdict = 'keep' AND {predicate(RULE, points[-1])}
        ORDER BY abs("{told.column}" - ?), clip_id LIMIT 4""",
        [points[-1]],
    ).fetchall()
    if lost:
        fig, axes = plt.subplots(
            len(lost), 1, figsize=(9, 1.5 * len(lost)), layout="constrained", squeeze=False
        )
        for ax, (score, name, clip_id) in zip(axes.flat, lost, strict=True):
            strip(ax, clip_id, f"{told.column} {score:.4g}   {name}")
        display(fig)
        plt.close(fig)

# %% [markdown]
# To keep a limit, write it into a policy file that `extends` this one, under another name, and decide:
# `winnow refilter --lake LAKE --policy FILE`. The verdicts of this policy stay beside the new ones.

"""The dataset of a policy from media that are there: rows for clips that another policy had encoded.

A clip's media depend on the clip, not on the policy that kept it. So a policy that keeps a clip which
another one kept before needs a row in `dataset`, and no second file.
"""

from __future__ import annotations

import pyarrow as pa
from tenacity import RetryError

from winnow.operators.errors import LakeError
from winnow.pipeline.decide import open_lake
from winnow.pipeline.lake import Lake


def share_media(lake: Lake, policy: str, kept: pa.Table) -> int:
    """Append dataset rows of a policy for those of its kept clips that have media of another policy.

    `kept` has columns clip_id and attempt_id, of the attempts that the views show. Clips that are in
    the policy's dataset are left alone. The rows are those of the other policy, all their columns.
    Returns how many were appended.
    """
    if not kept.num_rows:
        return 0
    with open_lake(lake) as connection:
        connection.register("_kept", kept)
        # A clip with rows of several policies has the same file in each: one of them is taken.
        connection.execute(
            """CREATE TEMP TABLE _shared AS
            SELECT k.clip_id, min(k.attempt_id) AS own, min(d.policy) AS other_policy,
                   arg_min(d.attempt_id, d.policy) AS other_attempt
            FROM _kept k JOIN raw_dataset d USING (clip_id)
            WHERE d.policy <> $policy
                AND d.attempt_id IN (SELECT attempt_id FROM raw_sources)
                AND k.clip_id NOT IN (
                    SELECT clip_id FROM raw_dataset WHERE policy = $policy
                    AND attempt_id IN (SELECT attempt_id FROM _kept))
            GROUP BY k.clip_id""",
            {"policy": policy},
        )
        rows = connection.sql(
            """SELECT d.* REPLACE ($policy AS policy, s.own AS attempt_id)
            FROM raw_dataset d JOIN _shared s ON d.clip_id = s.clip_id
                AND d.policy = s.other_policy AND d.attempt_id = s.other_attempt""",
            params={"policy": policy},
        ).to_arrow_table()
    if rows.num_rows:
        try:
            lake.append_table("dataset", rows)
        except RetryError as error:
            raise LakeError(
                f"cannot write the dataset to {lake.uri}: {error.last_attempt.exception()}. The "
                "verdicts are there: run again when the storage answers"
            ) from error
    return int(rows.num_rows)

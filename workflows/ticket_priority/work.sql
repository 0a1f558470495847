-- Who worked on what, from when to when: the roster as it came to be, not as it was planned.
-- The help desk names an assignee while somebody works on a ticket and no longer. Where a name stays on a ticket that waits in a pile,
-- these are no hours of work, and regression.replay.work must be left out: then there is no verdict by replay.
WITH steps AS (
    SELECT *, row_number() OVER (PARTITION BY ticket_id ORDER BY event_at, updates, known_at, source_file_id, source_row) AS n
    FROM events
),
-- an update that changes neither state nor hands (a priority, a due time that passed) ends no stretch of work
changes AS (
    SELECT *
    FROM steps
    QUALIFY coalesce(
        (state, team, assignee) IS DISTINCT FROM lag((state, team, assignee)) OVER (PARTITION BY ticket_id ORDER BY n), true
    )
),
stretches AS (
    SELECT *, lead(event_at) OVER (PARTITION BY ticket_id ORDER BY n) AS laid_at FROM changes
)
SELECT ticket_id AS entity_id, coalesce(team, '(none)') AS unit, assignee AS worker, event_at AS begun_at, laid_at
FROM stretches
WHERE state = 'open' AND assignee IS NOT NULL
ORDER BY entity_id, begun_at

-- What is known of how a ticket went, each time that more of it became known; the latest row of a ticket counts.
-- missed: as judged by then, NULL until it is. handling_hours: from opening to the last time it was resolved, NULL while
-- it is worked on. open_hours: while it is worked on, how long that has been (a lower bound on handling_hours, without
-- which a model learns from quick tickets only), told on each of the first eight days and then weekly.
-- late: the same as missed, and known sooner: a ticket resolved by its due time is in time before it is closed.
-- Of two updates the one that happened later is the newer (event_at, then the count of updates), whichever came in later.
-- settles_at: when that was decided, its due time (NULL where the source knows none).
WITH
latest AS (
    SELECT ticket_id,
        arg_max(state, (event_at, updates, known_at, source_file_id, source_row)) IN ('resolved', 'closed') AS ended,
        min(opened_at) AS opened_at,
        max(event_at) FILTER (state = 'resolved') AS resolved_at,
        max(event_at) FILTER (state = 'closed') AS closed_at,
        bool_or(missed) AS missed,
        arg_max(due_at, (event_at, updates, known_at, source_file_id, source_row)) AS due_at,
        max(effort_hours) AS effort_hours,
        min(known_at) > $previous_cutoff::TIMESTAMP AS is_new,
        max(known_at) FILTER (
            known_at > $previous_cutoff::TIMESTAMP AND (state IN ('resolved', 'closed') OR missed IS NOT NULL)
        ) AS told_at
    FROM events
    GROUP BY ticket_id
),
aged AS (
    SELECT *, date_diff('second', opened_at, $cutoff::TIMESTAMP) // 86400 AS days_open FROM latest
)
SELECT
    ticket_id AS entity_id,
    NULL::DATE AS for_day,
    CASE WHEN ended THEN told_at ELSE $cutoff::TIMESTAMP END AS known_at,
    missed,
    coalesce(missed, CASE WHEN ended AND resolved_at <= due_at THEN false END)::DOUBLE AS late,
    due_at AS settles_at,
    CASE
        WHEN ended THEN date_diff('second', opened_at, coalesce(resolved_at, closed_at)) / 3600.0
    END AS handling_hours,
    CASE WHEN NOT ended THEN date_diff('second', opened_at, $cutoff::TIMESTAMP) / 3600.0 END AS open_hours,
    CASE WHEN ended THEN effort_hours END AS effort_hours
FROM aged
WHERE told_at IS NOT NULL OR (NOT ended AND (is_new OR days_open <= 8 OR days_open % 7 = 0))
ORDER BY entity_id

-- Every ticket as the replay of the queue serves it anew: where it is worked on, since when, until when it should be and was done,
-- and the hours of work that it took.
-- unit: the team that had it last; arrived_at: when it came there; moved: it came from another team.
-- priority: as it was first given, by people; what was sent since is in the ledger.
WITH steps AS (
    SELECT *,
        row_number() OVER w AS n,
        row_number() OVER w > 1 AND team IS DISTINCT FROM lag(team) OVER w AS moves
    FROM events
    WINDOW w AS (PARTITION BY ticket_id ORDER BY event_at, updates, known_at, source_file_id, source_row)
)
SELECT
    ticket_id AS entity_id,
    coalesce(arg_max(team, n), '(none)') AS unit,
    coalesce(max(event_at) FILTER (moves), min(event_at)) AS arrived_at,
    arg_max(due_at, n) AS due_at,
    CASE
        WHEN arg_max(state, n) IN ('resolved', 'closed')
            THEN coalesce(max(event_at) FILTER (state = 'resolved'), max(event_at) FILTER (state = 'closed'))
    END AS resolved_at,
    CASE WHEN arg_max(state, n) IN ('resolved', 'closed') THEN max(effort_hours) END AS effort_hours,
    coalesce(arg_max(category, n), '(none)') AS category,
    arg_min(priority, n) AS priority,
    bool_or(moves) AS moved
FROM steps
GROUP BY ticket_id
ORDER BY entity_id

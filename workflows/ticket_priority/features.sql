-- Tickets as of a day, and the queue around them. Key: (entity_id, moment).
-- moment 'intake': first known during the day, described by its first event, with the queue as it stood until then.
-- moment 'open': still open at the cut-off, described by its latest event, with the queue as it stood at the cut-off.
-- Of two updates of a ticket the one that happened later is the newer (event_at, then the count of updates), whichever came in later.
-- The queue is counted by sweeping marks in order of time: a ticket arrives, runs late, is resolved, is judged by its
-- service level, and each of these leaves its window again. Marks are whole numbers: no order can change their sum.
WITH
bounds AS (
    SELECT $cutoff::TIMESTAMP AS cutoff, $cutoff::TIMESTAMP - INTERVAL 1 DAY AS since
),
spans AS (
    SELECT ticket_id,
        min(known_at) AS arrived,
        max(event_at) AS changed,
        arg_max(state, (event_at, updates, known_at, source_file_id, source_row)) AS last_state,
        min(known_at) FILTER (state IN ('resolved', 'closed')) AS resolved,
        min(event_at) FILTER (state IN ('resolved', 'closed')) AS resolved_at,
        min(known_at) FILTER (missed IS NOT NULL) AS judged,
        arg_min(missed, (known_at, updates, source_file_id, source_row)) FILTER (missed IS NOT NULL)::INT AS missed
    FROM events
    GROUP BY ticket_id
),
first_events AS (
    SELECT e.*
    FROM events AS e
    JOIN spans AS s ON s.ticket_id = e.ticket_id AND s.arrived = e.known_at
    QUALIFY row_number() OVER (PARTITION BY e.ticket_id ORDER BY e.updates, e.source_file_id, e.source_row) = 1
),
last_events AS (
    SELECT e.*
    FROM events AS e
    JOIN spans AS s ON s.ticket_id = e.ticket_id AND s.changed = e.event_at
    WHERE s.last_state IN ('open', 'waiting')
    QUALIFY row_number() OVER (
        PARTITION BY e.ticket_id ORDER BY e.updates DESC, e.known_at DESC, e.source_file_id DESC, e.source_row DESC
    ) = 1
),
described AS (
    SELECT e.*, 'intake' AS moment, e.known_at AS clock
    FROM first_events AS e, bounds AS b
    WHERE e.known_at > b.since AND e.opened_at > b.since - INTERVAL 21 DAY
    UNION ALL
    SELECT e.*, 'open' AS moment, b.cutoff AS clock
    FROM last_events AS e, bounds AS b
),
-- A ticket counts under what its first event said. Late: past its due time, or four days old where none is known.
tickets AS (
    SELECT s.*, h.team, h.category, h.subcategory, h.symptom, h.caller, h.location, h.opened_by, h.assignee,
        greatest(s.arrived, coalesce(h.due_at, s.arrived + INTERVAL 4 DAY)) AS late,
        -- thousandths of log2(1 + hours)
        round(1000 * log2(1 + greatest(date_diff('second', h.opened_at, s.resolved_at), 0) / 3600.0))::BIGINT AS took
    FROM spans AS s
    JOIN first_events AS h ON h.ticket_id = s.ticket_id
),
marks AS (
    SELECT ticket_id, arrived AS clock, 1 AS arrived_1, 1 AS arrived_7, 1 AS backlog FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, arrived + INTERVAL 1 DAY AS clock, -1 AS arrived_1 FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, arrived + INTERVAL 7 DAY AS clock, -1 AS arrived_7 FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, late AS clock, 1 AS overdue FROM tickets WHERE resolved IS NULL OR resolved > late
    UNION ALL BY NAME
    SELECT ticket_id, resolved AS clock, -1 AS backlog, -(resolved > late)::INT AS overdue,
        1 AS resolved_7, took AS took_7, (resolved > late)::INT AS late_7,
        1 AS resolved_28, took AS took_28, (resolved > late)::INT AS late_28
    FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, resolved + INTERVAL 7 DAY AS clock,
        -1 AS resolved_7, -took AS took_7, -(resolved > late)::INT AS late_7
    FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, resolved + INTERVAL 28 DAY AS clock,
        -1 AS resolved_28, -took AS took_28, -(resolved > late)::INT AS late_28
    FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, judged AS clock, 1 AS judged_14, missed AS missed_14 FROM tickets
    UNION ALL BY NAME
    SELECT ticket_id, judged + INTERVAL 14 DAY AS clock, -1 AS judged_14, -missed AS missed_14 FROM tickets
),
-- What lies before the day is one mark a ticket at its start: only the day itself has to be swept.
swept AS (
    SELECT m.ticket_id, greatest(m.clock, b.since) AS clock,
        coalesce(sum(m.arrived_1), 0)::BIGINT AS arrived_1,
        coalesce(sum(m.arrived_7), 0)::BIGINT AS arrived_7,
        coalesce(sum(m.backlog), 0)::BIGINT AS backlog,
        coalesce(sum(m.overdue), 0)::BIGINT AS overdue,
        coalesce(sum(m.resolved_7), 0)::BIGINT AS resolved_7,
        coalesce(sum(m.took_7), 0)::BIGINT AS took_7,
        coalesce(sum(m.late_7), 0)::BIGINT AS late_7,
        coalesce(sum(m.resolved_28), 0)::BIGINT AS resolved_28,
        coalesce(sum(m.took_28), 0)::BIGINT AS took_28,
        coalesce(sum(m.late_28), 0)::BIGINT AS late_28,
        coalesce(sum(m.judged_14), 0)::BIGINT AS judged_14,
        coalesce(sum(m.missed_14), 0)::BIGINT AS missed_14
    FROM marks AS m, bounds AS b
    WHERE m.clock < b.cutoff
    GROUP BY ALL
),
asked AS (
    SELECT h.ticket_id, h.moment, h.clock, key.name AS name, key.value AS value
    FROM described AS h,
    UNNEST([
        {name: 'everything', value: ''},
        {name: 'team', value: h.team},
        {name: 'category', value: h.category},
        {name: 'subcategory', value: h.subcategory},
        {name: 'symptom', value: h.symptom},
        {name: 'caller', value: h.caller},
        {name: 'location', value: h.location},
        {name: 'opened_by', value: h.opened_by},
        {name: 'assignee', value: h.assignee}
    ]) AS k(key)
),
keyed AS (
    SELECT key.name AS name, key.value AS value, s.clock, s.* EXCLUDE (ticket_id, clock)
    FROM swept AS s
    JOIN tickets AS h ON h.ticket_id = s.ticket_id,
    UNNEST([
        {name: 'everything', value: ''},
        {name: 'team', value: h.team},
        {name: 'category', value: h.category},
        {name: 'subcategory', value: h.subcategory},
        {name: 'symptom', value: h.symptom},
        {name: 'caller', value: h.caller},
        {name: 'location', value: h.location},
        {name: 'opened_by', value: h.opened_by},
        {name: 'assignee', value: h.assignee}
    ]) AS k(key)
    WHERE (key.name, key.value) IN (SELECT name, value FROM asked)
),
instants AS (
    SELECT name, value, clock,
        sum(arrived_1)::BIGINT AS arrived_1,
        sum(arrived_7)::BIGINT AS arrived_7,
        sum(backlog)::BIGINT AS backlog,
        sum(overdue)::BIGINT AS overdue,
        sum(resolved_7)::BIGINT AS resolved_7,
        sum(took_7)::BIGINT AS took_7,
        sum(late_7)::BIGINT AS late_7,
        sum(resolved_28)::BIGINT AS resolved_28,
        sum(took_28)::BIGINT AS took_28,
        sum(late_28)::BIGINT AS late_28,
        sum(judged_14)::BIGINT AS judged_14,
        sum(missed_14)::BIGINT AS missed_14
    FROM keyed
    GROUP BY name, value, clock
),
queue AS (
    SELECT name, value, clock,
        sum(arrived_1) OVER w AS arrived_1,
        sum(arrived_7) OVER w AS arrived_7,
        sum(backlog) OVER w AS backlog,
        sum(overdue) OVER w AS overdue,
        sum(resolved_7) OVER w AS resolved_7,
        sum(took_7) OVER w AS took_7,
        sum(late_7) OVER w AS late_7,
        sum(resolved_28) OVER w AS resolved_28,
        sum(took_28) OVER w AS took_28,
        sum(late_28) OVER w AS late_28,
        sum(judged_14) OVER w AS judged_14,
        sum(missed_14) OVER w AS missed_14
    FROM instants
    WINDOW w AS (PARTITION BY name, value ORDER BY clock ROWS UNBOUNDED PRECEDING)
),
answered AS (
    SELECT a.ticket_id, a.moment, a.name,
        coalesce(arrived_1, 0)::DOUBLE AS arrived_1,
        coalesce(arrived_7, 0)::DOUBLE AS arrived_7,
        coalesce(backlog, 0)::DOUBLE AS backlog,
        coalesce(overdue, 0)::DOUBLE AS overdue,
        coalesce(resolved_28, 0)::DOUBLE AS resolved_28,
        (late_7 + overdue + 0.5) / (resolved_7 + overdue + 2) AS late_7,
        (late_28 + overdue + 0.5) / (resolved_28 + overdue + 2) AS late_28,
        took_7 / nullif(resolved_7, 0) AS took_7,
        took_28 / nullif(resolved_28, 0) AS took_28,
        (missed_14 + 0.5) / (judged_14 + 2) AS missed_14
    FROM asked AS a
    ASOF LEFT JOIN queue AS q ON a.name = q.name AND a.value = q.value AND a.clock > q.clock
),
wide AS (
    SELECT ticket_id, moment,
        max(arrived_1) FILTER (name = 'everything') AS everything_arrived_1,
        max(arrived_7) FILTER (name = 'everything') AS everything_arrived_7,
        max(backlog) FILTER (name = 'everything') AS everything_backlog,
        max(overdue) FILTER (name = 'everything') AS everything_overdue,
        max(late_7) FILTER (name = 'everything') AS everything_late_7,
        max(took_7) FILTER (name = 'everything') AS everything_took_7,
        max(missed_14) FILTER (name = 'everything') AS everything_missed_14,
        max(arrived_1) FILTER (name = 'team') AS team_arrived_1,
        max(arrived_7) FILTER (name = 'team') AS team_arrived_7,
        max(backlog) FILTER (name = 'team') AS team_backlog,
        max(overdue) FILTER (name = 'team') AS team_overdue,
        max(late_7) FILTER (name = 'team') AS team_late_7,
        max(took_7) FILTER (name = 'team') AS team_took_7,
        max(late_28) FILTER (name = 'team') AS team_late_28,
        max(took_28) FILTER (name = 'team') AS team_took_28,
        max(missed_14) FILTER (name = 'team') AS team_missed_14,
        max(arrived_1) FILTER (name = 'category') AS category_arrived_1,
        max(backlog) FILTER (name = 'category') AS category_backlog,
        max(overdue) FILTER (name = 'category') AS category_overdue,
        max(late_28) FILTER (name = 'category') AS category_late_28,
        max(took_28) FILTER (name = 'category') AS category_took_28,
        max(arrived_1) FILTER (name = 'subcategory') AS subcategory_arrived_1,
        max(arrived_7) FILTER (name = 'subcategory') AS subcategory_arrived_7,
        max(backlog) FILTER (name = 'subcategory') AS subcategory_backlog,
        max(overdue) FILTER (name = 'subcategory') AS subcategory_overdue,
        max(late_7) FILTER (name = 'subcategory') AS subcategory_late_7,
        max(took_7) FILTER (name = 'subcategory') AS subcategory_took_7,
        max(late_28) FILTER (name = 'subcategory') AS subcategory_late_28,
        max(took_28) FILTER (name = 'subcategory') AS subcategory_took_28,
        max(resolved_28) FILTER (name = 'subcategory') AS subcategory_resolved_28,
        max(missed_14) FILTER (name = 'subcategory') AS subcategory_missed_14,
        max(arrived_1) FILTER (name = 'symptom') AS symptom_arrived_1,
        max(backlog) FILTER (name = 'symptom') AS symptom_backlog,
        max(overdue) FILTER (name = 'symptom') AS symptom_overdue,
        max(late_28) FILTER (name = 'symptom') AS symptom_late_28,
        max(took_28) FILTER (name = 'symptom') AS symptom_took_28,
        max(resolved_28) FILTER (name = 'symptom') AS symptom_resolved_28,
        max(arrived_7) FILTER (name = 'caller') AS caller_arrived_7,
        max(backlog) FILTER (name = 'caller') AS caller_backlog,
        max(overdue) FILTER (name = 'caller') AS caller_overdue,
        max(late_28) FILTER (name = 'caller') AS caller_late_28,
        max(took_28) FILTER (name = 'caller') AS caller_took_28,
        max(resolved_28) FILTER (name = 'caller') AS caller_resolved_28,
        max(arrived_7) FILTER (name = 'location') AS location_arrived_7,
        max(backlog) FILTER (name = 'location') AS location_backlog,
        max(overdue) FILTER (name = 'location') AS location_overdue,
        max(late_28) FILTER (name = 'location') AS location_late_28,
        max(took_28) FILTER (name = 'location') AS location_took_28,
        max(resolved_28) FILTER (name = 'location') AS location_resolved_28,
        max(arrived_7) FILTER (name = 'opened_by') AS opened_by_arrived_7,
        max(backlog) FILTER (name = 'opened_by') AS opened_by_backlog,
        max(overdue) FILTER (name = 'opened_by') AS opened_by_overdue,
        max(late_28) FILTER (name = 'opened_by') AS opened_by_late_28,
        max(took_28) FILTER (name = 'opened_by') AS opened_by_took_28,
        max(late_7) FILTER (name = 'opened_by') AS opened_by_late_7,
        max(took_7) FILTER (name = 'opened_by') AS opened_by_took_7,
        max(resolved_28) FILTER (name = 'opened_by') AS opened_by_resolved_28,
        max(missed_14) FILTER (name = 'opened_by') AS opened_by_missed_14,
        max(arrived_7) FILTER (name = 'assignee') AS assignee_arrived_7,
        max(backlog) FILTER (name = 'assignee') AS assignee_backlog,
        max(overdue) FILTER (name = 'assignee') AS assignee_overdue,
        max(late_28) FILTER (name = 'assignee') AS assignee_late_28,
        max(took_28) FILTER (name = 'assignee') AS assignee_took_28,
        max(resolved_28) FILTER (name = 'assignee') AS assignee_resolved_28
    FROM answered
    GROUP BY ticket_id, moment
)
SELECT
    d.ticket_id AS entity_id,
    d.moment,
    d.moment = 'open' AS is_open,
    d.state,
    d.state = 'waiting' AS is_waiting,
    d.state IN ('resolved', 'closed') AS is_resolved,
    d.priority, d.impact, d.urgency, d.due_at,
    d.team, d.category, d.subcategory, d.symptom, d.contact_type, d.location, d.caller, d.opened_by, d.assignee,
    d.reassignments, d.reopens, d.updates,
    date_diff('second', d.opened_at, d.clock) / 3600.0 AS age_hours,
    date_diff('second', d.known_at, d.clock) / 3600.0 AS quiet_hours,
    date_diff('second', d.clock, d.due_at) / 3600.0 AS hours_to_due,
    date_diff('second', d.opened_at, d.due_at) / 3600.0 AS allowed_hours,
    date_part('hour', d.opened_at) + date_part('minute', d.opened_at) / 60.0 AS hour_of_day,
    isodow(d.opened_at) AS day_of_week,
    w.* EXCLUDE (ticket_id, moment)
FROM described AS d
JOIN wide AS w ON w.ticket_id = d.ticket_id AND w.moment = d.moment
ORDER BY entity_id, moment

-- UCI 498, "Incident management process enriched event log" (ServiceNow): one row an update of an incident.
-- closed_code, resolved_by, resolved_at and closed_at stand on every row from the first on, long before they are true:
-- they are left out. made_sla stays true until the service level is known to be missed, so `true` means something on a
-- closing event only.
SELECT
    source_row,
    number AS ticket_id,
    parse_time(sys_updated_at, '%d/%m/%Y %H:%M') AS event_at,
    parse_time(sys_updated_at, '%d/%m/%Y %H:%M') AS known_at,
    CASE
        WHEN ident_state IN ('New', 'Active') THEN 'open'
        WHEN ident_state LIKE 'Awaiting %' THEN 'waiting'
        WHEN ident_state = 'Resolved' THEN 'resolved'
        WHEN ident_state = 'Closed' THEN 'closed'
        ELSE ident_state
    END AS state,
    parse_time(opened_at, '%d/%m/%Y %H:%M') AS opened_at,
    NULL::VARCHAR AS due_at,
    priority,
    impact,
    urgency,
    assignment_group AS team,
    category,
    subcategory,
    u_symptom AS symptom,
    contact_type,
    location,
    caller_id AS caller,
    opened_by,
    assigned_to AS assignee,
    reassignment_count AS reassignments,
    reopen_count AS reopens,
    sys_mod_count AS updates,
    CASE
        WHEN made_sla = 'false' THEN 'true'
        WHEN made_sla = 'true' AND ident_state = 'Closed' THEN 'false'
        WHEN made_sla = 'true' THEN NULL
        ELSE made_sla
    END AS missed,
    NULL::VARCHAR AS effort_hours
FROM raw

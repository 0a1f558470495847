-- What a line cost and earned on the day after for_day, with what was set and what was drawn for that day; a later row of the same day replaces an earlier one.
SELECT
    line_id AS entity_id,
    "day" - 1 AS for_day,
    known_at,
    cost,
    value,
    coalesce(budget, cost) AS budget,
    explore_multiplier,
    explore_probability
FROM events
WHERE known_at > $previous_cutoff AND known_at <= $cutoff
QUALIFY row_number() OVER (PARTITION BY line_id, "day" ORDER BY known_at DESC, source_file_id DESC, source_row DESC) = 1

-- The ad platform's daily export: a row is a line's whole day, known when it was exported. Every row of the file comes out.
SELECT
    source_row,
    line_id,
    campaign,
    segment,
    format,
    placement,
    parse_time(date, '%Y-%m-%d') AS event_at,
    exported_at AS known_at,
    impressions,
    clicks,
    cost,
    revenue AS value,
    NULL AS conversions,
    NULL AS sales,
    budget,
    explore_multiplier,
    explore_probability
FROM raw

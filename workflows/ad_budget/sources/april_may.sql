-- "Online Advertising performance data" (Company X): a row is a line's whole day, the year is not in the file (2020), and a missing placement
-- reads #N/A (a null in workflow.yaml). The day is known two hours after it has closed. Every row of the file comes out.
SELECT
    source_row,
    concat_ws('|', campaign_number, user_engagement, banner, coalesce(placement, '')) AS line_id,
    campaign_number AS campaign,
    user_engagement AS segment,
    banner AS format,
    placement,
    parse_time('2020 ' || month || ' ' || "day", '%Y %B %d') AS event_at,
    coalesce(CAST(try_cast(parse_time('2020 ' || month || ' ' || "day", '%Y %B %d') AS TIMESTAMP) + INTERVAL 26 HOUR AS VARCHAR), '') AS known_at,
    displays AS impressions,
    clicks,
    cost,
    revenue AS value,
    post_click_conversions AS conversions,
    post_click_sales_amount AS sales,
    NULL AS budget,
    '1.0' AS explore_multiplier,
    NULL AS explore_probability
FROM raw

-- One row a line that was active within the 28 days up to $day. Money is summed in whole micros, so that no order of rows can change a sum.
-- The status quo is what was set for $day: its budget, or the realised cost where the source knows no budget. A line without impressions
-- (no row, or a row of zeros without a budget) keeps what was last set within the week; a budget of zero switches it off. What has had no
-- row for seven days has ended: it has no budget and is not decided on. Trailing windows end with $day.
-- ratio: value / cost. shift: how far the newest day's ratio stands from its own last week, as a log. against: the newest day's ratio of all
-- that compete with the line, against the line's own last week, as a log. shift_weekday: the weekday that is decided on, a week ago.
WITH daily AS (
    SELECT
        line_id, campaign, segment, format, placement,
        CAST($day AS DATE) - "day" AS age,
        CAST(round(cost * 1e6) AS BIGINT) AS cost,
        CAST(round(value * 1e6) AS BIGINT) AS value,
        CAST(round(coalesce(budget, cost) * 1e6) AS BIGINT) AS budget,
        budget IS NOT NULL OR cost > 0 AS is_set,
        impressions, clicks, explore_multiplier, explore_probability
    FROM events
    WHERE "day" <= CAST($day AS DATE) AND "day" > CAST($day AS DATE) - 28
    QUALIFY row_number() OVER (PARTITION BY line_id, "day" ORDER BY known_at DESC, source_file_id DESC, source_row DESC) = 1
),
line AS (
    SELECT
        line_id,
        arg_min(campaign, age) AS campaign, arg_min(segment, age) AS segment,
        arg_min(format, age) AS format, arg_min(placement, age) AS placement,
        coalesce(arg_min(budget, age) FILTER (is_set AND age < 7), 0) AS budget_micros,
        min(age) AS days_since_active,
        count(*) FILTER (age < 7) AS active_days_7,
        count(*) AS active_days_28,
        coalesce(sum(cost) FILTER (age < 1), 0) AS c1, coalesce(sum(value) FILTER (age < 1), 0) AS v1,
        coalesce(sum(cost) FILTER (age < 3), 0) AS c3, coalesce(sum(value) FILTER (age < 3), 0) AS v3,
        coalesce(sum(cost) FILTER (age < 7), 0) AS c7, coalesce(sum(value) FILTER (age < 7), 0) AS v7,
        coalesce(sum(cost) FILTER (age < 14), 0) AS c14, coalesce(sum(value) FILTER (age < 14), 0) AS v14,
        sum(cost) AS c28, sum(value) AS v28,
        sum(budget) FILTER (age < 7) AS b7,
        sum(cost) FILTER (age = 6) AS c_weekday, sum(value) FILTER (age = 6) AS v_weekday,
        sum(impressions) FILTER (age < 7) AS i7, sum(clicks) FILTER (age < 7) AS k7,
        min(age) FILTER (is_set AND age < 7) AS budget_age,
        coalesce(arg_min(explore_multiplier, age) FILTER (is_set AND age < 7), 1.0) AS multiplier_today,
        count(*) FILTER (explore_probability IS NOT NULL) AS drawn_days
    FROM daily
    GROUP BY line_id
),
beside AS (
    SELECT
        *,
        sum(v1) OVER of_campaign / nullif(sum(c1) OVER of_campaign, 0) AS campaign_ratio_1,
        sum(v7) OVER of_campaign / nullif(sum(c7) OVER of_campaign, 0) AS campaign_ratio_7,
        sum(v28) OVER of_campaign / nullif(sum(c28) OVER of_campaign, 0) AS campaign_ratio_28,
        sum(v_weekday) OVER of_campaign / nullif(sum(c_weekday) OVER of_campaign, 0) AS campaign_ratio_weekday,
        sum(v1) OVER of_placement / nullif(sum(c1) OVER of_placement, 0) AS placement_ratio_1,
        sum(v7) OVER of_placement / nullif(sum(c7) OVER of_placement, 0) AS placement_ratio_7,
        sum(v28) OVER of_placement / nullif(sum(c28) OVER of_placement, 0) AS placement_ratio_28
    FROM line
    WINDOW of_campaign AS (PARTITION BY campaign), of_placement AS (PARTITION BY campaign, placement)
)
SELECT
    line_id AS entity_id,
    campaign, segment, format, placement,
    budget_micros, budget_age,
    CAST(isodow(CAST($day AS DATE) + 1) AS BIGINT) AS weekday,
    days_since_active, active_days_7, active_days_28,
    c1 / 1e6 AS cost_1, c3 / 1e6 AS cost_3, c7 / 1e6 AS cost_7, c14 / 1e6 AS cost_14, c28 / 1e6 AS cost_28,
    v1 / 1e6 AS value_1, v3 / 1e6 AS value_3, v7 / 1e6 AS value_7, v14 / 1e6 AS value_14, v28 / 1e6 AS value_28,
    v1 / nullif(c1, 0) AS ratio_1, v3 / nullif(c3, 0) AS ratio_3, v7 / nullif(c7, 0) AS ratio_7,
    v14 / nullif(c14, 0) AS ratio_14, v28 / nullif(c28, 0) AS ratio_28,
    campaign_ratio_1, campaign_ratio_7, campaign_ratio_28, placement_ratio_1, placement_ratio_7, placement_ratio_28,
    ln(nullif(v1 / nullif(c1, 0), 0) / nullif(v7 / nullif(c7, 0), 0)) AS shift_1,
    ln(nullif(campaign_ratio_1, 0) / nullif(campaign_ratio_7, 0)) AS campaign_shift_1,
    ln(nullif(campaign_ratio_weekday, 0) / nullif(campaign_ratio_7, 0)) AS campaign_shift_weekday,
    ln(nullif(placement_ratio_1, 0) / nullif(placement_ratio_7, 0)) AS placement_shift_1,
    ln(nullif(campaign_ratio_1, 0) / nullif(v7 / nullif(c7, 0), 0)) AS against_campaign,
    ln(nullif(placement_ratio_1, 0) / nullif(v7 / nullif(c7, 0), 0)) AS against_placement,
    i7 AS impressions_7, k7 AS clicks_7,
    k7 / nullif(i7, 0) AS click_rate_7, c7 / 1e6 / nullif(k7, 0) AS cost_per_click_7, v7 / 1e6 / nullif(k7, 0) AS value_per_click_7,
    least(c7 / nullif(b7, 0), 1.0) AS delivered_7,
    multiplier_today AS explore_multiplier_today, drawn_days
FROM beside

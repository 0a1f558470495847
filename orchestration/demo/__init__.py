"""The first day: a made-up month told step by step, its scorecard, and the same on real data.

Belongs here: the story that ``make demo`` tells and what it measures. Does not: the sandbox's worlds (``delivery.sandbox``).
"""

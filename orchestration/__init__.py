"""Dagster wiring only: definitions, jobs, schedules, sensors, and the ``signalbox`` command.

Belongs here: when and how things run. Does not: what they do (``assets`` and the rooms below it).
"""

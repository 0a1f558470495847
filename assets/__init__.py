"""The data of the product: one asset a stage of a workflow, and what the stages are made of.

Belongs here: stages (thin Dagster assets), workflow files, the lake, the resources an asset may ask for.
Does not: schedules, sensors and commands (``orchestration``), algorithms (``models``, ``data_checks``, ``delivery``).
"""

"""The Dagster assets: one module a stage of a workflow, in the order in which the data flows, and the resources that they ask for.

Each module of a stage has ``build(workflow)``, which makes the stage's asset. An asset is thin: read, call one pure function,
write, return what a person would look at.

Belongs here: what Dagster runs and shows. Does not: what the stages do (``pipeline``), schedules, sensors and commands
(``orchestration``).
"""

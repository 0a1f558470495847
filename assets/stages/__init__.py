"""The stages of a workflow, one module each, in the order in which the data flows.

Each module has ``build(workflow)``, which makes the stage's Dagster asset. An asset is thin: read, call one pure
function, write, return what a person would look at.
"""

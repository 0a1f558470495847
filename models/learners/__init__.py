"""What learns: one module a kind of model, each with its baseline rule.

Belongs here: turning feature rows with their outcomes into a model that scores, explains and judges itself.
Does not: reading tables, registering versions, deciding what to do with a score.
"""

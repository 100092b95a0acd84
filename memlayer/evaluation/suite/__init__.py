"""A whole suite of evaluations in one command, with a report.

plan.py     which steps a suite has
run.py      steps that are not there yet ─► results/<step>.json
report.py   results ─► report.md, report.json
figures.py  results ─► figures/*.png
"""

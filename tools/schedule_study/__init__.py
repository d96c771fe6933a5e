"""The evidence for `schedules/`: what tools/study_schedules.py runs and reports."""

"""The steps of the page Learn: job.py starts and reads the lesson, step.py is what they share, each other file is a step or two."""

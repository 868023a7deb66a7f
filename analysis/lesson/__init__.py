"""The lesson of the page Learn: numbers.py computes, arithmetic.py writes weights out, figures.py draws, prepare.py fills its folder."""

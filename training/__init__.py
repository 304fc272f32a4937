"""Training of every stage and the recipe of the micro checkpoint; imports kimia.model only."""

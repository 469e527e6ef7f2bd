"""The names of gauge-theoretic attention: agents and what one divergence needs."""

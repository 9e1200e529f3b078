"""Real series as language, and small models of them: what time_series.py is made of."""

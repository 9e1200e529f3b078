"""What the project measures about itself: commands that write their numbers to ``results/``."""

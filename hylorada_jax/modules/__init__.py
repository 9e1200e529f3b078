"""Thin Linen modules over ``math``, for people who build their own model."""

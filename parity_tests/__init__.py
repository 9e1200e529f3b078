"""The two packages against each other, and both against peft and transformers."""

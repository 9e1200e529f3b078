"""What a domain knows about its tokens, as the numbers that the structure encoders read."""

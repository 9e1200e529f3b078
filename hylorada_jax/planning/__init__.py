"""What a training step takes on devices, said by their compiler before there are any."""

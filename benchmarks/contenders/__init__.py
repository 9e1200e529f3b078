"""What step_time.py times: our methods, PEFT's on torch and qwix's LoRA, each as a step to call."""

"""int8 on the CPU: a pass of a Llama-family target in one call, a draft of its assistant in one call, and kernels."""
